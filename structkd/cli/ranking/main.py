"""`structkd ranking`: teach, score, distill, evaluate, encode, mine."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from cyclopts import App, Parameter

from structkd.cli.output import Common, Output, Table
from structkd.errors import UsageError
from structkd.ids import Texts
from structkd.progress import note
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import MineConfig, bm25_candidates, mine
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.models.multi_vector import Variant
from structkd.ranking.models.students import student
from structkd.ranking.teachers.sources import Combine, EnsembleScorer, RunScorer, open_teacher
from structkd.ranking.teachers.teacher import TeacherConfig, teach
from structkd.ranking.training.live import NO_LIVE, LiveConfig, cached_live
from structkd.ranking.training.policies import NO_POLICIES, Policies
from structkd.scores.cache import CachedScorer, Scorer, StoredScorer
from structkd.scores.pairs import PairScores
from structkd.scores.store import open as open_store
from structkd.trec import Run, read_run, write_run

Config = TypeVar("Config", TeacherConfig, DistillConfig, MineConfig)

app = App(name="ranking", help="Ranking models: cross-architecture distillation.")
app.command("structkd.cli.ranking.bench:bench_command", name="bench")
app.command("structkd.cli.ranking.evaluate:evaluate_command", name="evaluate")
app.command("structkd.cli.ranking.order:order_command", name="order")
app.command("structkd.cli.ranking.score:score_command", name="score")
app.command("structkd.cli.ranking.self_distill:self_distill_command", name="self-distill")
app.command("structkd.cli.ranking.serving:encode_command", name="encode")
app.command("structkd.cli.ranking.serving:export_command", name="export")


@app.command(name="teach")
def teach_command(
    *,
    collection: str,
    init: str,
    out: Path,
    split: str | None = None,
    candidates: Path | None = None,
    common: Common = Common(),
    config: Annotated[TeacherConfig, Parameter(name="*")] = TeacherConfig(),
) -> Output:
    """Teach a cross-encoder from a collection's judgements.

    Args:
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs.
        init: Starting weights: folder or hub id.
        out: Run folder; the model goes to OUT/teacher.
        split: Judgements to teach on; by default train when the collection has it.
        candidates: Run that negatives are drawn from; BM25 by default.
    """
    loaded = _training_collection(collection, split)
    first_stage = None if candidates is None else read_run(candidates)
    result = teach(loaded, _seeded(config, common), init=init, candidates=first_stage, out=out)
    found = {"run": str(out), "teacher": str(result.folder), **result.metrics}
    return Output(found, lines=[f"teacher: {result.folder}", f"metrics: {result.metrics}"])


@app.command(name="distill")
def distill_command(
    *,
    collection: str,
    out: Path,
    student_kind: Annotated[str, Parameter(name="--student")] = "dot",
    init: str | None = None,
    teacher: tuple[str, ...] = (),
    scores: tuple[Path, ...] = (),
    candidates: Path | None = None,
    split: str | None = None,
    combine: Combine = "z-mean",
    max_length: int | None = None,
    variant: Variant = "stanford",
    common: Common = Common(),
    config: Annotated[DistillConfig, Parameter(name="*")] = DistillConfig(),
    policies: Annotated[Policies, Parameter(name="*")] = NO_POLICIES,
    live: Annotated[LiveConfig, Parameter(name="*")] = NO_LIVE,
    live_teacher: str | None = None,
) -> Output:
    """Distil a student from stored scores (--scores) or from teachers (--teacher, cached below OUT).

    Args:
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs.
        out: Run folder; the student goes to OUT/student.
        student_kind: dot, colbert, prett, tk, cat or static.
        init: Starting weights: folder or hub id.
        teacher: cross-encoder:MODEL, bi-encoder:MODEL, multi-vector:MODEL, model:FOLDER, run:FILE, order:FILE or
            bm25; several are combined.
        scores: Score caches or published scores; several are combined.
        candidates: Run whose lists are trained on; the store's or run's own lists, else BM25's, by default.
        split: Split whose queries are trained on; by default whatever the lists name.
        combine: How several teachers become one.
        max_length: Longest text in tokens; the model's own by default.
        variant: Of colbert: stanford (128 numbers, normalised) or matchmaker (as wide as the encoder, not normalised).
        live_teacher: KIND:VALUE of what scores whole batches for --in-batch, cached below OUT; by default --teacher.
    """
    if bool(teacher) == bool(scores):
        raise UsageError("give either --scores STORE or --teacher KIND:VALUE (each may be repeated).")
    lists_given = bool(scores) or candidates is not None or any(name.startswith(("run:", "order:")) for name in teacher)
    loaded = _load(collection, split or _listed_split(collection, config, lists_given))
    members: list[Scorer] = [StoredScorer(_pair_scores(folder)) for folder in scores]
    for name in teacher:
        scorer = open_teacher(name, loaded.documents)
        members.append(CachedScorer(scorer, out / "scores" / scorer.spec.fingerprint[:12]))
    start = student(
        student_kind, init, documents=loaded.documents, max_length=max_length, variant=variant, seed=common.seed
    )
    chosen = None if candidates is None else read_run(candidates)
    one = members[0] if len(members) == 1 else EnsembleScorer(members, combine)
    asked_live = _live_teacher(live, live_teacher, one, loaded.documents, out)
    result = distill(
        start, one, loaded, _seeded(config, common), candidates=chosen, out=out, policies=policies, live=live,
        live_teacher=asked_live,
    )  # fmt: skip
    found = {
        "run": str(out),
        "student": str(out / "student"),
        "steps": result.metrics["steps"],
        "pairs_per_second": result.metrics["pairs_per_second"],
        "best": result.metrics["best"],
        "before": result.metrics["before"],
        "target_transform": result.config.target_transform,
        "student_scale": result.config.student_scale,
        "asked": sum(member.asked for member in members if isinstance(member, CachedScorer)),
    }
    return Output(found, tables=[Table("Distilled", [_flat(found)])])


@app.command(name="mine")
def mine_command(
    *,
    collection: str,
    out: Path,
    candidates: Path | None = None,
    split: str | None = None,
    teacher: str | None = None,
    scores: Path | None = None,
    common: Common = Common(),
    config: Annotated[MineConfig, Parameter(name="*")] = MineConfig(),
) -> Output:
    """Mine negatives: candidates that are no judged positive and no copy of one, as a run; says what was left out.

    Args:
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs.
        out: Run file to write; its scores are the candidates' order.
        candidates: First stage; BM25 by default.
        split: Judgements that say what a positive is; by default train when the collection has it.
        teacher: For --teacher-margin: cross-encoder:MODEL, bi-encoder:MODEL, multi-vector:MODEL, run:FILE or bm25.
        scores: For --teacher-margin: a store with the teacher's scores, instead of a teacher.
    """
    if teacher is not None and scores is not None:
        raise UsageError("give --teacher or --scores, not both.")
    loaded = _training_collection(collection, split)
    first_stage = bm25_candidates(loaded, config.depth) if candidates is None else read_run(candidates)
    scorer = (
        StoredScorer(_pair_scores(scores)) if scores else open_teacher(teacher, loaded.documents) if teacher else None
    )
    mined = mine(loaded, first_stage, _seeded(config, common), teacher=scorer)
    write_run(out, Run({query: (own, -np.arange(1.0, len(own) + 1)) for query, own in mined.items()}), tag="negatives")
    total = sum(map(len, mined.values()))
    found = {"run": str(out), "queries": len(mined), "negatives": total, "counts": mined.counts}
    rows = [{"candidates": name.replace("_", " "), "count": count} for name, count in mined.counts.items()]
    return Output(
        found,
        tables=[Table("What became of the candidates", rows)],
        lines=[f"{total} negatives of {len(mined)} queries: {out}"],
    )


def _live_teacher(live: LiveConfig, name: str | None, teacher: Scorer, documents: Texts, out: Path) -> Scorer | None:
    """What scores whole batches; None: the teacher itself, which then must be able to score any pair."""
    if live.in_batch == "none":
        if name is not None:
            raise UsageError("--live-teacher scores batches of --in-batch tas-balanced or tct; give one of them.")
        return None
    if name is None:
        if not isinstance(teacher, CachedScorer) or isinstance(teacher.scorer, RunScorer):
            raise UsageError(
                f"--in-batch {live.in_batch} scores pairs that no file lists; give --live-teacher KIND:MODEL."
            )
        return None
    scorer = open_teacher(name, documents)
    return cached_live(scorer, out / "scores" / scorer.spec.fingerprint[:12])


def _load(name: str, split: str | None) -> Collection:
    return datasets.load(name, split)


def _training_collection(name: str, split: str | None) -> Collection:
    """The split asked for, else `train` where there is one."""
    if split is None and _has_splits(name):
        if "train" in datasets.splits(name):
            split = "train"
        else:
            note(f"{name}: no training split; its only judgements are used. Do not evaluate on the same queries.")
    return _load(name, split)


def _listed_split(name: str, config: DistillConfig, lists_given: bool) -> str | None:
    """Which queries distillation may meet: those of any split where lists are given, else the training split."""
    if not _has_splits(name) or config.validate_on == "qrels":
        return None
    return "all" if lists_given else ("train" if "train" in datasets.splits(name) else None)


def _has_splits(name: str) -> bool:
    """Folders and built-in collections have; what ir_datasets calls a split is a name of its own."""
    return Path(name).is_dir() or name in datasets.DATASETS


def _pair_scores(folder: Path) -> PairScores:
    store = open_store(folder)
    if not isinstance(store, PairScores):
        raise UsageError(f"{folder}: holds logits of nodes; ranking needs scores of pairs.")
    return store


def _seeded(config: Config, common: Common) -> Config:
    return replace(config, seed=common.seed)


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """One table row: nested measures side by side."""
    row = {key: value for key, value in found.items() if not isinstance(value, dict)}
    row |= {f"{name} before": value for name, value in found["before"].items()}
    row |= {f"{name} best": value for name, value in found["best"]["measures"].items()}
    return row
