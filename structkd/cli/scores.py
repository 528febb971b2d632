"""`structkd scores`: import, export, show, compact, verify, publish, diff, ensemble."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
from cyclopts import App, Parameter

from structkd import scores
from structkd.cli.output import Common, Output, Table
from structkd.errors import MissingScoreError, UsageError
from structkd.ids import Texts
from structkd.progress import note, track
from structkd.ranking.data.answers import read_answers, replay
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.datasets import load, splits
from structkd.scores import NodeScores, PairScores, TeacherSpec, import_file
from structkd.scores.calibrate import Calibration, calibrated
from structkd.scores.compaction.compact import Dtype
from structkd.scores.compaction.merge import OnConflict
from structkd.scores.compare import compare
from structkd.scores.doctor import examine
from structkd.scores.formats import registry
from structkd.scores.formats.base import Rows, ScoreTable, lists_of
from structkd.scores.formats.margins import write_margin_triples
from structkd.trec import read_run

app = App(name="scores", help="Teacher-score caches and files: import, export, check, publish, combine.")

Method = Literal["mean", "weighted", "median", "standardised", "rrf", "reciprocal-rank"]
Missing = Literal["error", "common", "union"]


@app.command(name="import")
def import_(
    file: Path,
    *,
    out: Path,
    format: str = "auto",
    teacher_name: str | None = None,
    collection: str | None = None,
    candidates: Path | None = None,
    dtype: Dtype | None = None,
    common: Common = Common(),
) -> Output:
    """Read a score file into a store: whole or not at all, in constant memory.

    Parameters
    ----------
    file
        The score file: plain, gzip or zstd.
    out
        Folder of the store; an existing one must be of the same teacher.
    format
        Name of the format; auto tells it from the content.
    teacher_name
        Who made the scores; default: the file's name.
    collection
        Collection whose texts the ids stand for: then the texts are part of the key.
    candidates
        For a language model's raw list-wise answers ("[2] > [1]"): the run that they reorder, 20 at a time in steps of
        10 from the 100th up (ranking order takes other sizes).
    dtype
        float16, float32 or auto: float16 where it loses nothing that matters.
    """
    loaded = load(collection) if collection else None
    chosen = import_file(
        file,
        out,
        format=format,
        teacher_name=teacher_name,
        dtype=dtype,
        texts=partial(_with_texts, loaded) if loaded else None,
        opened=partial(_answers, file, candidates) if candidates else None,
        say=note,
    )
    shown = _describe(out)
    return Output(
        {"format": chosen, "store": str(out), **shown}, tables=[Table(f"{file.name} ({chosen})", [_row(shown)])]
    )


def _with_texts(collection: Collection, block: ScoreTable) -> ScoreTable:
    """A block with the texts of a collection (every id must be in it), unless the file has its own."""
    if block.query_texts is not None:
        return block

    def texts(held: Texts, what: str, ids: list[str]) -> list[str]:
        return [held.texts[row] for row in held.ids.rows(ids, f"{collection.name}: {what} of the score file")]

    return block.with_texts(
        partial(texts, collection.queries, "queries"), partial(texts, collection.documents, "documents")
    )


def _answers(file: Path, candidates: Path) -> tuple[str, Iterator[ScoreTable]]:
    """The order that a language model's answers give to a run."""
    found = replay(read_run(candidates, by_rank=True), read_answers(file))
    rows = Rows(file, "rank")
    for query, (documents, values) in found.run.lists.items():
        rows.add_list(query, documents, values.tolist(), 0)
    line = f"{found.exact} of {found.windows} answers are permutations; the others were completed in the old order"
    return "answers", iter([replace(rows.take([f"{file}: {line}; only the order counts"]), lines=None)])


