"""Distillation: a teacher's scores of candidate lists -> a student of any architecture."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from structkd.errors import DataError, UsageError
from structkd.files import write_json
from structkd.ids import fingerprint_json
from structkd.objectives import ORDER_OBJECTIVES, targets
from structkd.policies import SOFTMAX_OBJECTIVES, parse_objective, weighted_sum
from structkd.progress import note
from structkd.ranking.card import write_card
from structkd.ranking.data.collection import Collection, hold_out
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.evaluation.held_out import HeldOut
from structkd.ranking.models.dual import DualBiScorer
from structkd.ranking.models.encoders import BiScorer, NeuralScorer, open_scorer, weights_sha256
from structkd.ranking.teachers.sources import RunScorer, only_orders
from structkd.ranking.teachers.teacher import mean_ndcg, training_figure
from structkd.ranking.training.live import NO_LIVE, LiveConfig, in_batch_training
from structkd.ranking.training.policies import NO_POLICIES, Lesson, Policies, asked, kept
from structkd.ranking.training.train import (
    Batch,
    FitConfig,
    FitResult,
    Lists,
    clear_checkpoint,
    fit,
    kept_result,
    lists_of,
    main_process,
    main_process_first,
    plan_of,
    planned_steps,
    scored_grid,
)
from structkd.report import finish
from structkd.runs import Run, plain
from structkd.scores.cache import CachedScorer, Scorer, StoredScorer
from structkd.scores.provenance import keep_teachers, teacher_rows
from structkd.trec import Run as RankedRun

__all__ = ["DistillConfig", "DistillResult", "distill", "parse_objective"]

Transform = Literal["auto", "none", "standardise", "min-max", "rank"]
_LOGITS = (0.3, 10.0)  # spread within a list that a soft-max at temperature 1 is made for
_GAP = 30.0  # ratio of spreads beyond which margins cannot be matched


@dataclass(frozen=True)
class DistillConfig(FitConfig):
    """How a student is distilled."""

    objective: str = "margin-mse"
    "Name in structkd.objectives.OBJECTIVES, or a weighted sum such as kl:1.0,margin-mse:0.5."

    margins: Literal["all", "first", "centred"] = "all"
    "margin-mse: all pairs of a list, or each against its first document."

    target_transform: Transform = "auto"
    """Teacher scores before the objective, list by list. auto: none, except under a soft-max objective when the
    teacher's scores spread far outside the range of logits; then standardise. What was chosen is printed and written
    to config.toml."""

    temperature: float = 1.0
    "Soft-max objectives: temperature of the teacher (after the transform)."

    student_temperature: float = 1.0
    "Soft-max objectives: temperature of the student."

    student_scale: float = 0.0
    "Factor on the student's scores in the objective; 0: 20 for scores within [-1, 1] (cosine), else 1."

    depth: int = 32
    "BM25 documents per query, where neither a store nor a run gives lists."

    held_out: float = 0.1
    "Share of the queries that choose the checkpoint instead of being trained on."

    validate_on: Literal["teacher", "qrels", "none"] = "teacher"
    "What measures held-out queries: the teacher's first ten, or judgements, which alone can keep the start."

    learning_rate: float = 0.0
    "Peak learning rate (Adam); 0: what suits the student (dot and cat 0.0001, tk 0.003, static 0.03)."

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.student_temperature > 0 and self.student_scale >= 0):
            raise UsageError(
                "expected temperature > 0, student_temperature > 0 and student_scale >= 0; found "
                f"{self.temperature}, {self.student_temperature}, {self.student_scale}."
            )


@dataclass(frozen=True)
class DistillResult:
    """A distilled student.

    Attributes:
        student: the scorer, with the weights of the best validation.
        history: what the loop logged.
        metrics: steps, pairs_per_second, before, after and best {step, measures}.
        run: the run folder, None when `out` was not given.
        config: the configuration with every automatic choice made.
    """

    student: NeuralScorer
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    run: Path | None
    config: DistillConfig


def distill(
    student: NeuralScorer,
    teacher: Scorer,
    collection: Collection,
    config: DistillConfig = DistillConfig(),
    *,
    candidates: RankedRun | None = None,
    out: str | Path | None = None,
    policies: Policies = NO_POLICIES,
    live: LiveConfig = NO_LIVE,
    live_teacher: Scorer | None = None,
) -> DistillResult:
    """Train `student` in place on the teacher's scores of candidate lists.

    The lists are `candidates`, else those of a stored teacher or a run, else BM25's. The teacher is asked once, before
    training; judgements are not used (but see `validate_on`). With `out` the run can be killed and started again, and a
    finished run with the same inputs is returned as it is.

    Args:
        student: a scorer from `ranking.student`.
        teacher: a Scorer; CachedScorer and StoredScorer ask no model for what is stored.
        collection: texts of the lists' queries and documents; lists of other queries are left out with a note.
        config: settings.
        candidates: lists to train on.
        out: run folder.
        policies: what is switched on beside the objective.
        live: in-batch terms, which take the place of the objective.
        live_teacher: scores every query of a batch with every document; `teacher` by default.

    Raises:
        UsageError: an unknown objective, a setting out of range, policies that do not fit, scores asked of a teacher
            that only orders, `out` holds another run.
        DataError: no list left, or documents of a list missing in the collection.
        MissingScoreError: a stored teacher lacks pairs of `candidates`.
    """
    weights = parse_objective(config.objective)
    policies.check(weights, student)
    _check_live(live, policies)
    if only_orders(teacher.spec):
        config = _for_orders(config, weights, policies)
    if policies.reads_judgements and not collection.qrels:
        raise UsageError(f"{collection.name}: --head dual and --keep own-... read judgements, and it has none.")
    if policies.head == "dual" and isinstance(student, BiScorer):
        student = DualBiScorer(student)
    scale = config.student_scale or (20.0 if student.bounded else 1.0)
    choose = partial(asked, policies, student, scale=scale, seed=config.seed)
    with main_process_first():  # one process asks the teacher, the others read what it cached
        raw = scored_lists(teacher, collection, config, candidates, choose)
    config = resolve(config, weights, raw, student)
    lists = transformed(raw, config.target_transform)
    keep = kept(policies, student, raw if policies.keep.startswith("own") else lists, collection, scale).tolist()
    if len(keep) < len(raw):
        note(f"{collection.name}: --keep {policies.keep} leaves {len(keep)} of {len(raw)} lists")
        raw, lists = raw.take(keep), lists.take(keep)
    settings = {**plain(config), **plain(policies), **plain(live)}
    identity = fingerprint_json([settings, lists.fingerprint(), weights_sha256(student)])
    if out is not None and (done := _finished(Path(out), identity)) is not None:
        return done
    run = None if out is None else Run.create(out, "ranking distill", settings, config.seed)
    training, held = _split(raw, lists, config)
    shown = HeldOut.of(held, student) if run is not None and main_process() else None
    measure, valid = validation_lists(held, collection, config)
    order_only = only_orders(teacher.spec) and config.target_transform == "none"
    loss_of = objective_of(weights, config, order_only)
    validate = (lambda: mean_ndcg(student, valid)) if len(valid) else None
    # agreement over few lists is too coarse to tell a student from its start: only judgements may say that it stays
    stays = config.validate_on == "qrels"
    fitted = partial(fit, student, config=config, validate=validate, run=run, start_counts=stays)
    if policies.active:
        lesson = Lesson(
            policies, partial(_objective, weights, config, order_only), student, teacher, collection, training=training,
            held=transformed(held, config.target_transform), scale=config.student_scale,
            steps=planned_steps(training, config, plan_of(training, config, student)), seed=config.seed,
        )  # fmt: skip
        result = fitted(training, loss_of=lesson)
        lesson.finish(validate)
    elif live.in_batch != "none":
        asked_live = live_teacher or teacher
        plan, loss = in_batch_training(training, collection, student, asked_live, live, config, config.student_scale)
        result = fitted(plan.lists, loss_of=loss, plan=plan)
    else:
        result = fitted(training, loss_of=loss_of)
    metrics = _metrics(result, measure)
    if run is not None and main_process():
        student.save(run.folder / "student")
        sources = [teacher] if live_teacher is None else [teacher, live_teacher]
        keep_teachers(run, [row for source in sources for row in teacher_rows(source)])
        write_card(run.folder / "student", student, sources, collection, settings, metrics)
        if shown is not None:
            shown.write(run, student, collection, valid, measure)
        _write(run, result, metrics, identity, measure)
    return DistillResult(student, result.history, metrics, None if run is None else run.folder, config)


def _check_live(live: LiveConfig, policies: Policies) -> None:
    if live.in_batch != "none" and policies.active:
        raise UsageError(
            f"--in-batch {live.in_batch} takes the place of the objective; policies on lists have no effect there. "
            "Give one of them."
        )


def _for_orders(config: DistillConfig, weights: Mapping[str, float], policies: Policies) -> DistillConfig:
    """The configuration for a teacher that gives an order and no scores: what reads scores is refused.

    With `--target-transform rank` evenly spaced scores are made of the ranks, and everything goes.
    """
    if config.target_transform == "rank":
        return config
    reads = [f"--objective {name}" for name in weights if name not in ORDER_OBJECTIVES]
    reads += (
        [f"--target-transform {config.target_transform}"] if config.target_transform not in ("auto", "none") else []
    )
    reads += policies.read_scores
    if reads:
        raise UsageError(
            f"the teacher gives an order and no scores, which {', '.join(reads)} would read. Take an objective that "
            f"reads the order ({', '.join(sorted(ORDER_OBJECTIVES))}), or --target-transform rank for evenly spaced "
            "scores."
        )
    return dataclasses.replace(config, target_transform="none")


def scored_lists(
    teacher: Scorer,
    collection: Collection,
    config: DistillConfig,
    candidates: RankedRun | None,
    choose: Callable[[Lists], NDArray[np.int64]] | None = None,
) -> Lists:
    """The training lists with the teacher's raw scores as targets.

    Lists of fewer than two documents carry no information and are left out. `choose` gives the positions of the lists
    that the teacher is asked about; it is not asked about the others.
    """
    wanted = candidates or _own_lists(teacher) or bm25_candidates(collection, config.depth)
    known = [query for query in wanted.lists if query in collection.queries.ids]
    if len(known) < len(wanted.lists):
        note(f"{collection.name}: {len(wanted.lists) - len(known)} lists are of queries that are not in it, left out")
    lists = []
    for query in known:
        documents = wanted.lists[query][0]
        rows = collection.documents.ids.rows(documents, f"{collection.name}: documents of the list of {query!r}")
        if len(rows) > 1:
            lists.append((int(collection.queries.ids.rows([query])[0]), rows))
    if not lists:
        raise DataError(
            f"{collection.name}: none of {len(wanted.lists)} lists has two documents or more and a query of the "
            "collection. Were the scores made for another collection, or another --split?"
        )
    empty = lists_of(collection.queries, collection.documents, lists)
    if choose is not None and len(positions := choose(empty)) < len(empty):
        note(f"{collection.name}: the teacher is asked about {len(positions)} of {len(empty)} lists")
        empty = empty.take(positions.tolist())
    scores = teacher.score(empty.pairs()).detach().cpu().float().numpy()
    return dataclasses.replace(empty, targets=scores)


def _own_lists(teacher: Scorer) -> RankedRun | None:
    """The lists that a stored teacher or a run brings along."""
    if isinstance(teacher, RunScorer):
        return teacher.run
    if isinstance(teacher, CachedScorer):
        return _own_lists(teacher.scorer)
    if isinstance(teacher, StoredScorer):
        store = teacher.store()
        return RankedRun({query: (list(ids), np.asarray(s, np.float64)) for query, ids, s in _stored_lists(store)})
    members: Sequence[Scorer] = getattr(teacher, "members", [])
    return next((own for own in map(_own_lists, members) if own is not None), None)


def _stored_lists(store: Any) -> list[tuple[str, Sequence[str], NDArray[np.float32]]]:
    return [(str(query), *store.list(query)) for query in store.query_ids]


def resolve(config: DistillConfig, weights: Mapping[str, float], lists: Lists, student: NeuralScorer) -> DistillConfig:
    """The configuration with its automatic choices made; scale trouble is said, with the cure.

    Spread is the median over lists of the standard deviation within a list.
    """
    scale = config.student_scale or (20.0 if student.bounded else 1.0)
    spread = _spread(lists.targets, lists)
    strange = bool(set(weights) & SOFTMAX_OBJECTIVES) and not _LOGITS[0] <= spread <= _LOGITS[1]
    softened = spread / config.temperature
    transform: Transform = config.target_transform
    if transform == "auto":
        transform = "standardise" if strange else "none"
        if strange:
            note(
                f"teacher scores spread by {spread:.3g} within a list, far from logits: --target-transform auto chose "
                "standardise (each list to mean 0, deviation 1). Give --target-transform none to train on raw scores."
            )
    elif transform == "none" and strange and not _LOGITS[0] <= softened <= _LOGITS[1]:
        shape = "one-hot" if softened > _LOGITS[1] else "flat"
        note(
            f"scale trouble: the teacher's scores spread by {spread:.3g} within a list; at temperature "
            f"{config.temperature:g} their soft-max is nearly {shape}. Try --target-transform standardise or another "
            "--temperature."
        )
    if transform == "none" and set(weights) - SOFTMAX_OBJECTIVES - ORDER_OBJECTIVES:
        probe = lists.take(range(min(len(lists), 16)))
        own = scale * _spread(student.score(probe.pairs()).numpy(), probe)
        if spread > 0 and not 1 / _GAP <= own / spread <= _GAP:
            note(
                f"scale trouble: the teacher's scores spread by {spread:.3g} within a list, the student's by "
                f"{own:.3g}; margins cannot match. Try --target-transform standardise (or set --student-scale)."
            )
    rate = config.learning_rate or student.learning_rate
    return dataclasses.replace(config, target_transform=transform, student_scale=scale, learning_rate=rate)


def transformed(lists: Lists, transform: Transform) -> Lists:
    """The lists with transformed targets, each list by itself (before any cut into shorter ones)."""
    if transform in ("none", "auto"):
        return lists
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "standardise": targets.standardise,
        "rank": targets.rank,
        "min-max": min_max,
    }
    values = np.empty_like(lists.targets)
    for low, high in zip(lists.offsets[:-1], lists.offsets[1:], strict=True):
        values[low:high] = rules[transform](torch.from_numpy(lists.targets[None, low:high]))[0].numpy()
    return dataclasses.replace(lists, targets=values)


def min_max(scores: Float[Tensor, "lists items"]) -> Float[Tensor, "lists items"]:
    """(t - min) / (max - min) of each list; a constant list becomes 0."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)


