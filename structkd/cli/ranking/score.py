"""`structkd ranking score`: fill a score cache from a teacher, alone or as one of many workers."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray

from structkd.cli.output import Common, Output, Table
from structkd.errors import MissingExtraError, UsageError
from structkd.ids import Pairs, text_hash
from structkd.progress import note
from structkd.ranking.data import datasets
from structkd.ranking.data.budget import BudgetConfig, Stored, judged, read_triples, union, within_budget
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.models.cross_encoder import Dtype
from structkd.ranking.teachers.sources import open_teacher
from structkd.scores.cache import Scorer
from structkd.scores.compaction.compact import compact
from structkd.scores.pairs import PairScores
from structkd.scores.produce import UNIT_ROWS, Cost, Share, produce
from structkd.trec import Run, read_run


def score_command(
    *,
    collection: str,
    teacher: tuple[str, ...],
    out: Path,
    candidates: tuple[Path, ...] = (),
    triples: tuple[Path, ...] = (),
    qrels: bool = False,
    split: str | None = None,
    depth: int = 100,
    student: str | None = None,
    unit_range: str | None = None,
    unit_rows: int = UNIT_ROWS,
    ray_workers: int = 0,
    dtype: Dtype = "float32",
    common: Common = Common(),
    config: Annotated[BudgetConfig, Parameter(name="*")] = BudgetConfig(),
) -> Output:
    """Fill a score cache with what a teacher says of candidate pairs; what is there is not asked again.

    Started by torchrun, or several times with parts of --unit-range, the workers share the cache without locks.

    Args:
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs.
        teacher: cross-encoder:MODEL, bi-encoder:MODEL, multi-vector:MODEL, model:FOLDER, run:FILE, order:FILE or bm25.
        out: Folder of the cache; several teachers get one folder each inside it.
        candidates: Runs whose pairs are scored, mined negatives among them; BM25's first DEPTH by default.
        triples: Files of `query positive negative` ids whose pairs are scored.
        qrels: Score the judged pairs too: of --split, else of the training split where there is one.
        split: Split whose queries are scored; every query that the candidates name by default.
        depth: Candidates of each query, from the top.
        student: Model whose margins decide which lists fit --budget; the candidates' own scores by default.
        unit_range: Units A:B of the plan that this process takes; torchrun's RANK and WORLD_SIZE count otherwise.
        unit_rows: Pairs in a unit: what a killed process can lose.
        ray_workers: Actors of a Ray pool that score instead of this process.
        dtype: float32 or bfloat16: what a cross-encoder computes in, part of its identity.
    """
    given = bool(candidates or triples or qrels)
    loaded = datasets.load(collection, split or ("all" if given else None))
    labels = datasets.load(collection, split or _labelled_split(collection)) if qrels else loaded
    wanted = _wanted(loaded, candidates, triples, judged(labels.qrels) if qrels else None, depth)
    share = _share(unit_range)
    rows: list[dict[str, Any]] = []
    for name in teacher:
        scorer = open_teacher(name, loaded.documents, dtype)
        folder = out if len(teacher) == 1 else out / scorer.spec.fingerprint[:12]
        chosen = within_budget(
            wanted,
            config,
            loaded,
            open_teacher(student, loaded.documents) if student else None,
            _stored(loaded, folder),
        )
        pairs = loaded.pairs_of(chosen)
        if ray_workers:
            cost = _with_ray(
                partial(open_teacher, name, loaded.documents, dtype), pairs, folder, ray_workers, unit_rows
            )
        else:
            cost = produce(scorer, pairs, folder, share=share, unit_rows=unit_rows)
        if cost.left:
            note(f"{folder}: {cost.left} units are left to other workers; run the same line again for what they leave")
        else:
            compact(folder)
        if cost.found:
            note(f"{folder}: {cost.found} scores were there, {cost.asked} were asked of {scorer.spec.model}")
        store = {"teacher": name, "store": str(folder), "fingerprint": scorer.spec.fingerprint}
        rows.append({**store, "rows": len(PairScores.open(folder)), **cost.fields()})
    return Output({"stores": rows, **rows[0]}, tables=[Table("Teacher scores", rows)])


def _wanted(
    collection: Collection, candidates: tuple[Path, ...], triples: tuple[Path, ...], labels: Run | None, depth: int
) -> Run:
    """Every pair to score."""
    runs = [read_run(path).cut(depth) for path in candidates]
    runs += [read_triples(path) for path in triples]
    if labels is not None:
        runs.append(labels)
    if not runs:
        return bm25_candidates(collection, depth)
    return runs[0] if len(runs) == 1 else union(runs)


def _labelled_split(collection: str) -> str | None:
    """The training split where there is one: students are trained on what a store lists."""
    has_splits = Path(collection).is_dir() or collection in datasets.DATASETS
    return "train" if has_splits and "train" in datasets.splits(collection) else None


def _share(unit_range: str | None) -> Share:
    """What of the plan is this process's."""
    if unit_range is None:
        return Share(rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1")))
    first, colon, last = unit_range.partition(":")
    if not colon or not all(part == "" or part.isdigit() for part in (first, last)):
        raise UsageError(f"--unit-range {unit_range!r}: expected A:B, as in 0:100 or 100:.")
    return Share(first=int(first or 0), last=int(last) if last else None)


def _stored(collection: Collection, folder: Path) -> Stored:
    """Tells which pairs the cache in `folder` holds under the collection's texts."""
    if not (folder / "cache.json").is_file():
        return lambda queries, documents: np.zeros(len(queries), dtype=np.bool_)
    store = PairScores.open(folder)

    def stored(queries: list[str], documents: list[str]) -> NDArray[np.bool_]:
        hashes = []
        for ids, texts in ((queries, collection.queries), (documents, collection.documents)):
            hashes.append([text_hash(texts.texts[row]) for row in texts.ids.rows(ids, collection.name)])
        found = store.lookup_texts(queries, hashes[0], documents, hashes[1])
        return np.asarray(~np.isnan(found))

    return stored


def _with_ray(open_scorer: "partial[Scorer]", pairs: Pairs, folder: Path, workers: int, unit_rows: int) -> Cost:
    try:
        from structkd.ranking.teachers.teacher_ray import produce_with_ray  # an engine that few install
    except ImportError as error:
        raise MissingExtraError(error.name or "ray", "ray", "--ray-workers") from None
    return produce_with_ray(open_scorer, pairs, folder, workers=workers, unit_rows=unit_rows)