@app.command
def export(
    store: Path,
    *,
    format: str,
    out: Path,
    collection: str | None = None,
    triples: Path | None = None,
    common: Common = Common(),
) -> Output:
    """Write a store as a score file.

    Parameters
    ----------
    store
        A store or published folder.
    format
        Name of the format.
    out
        The file.
    collection
        Collection whose texts go into the file, for formats that hold texts.
    triples
        For margin-tsv-ids, a file of `query positive negative` ids: one line for each, in its order, which is the
        layout of the 2020 training file; by default each list's best document stands against every other.
    """
    if triples is not None:
        if format != "margin-tsv-ids":
            raise UsageError(f"export: --triples belongs to --format margin-tsv-ids, not {format}.")
        count = write_margin_triples(out, _pairs_of(store), triples)
        return Output({"file": str(out), "format": format, "rows": count}, lines=[f"{out}: {count} triples"])
    query_texts, document_texts = _by_id(load(collection)) if collection else (None, None)
    count = registry.write(out, format, scores.open(store), query_texts=query_texts, document_texts=document_texts)
    return Output({"file": str(out), "format": format, "rows": count}, lines=[f"{out}: {count} scores as {format}"])


def _by_id(collection: Collection) -> tuple[Mapping[str, str], Mapping[str, str]]:
    queries, documents = (
        dict(zip(texts.ids, texts.texts, strict=True)) for texts in (collection.queries, collection.documents)
    )
    return queries, documents


@app.command
def show(store: Path, *, common: Common = Common()) -> Output:
    """Say what a store holds: teacher, sizes, score and margin statistics, a suggested temperature, warnings."""
    shown = _describe(store)
    doctor = examine(scores.open(store))
    shown["doctor"] = doctor
    stats = {key: value for key, value in shown["stats"].items() if isinstance(value, float)}
    margin = {f"margin_{key}": value for key, value in shown["stats"].get("margin", {}).items()}
    tables = [
        Table(str(store), [_row(shown)]),
        Table("Teacher", [{"field": key, "value": str(value)} for key, value in shown["teacher"].items()]),
        Table("Scores", [{**stats, **margin}]),
        Table("Scale", [{key: value for key, value in doctor.items() if key != "warnings"}]),
    ]
    lines = [f"fingerprint {shown['fingerprint']}", *shown["notes"], *(f"warning: {w}" for w in doctor["warnings"])]
    return Output(shown, tables=tables, lines=lines)


def _row(shown: Mapping[str, Any]) -> dict[str, Any]:
    return {key: shown[key] for key in ("kind", "rows", "queries", "dtype", "bytes", "bytes_per_row")}


def _describe(folder: Path) -> dict[str, Any]:
    return scores.describe(folder)


@app.command
def compact(
    store: Path, *, dtype: Dtype | None = None, on_conflict: OnConflict = "error", common: Common = Common()
) -> Output:
    """Write a snapshot of every committed part.

    Parameters
    ----------
    store
        A score store.
    dtype
        float16, float32 or auto: float16 where it loses nothing that matters.
    on_conflict
        What to do when a pair has two values: error, first or mean.
    """
    manifest = scores.compact(store, dtype=dtype, on_conflict=on_conflict)
    data = {
        "snapshot": manifest.snapshot,
        "dtype": manifest.dtype,
        **manifest.counts,
        "quant_error": manifest.quant_error,
    }
    line = f"snapshot {manifest.snapshot}: {manifest.counts['rows']} rows as {manifest.dtype}"
    return Output(data, lines=[line, *manifest.notes])


@app.command
def verify(folder: Path, *, common: Common = Common()) -> Output:
    """Read every byte of a store or published folder; exit status 1 when something is wrong."""
    report = scores.verify(folder)
    problems = [{"path": problem.path, "problem": problem.problem} for problem in report.problems]
    line = f"{folder}: {report.files} files, {len(problems)} problems"
    tables = [Table("Problems", problems)] if problems else []
    return Output({"ok": report.ok, "files": report.files, "problems": problems}, tables, [line], ok=report.ok)