def objective_of(
    weights: Mapping[str, float], config: DistillConfig, order_only: bool = False
) -> Callable[[nn.Module, Batch], Tensor]:
    """The weighted sum of objectives as the loop's `loss_of`; `order_only`: targets are minus ranks, no scores."""

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        scores = config.student_scale * scored_grid(model, batch)
        return _objective(weights, config, order_only, scores, batch.targets, batch.mask)

    return loss_of


def _objective(
    weights: Mapping[str, float],
    config: DistillConfig,
    order_only: bool,
    scores: Tensor,
    wanted: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    balanced: bool = False,
) -> Tensor:
    return weighted_sum(
        weights, scores, wanted, mask=mask, weight=weight, temperature=config.temperature,
        student_temperature=config.student_temperature, margins=config.margins, order_only=order_only,
        balanced=balanced,
    )  # fmt: skip


def validation_lists(held: Lists, collection: Collection, config: DistillConfig) -> tuple[str, Lists]:
    """(name of the measure, lists whose targets are grades).

    "teacher": grades 10, 9, ..., 1 for the teacher's first ten documents, 0 below. "qrels": the judgements.
    """
    grades = np.zeros_like(held.targets)
    for low, high in zip(held.offsets[:-1], held.offsets[1:], strict=True):
        if config.validate_on == "teacher":
            best = np.argsort(-held.targets[low:high], kind="stable")[:10]
            grades[low:high][best] = np.arange(10, 10 - len(best), -1)
    if config.validate_on == "qrels":
        pairs = held.pairs()
        judged = zip(pairs.query_ids, pairs.document_ids, strict=True)
        grades = np.asarray([max(0, collection.qrels.get(q, {}).get(d, 0)) for q, d in judged], dtype=np.float32)
        if len(grades) and not grades.any():
            raise DataError(f"{collection.name}: no held-out query has a judged document; use --validate-on teacher.")
    if config.validate_on == "none":
        held, grades = held.take([]), np.empty(0, dtype=np.float32)
    name = "nDCG@10" if config.validate_on == "qrels" else "teacher nDCG@10"
    return name, dataclasses.replace(held, targets=grades)