@app.command
def publish(
    store: Path,
    *,
    out: Path,
    license: str,
    citation: str | None = None,
    title: str | None = None,
    top: int | None = None,
    common: Common = Common(),
) -> Output:
    """Write a store as portable files with checksums, a data-set card and Croissant metadata.

    Parameters
    ----------
    store
        A score store.
    out
        The new folder.
    license
        Licence of the scores, for example CC-BY-4.0.
    citation
        Text to cite.
    title
        Title of the card; default: the teacher's name.
    top
        Of node logits, how many classes of each node are published; all by default.
    """
    manifest = scores.publish(store, to=out, license=license, citation=citation, title=title, top=top)
    size = sum(entry["bytes"] for entry in manifest.files)
    data = {"folder": str(out), "rows": manifest.counts["rows"], "files": len(manifest.files) + 1, "bytes": size}
    return Output(data, lines=[f"{out}: {manifest.counts['rows']} rows, {size} bytes, licence {license}"])


@app.command
def diff(first: Path, second: Path, *, common: Common = Common()) -> Output:
    """Compare two stores: which pairs each has, how far their scores lie apart, how far their orders agree."""
    found = compare(scores.open(first), scores.open(second))
    rows = [{"what": key, "value": value} for key, value in found.items() if not isinstance(value, dict)]
    return Output(found, tables=[Table(f"{first} and {second}", rows)])


@app.command
def ensemble(
    stores: Annotated[list[Path], Parameter(allow_leading_hyphen=False)],
    *,
    out: Path,
    method: Method = "mean",
    weights: str | None = None,
    calibrate: str = "none",
    collection: str | None = None,
    split: str | None = None,
    missing: Missing = "error",
    teacher_name: str | None = None,
    common: Common = Common(),
) -> Output:
    """Combine several teachers' stores into one.

    Parameters
    ----------
    stores
        Two or more stores of pairs.
    out
        Folder of the new store.
    method
        mean, weighted, median of the scores; standardised: mean of z-scores per list; rrf (reciprocal-rank):
        reciprocal-rank fusion.
    weights
        One number per store, comma separated, for weighted.
    calibrate
        none, z-score, min-max, rank (each per list) or isotonic (against judgements); one for all stores or a comma
        list with one for each.
    collection
        Collection whose judgements isotonic is fitted to.
    split
        Split of these judgements; by default train when the collection has it.
    missing
        error: every store must have the same pairs; common: only pairs that all have; union: rrf alone, a pair that a
        store lacks gets nothing from it.
    teacher_name
        Name of the new teacher; default: the names joined by +.
    """
    opened = [_pairs_of(path) for path in stores]
    shares = _weights(weights, len(opened), method)
    if len(opened) < 2:
        raise UsageError("ensemble: found one store; expected two or more.")
    if missing == "union" and method != "rrf":
        raise UsageError(f"ensemble: missing=union would average over fewer teachers; {method} needs error or common.")
    method = "rrf" if method == "reciprocal-rank" else method
    rules = _rules(calibrate, len(opened))
    grades = _grades(collection, split) if "isotonic" in rules else None
    lists = [
        calibrated({query: dict(zip(*found, strict=True)) for query, found in lists_of(store).items()}, rule, grades)
        for store, rule in zip(opened, rules, strict=True)
    ]
    queries, documents, values = [], [], []
    for query in track(_queries(lists, missing, stores), "combining"):
        names = _documents(query, [found.get(query, {}) for found in lists], missing, stores)
        stack = np.array([[found.get(query, {}).get(name, np.nan) for name in names] for found in lists])
        combined = _combine(stack, method, shares)
        queries += [query] * len(names)
        documents += names
        values.append(combined)
    spec = TeacherSpec(
        teacher_name or "+".join(store.spec.model for store in opened),
        extra={
            "ensemble": method,
            "teachers": [store.spec.fingerprint for store in opened],
            "missing": missing,
            **({"weights": shares} if shares else {}),
            **({} if set(rules) == {"none"} else {"calibrate": rules}),
        },
    )
    store = scores.write_pairs(out, spec, queries, documents, np.concatenate(values) if values else np.empty(0))
    shown = _describe(out)
    return Output(
        {"store": str(out), "teachers": [s.spec.model for s in opened], **shown},
        lines=[f"{out}: {len(store)} pairs by {method} of {len(opened)} teachers"],
    )


def _pairs_of(path: Path) -> PairScores:
    store = scores.open(path)
    if isinstance(store, NodeScores):
        raise UsageError(f"{path}: holds node logits; ensemble combines scores of pairs.")
    return store


def _weights(text: str | None, count: int, method: str) -> list[float] | None:
    if (text is None) == (method == "weighted"):
        raise UsageError("ensemble: --weights belongs to --method weighted, and that needs it.")
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"ensemble: weights {text!r}; expected numbers separated by commas.") from None
    if len(shares) != count:
        raise UsageError(f"ensemble: {len(shares)} weights for {count} stores.")
    return shares


def _rules(text: str, count: int) -> list[Calibration]:
    """One calibration per store."""
    names = [part.strip() for part in text.split(",")]
    known = get_args(Calibration)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"ensemble: calibration {unknown[0]!r}; expected one of {', '.join(known)}.")
    if len(names) not in (1, count):
        raise UsageError(f"ensemble: {len(names)} calibrations for {count} stores.")
    return cast(list[Calibration], names * count if len(names) == 1 else names)


def _grades(collection: str | None, split: str | None) -> Mapping[str, Mapping[str, int]]:
    """Judgements for isotonic calibration, of the training split where there is one."""
    if collection is None:
        raise UsageError("ensemble: --calibrate isotonic is fitted to judgements; name their --collection.")
    if split is None and Path(collection).is_dir() and "train" in splits(collection):
        split = "train"
    return load(collection, split).qrels


def _queries(lists: Sequence[Mapping[str, Any]], missing: Missing, stores: Sequence[Path]) -> list[str]:
    every = dict.fromkeys(query for found in lists for query in found)
    if missing == "union":
        return list(every)
    shared = [query for query in every if all(query in found for found in lists)]
    if missing == "error" and len(shared) < len(every):
        lost = [query for query in every if query not in set(shared)]
        raise MissingScoreError(
            len(lost), lost, f"ensemble of {len(stores)} stores: queries that one lacks", "Or use --missing common."
        )
    return shared


def _documents(query: str, found: Sequence[Mapping[str, float]], missing: Missing, stores: Sequence[Path]) -> list[str]:
    every = dict.fromkeys(name for each in found for name in each)
    if missing == "union":
        return list(every)
    shared = [name for name in every if all(name in each for each in found)]
    if missing == "error" and len(shared) < len(every):
        lost = [(query, name) for name in every if not all(name in each for each in found)]
        raise MissingScoreError(
            len(lost), lost, f"ensemble of {len(stores)} stores: pairs that one lacks", "Or use --missing common."
        )
    return shared


def _combine(scores_of: np.ndarray, method: Method, shares: list[float] | None) -> np.ndarray:
    """[teachers, documents] -> [documents], by the rules of the objectives."""
    import torch  # here alone: checking and converting files starts without it

    from structkd.objectives import ensembles

    stack = torch.from_numpy(scores_of)[:, None]
    if method == "rrf":
        combined = ensembles.reciprocal_rank(torch.nan_to_num(stack), known=~torch.isnan(stack))
    elif method == "weighted":
        combined = ensembles.weighted_mean(stack, torch.tensor(shares, dtype=torch.float64))
    else:
        plain = {"mean": ensembles.mean, "median": ensembles.median, "standardised": ensembles.standardised_mean}
        combined = plain[method](stack)
    return np.asarray(combined[0])