def _split(raw: Lists, lists: Lists, config: DistillConfig) -> tuple[Lists, Lists]:
    """(training lists with transformed targets, held-out lists with raw ones)."""
    queries = lists.queries.ids.strings(lists.query_rows.tolist())
    _, held = hold_out(queries, config.held_out if config.validate_on != "none" else 0.0, config.seed)
    chosen = set(held)
    training = lists.take([i for i, query in enumerate(queries) if query not in chosen])
    return training, raw.take([i for i, query in enumerate(queries) if query in chosen])


def _spread(scores: NDArray[np.float32], lists: Lists) -> float:
    """Median over lists of the standard deviation within a list."""
    bounds = zip(lists.offsets[:-1], lists.offsets[1:], strict=True)
    return float(np.median([scores[low:high].astype(np.float64).std() for low, high in bounds]))


def _metrics(result: FitResult, measure: str) -> dict[str, Any]:
    before = next((row["valid"] for row in result.history if "valid" in row), None)
    measures = {} if result.best_value is None else {measure: result.best_value}
    return {
        "steps": result.steps,
        "pairs_per_second": round(result.pairs_per_second, 2),
        "before": {} if before is None else {measure: before},
        "best": {"step": result.best_step, "measures": measures},
    }


def _write(run: Run, result: FitResult, metrics: dict[str, Any], identity: str, measure: str) -> None:
    """Write the curves and, last, that the run is complete."""
    run.write_figure("training", training_figure(result, measure))
    clear_checkpoint(run)
    finish(run, metrics)
    write_json(run.folder / "distill.json", {"identity": identity, "history": result.history})


def _finished(folder: Path, identity: str) -> DistillResult | None:
    """The result of a finished run with the same inputs; UsageError when the folder holds another one's."""
    what = "distillation with other settings, scores or starting weights"
    if (kept := kept_result(folder / "distill.json", identity, what)) is None:
        return None
    run = Run.open(folder)
    student = open_scorer(folder / "student")
    known = {field.name for field in dataclasses.fields(DistillConfig)}  # the others are policies
    config = DistillConfig(**{name: value for name, value in run.config().items() if name in known})
    return DistillResult(student, kept["history"], run.info["summary"], folder, config)
