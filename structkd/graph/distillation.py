"""Distil a teacher into an MLP: the method prepares student and loss, one loop trains, best validation reports."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from structkd.errors import UsageError, did_you_mean
from structkd.graph.config import DistillConfig, config_fields
from structkd.graph.data.inputs import RAW, Inputs
from structkd.graph.data.task import Features, GraphTask, chunks, rows_of
from structkd.graph.evaluate import CLEARLY, metric_of, report, standard_error, validation
from structkd.graph.figures import band_figure, margin_figure, margins, training_figure
from structkd.graph.methods.lesson import Lesson, Method, Teaching
from structkd.graph.methods.minibatch import BLOCK, teach_in_batches
from structkd.graph.methods.table import METHODS
from structkd.graph.models.teacher import Teacher, check_scores, check_split, teacher_spec
from structkd.graph.models.train import Fit, FitConfig, Selection, fit
from structkd.graph.policies.flags import NO_POLICIES, Policies
from structkd.graph.policies.lesson import policy_teaching
from structkd.graph.published import given
from structkd.graph.spectral import band_agreement
from structkd.report import finish
from structkd.runs import Run
from structkd.scores import NodeScores
from structkd.scores.provenance import keep_teachers, teacher_row

__all__ = ["METHODS", "DistillConfig", "DistillResult", "config_fields", "distill", "predict", "rows_of"]

Logits = Float[Tensor, "nodes classes"]


@dataclass(frozen=True, eq=False)
class DistillResult:
    """What distillation gives.

    Attributes:
        student: a torch module, x -> logits, with x = inputs.whole(task); weights of best validation.
        history: one mapping per epoch: step, loss, valid, and band agreement where watched.
        metrics: valid, test (both at best validation), cos_low, cos_high, error_low, error_high, agreement (share of
            nodes whose class is the teacher's), epochs, cpu_seconds; ind, tran, prod in the settings that define them.
        config: the resolved configuration.
        input_class: graph_free, precomputed or graph_at_inference.
        run: the run folder, when one was given.
        target: what taught the student; the default method says which candidate validation chose.
        inputs: what the student reads of a task: its features, or features prepared from the graph.
    """

    student: nn.Module
    history: tuple[Mapping[str, float], ...]
    metrics: dict[str, float]
    config: DistillConfig
    input_class: str = "graph_free"
    run: Run | None = None
    target: str = "teacher"
    inputs: Inputs = RAW


def distill(
    task: GraphTask,
    teacher: NodeScores | Logits | Teacher | None,
    config: DistillConfig | None = None,
    seed: int | None = None,
    run: Run | None = None,
    *,
    policies: Policies = NO_POLICIES,
) -> DistillResult:
    """Train a student by lambda CE(labels) + (1 - lambda) (teacher terms); the only reported test figure is the one
    at best validation.

    Args:
        task: the problem; only `task.observed` reaches training.
        teacher: logits of the observed nodes, cached or as a tensor, or the trained teacher itself, which some
            methods look into; for plain mlp they serve the band metrics only and may be None.
        policies: objectives and policies beside the method's own terms.

    Raises:
        UsageError: an unknown method, no teacher for a method that needs one, or policies that do not fit.
        DataError: logits of another graph or size.
    """
    asked = config or DistillConfig()
    seed = task.seed if seed is None else seed
    method = method_named(asked.method)
    logits, model = teacher_logits(task, teacher), teacher if isinstance(teacher, Teacher) else None
    lesson = Lesson(task.observed, logits, asked.resolved(task), seed, model)
    found = _trained(lesson, method, policies)
    if not policies.active:  # a rival would be taught without them
        others = [replace(asked, method=name, options="").resolved(task) for name in method.rivals]
        rivals = [_trained(replace(lesson, config=one), METHODS[one.method], policies) for one in others]
        found = _preferred(lesson, found, rivals)
    teaching = found.teaching
    metrics = _metrics(task, teaching, logits, found.fit)
    metrics["cpu_seconds"] += found.preparing
    if run is not None:
        for line in found.fit.history:
            run.log(**line)
        _write_figures(run, task, teacher, teaching, logits, found.fit.history, seed)
        finish(run, metrics)
    kept = replace(found.config, method=asked.method, options=lesson.config.options)
    return DistillResult(
        teaching.student, found.fit.history, metrics, kept, method.input_class, run, teaching.target, teaching.inputs
    )


@dataclass(frozen=True, eq=False)
class _Trained:
    """A finished student: how it was taught and fitted, and the seconds before and around its own fit."""

    teaching: Teaching
    fit: Fit
    config: DistillConfig
    preparing: float


def _trained(lesson: Lesson, method: Method, policies: Policies) -> _Trained:
    """Prepare the method's side and fit its student."""
    check_needs(method, lesson)
    config, seen, started = lesson.config, lesson.seen, time.process_time()
    batched = config.batch_nodes and method.needs != "nothing"
    if policies.active and batched:
        raise UsageError("--batch-nodes and policies do not go together yet: policies see all nodes in each step.")
    if policies.active:
        teaching = policy_teaching(lesson, method, policies)
    else:
        teaching = teach_in_batches(lesson) if batched else method.teach(lesson)
    x = teaching.inputs.seen(seen)
    preparing = time.process_time() - started
    watch = _watcher(seen, teaching.student, x, lesson.logits, config.watch_every)
    trained = teaching.student if teaching.also is None else nn.ModuleList([teaching.student, teaching.also])
    validate = _validation(seen, teaching, x)
    settings = _fit_config(config, teaching)
    found = fit(trained, teaching.loss_of, validate, settings, lesson.seed, watch, teaching.groups, teaching.steps)
    if teaching.finish is not None:
        teaching.finish()
    return _Trained(teaching, found, config, preparing)


def _preferred(lesson: Lesson, own: _Trained, rivals: Sequence[_Trained]) -> _Trained:
    """The rival of best validation where it clearly leads, else the method's own student.

    Clearly: a rival's epoch was chosen by its validation metric, which flatters it, and a student's by its target.
    """
    if not rivals:
        return own
    seen = lesson.seen
    answers = [_compared(one.teaching, seen) for one in (own, *rivals)]
    valid = [metric_of(out, seen.y, seen.valid, seen.metric) for out in answers]
    best = max(range(len(answers)), key=lambda place: valid[place])
    spent = sum(one.preparing + one.fit.cpu_seconds for one in (own, *rivals))
    error = standard_error(seen, answers[best], answers[0], lesson.seed)
    chosen = (own, *rivals)[best if valid[best] - valid[0] > CLEARLY * error else 0]
    if chosen is not own:
        chosen = replace(chosen, teaching=replace(chosen.teaching, target=f"{chosen.config.method} on validation"))
    return replace(chosen, preparing=spent - chosen.fit.cpu_seconds)


def _compared(teaching: Teaching, seen: GraphTask) -> Logits:
    """A student's answers as they are held against those of others."""
    out = predict(teaching.student, teaching.inputs.seen(seen))
    return out if teaching.comparable is None else teaching.comparable(out.softmax(dim=1)).clamp_min(1e-12).log()


def teacher_logits(task: GraphTask, teacher: NodeScores | Logits | Teacher | None) -> Tensor | None:
    """The teacher's logits of the observed nodes as a tensor, checked against the graph."""
    if teacher is None:
        return None
    if isinstance(teacher, Teacher):
        check_split(teacher, task)
        return teacher.logits(task.observed)
    if isinstance(teacher, Tensor):
        expected = (task.observed.num_nodes, task.classes)
        if tuple(teacher.shape) != expected:
            raise UsageError(f"teacher logits of shape {tuple(teacher.shape)}; expected {expected} (observed nodes).")
        return teacher.detach().to(torch.float32)
    check_scores(teacher, task)
    return torch.from_numpy(np.array(teacher.logits, dtype=np.float32))


def check_needs(method: Method, lesson: Lesson) -> None:
    """UsageError when the method needs more of the teacher than there is."""
    name = lesson.config.method
    if method.needs != "nothing" and lesson.logits is None:
        raise UsageError(f"method {name} needs teacher scores; only mlp does without.")
    if method.needs == "model" and lesson.teacher is None:
        raise UsageError(
            f"method {name} looks inside the teacher, and logits alone were given; pass the trained teacher "
            "(--weights DIR of `structkd graph teach`), or take a method that needs logits alone, as ff-g2m."
        )


@torch.no_grad()
def predict(student: nn.Module, x: Features) -> Logits:
    """The student's logits in eval mode; beyond 65536 rows, block by block."""
    student.eval()
    if x.shape[0] <= BLOCK:
        whole: Tensor = student(x)
        return whole
    return torch.cat([student(rows_of(x, torch.arange(rows.start, rows.stop))) for rows in chunks(x.shape[0], BLOCK)])


def method_named(name: str) -> Method:
    """The row of METHODS; UsageError for a name that has none."""
    if name not in METHODS:
        raise UsageError(f"method {name!r}: expected one of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}")
    return METHODS[name]


def _validation(seen: GraphTask, teaching: Teaching, x: Features) -> Callable[[], tuple[float, float]]:
    rows = torch.nonzero(seen.valid).flatten()
    wanted = None if teaching.answers is None else teaching.answers[rows]
    return validation(seen, partial(teaching.student, rows_of(x, rows)), wanted)


def _watcher(
    seen: GraphTask, student: nn.Module, x: Features, logits: Tensor | None, every: int
) -> Callable[[int], dict[str, float]] | None:
    if not every or logits is None:
        return None
    wanted = logits.softmax(dim=1)

    def watch(epoch: int) -> dict[str, float]:
        if epoch != 1 and epoch % every:
            return {}
        return band_agreement(seen, predict(student, x).softmax(dim=1), wanted)

    return watch


def _metrics(task: GraphTask, teaching: Teaching, logits: Tensor | None, result: Fit) -> dict[str, float]:
    mine = predict(teaching.student, teaching.inputs.whole(task))
    out = {"valid": result.valid, **report(task, mine)}
    if logits is not None:
        observed = mine[task.observed_rows]
        out |= band_agreement(task.observed, observed.softmax(dim=1), logits.softmax(dim=1))
        out["agreement"] = float((observed.argmax(dim=1) == logits.argmax(dim=1)).double().mean())
    return out | {"epochs": float(result.epochs), "cpu_seconds": result.cpu_seconds}


def _write_figures(
    run: Run,
    task: GraphTask,
    teacher: NodeScores | Logits | Teacher | None,
    teaching: Teaching,
    logits: Tensor | None,
    history: Sequence[Mapping[str, float]],
    seed: int,
) -> None:
    """What the report shows of one student."""
    run.write_figure("training", training_figure(history))
    name = run.config().get("method", "student")
    if (bands := band_figure({name: [history]})) is not None:
        run.write_figure("band-agreement", bands)
    if logits is not None:
        mine = predict(teaching.student, teaching.inputs.seen(task.observed))
        run.write_figure("margins", margin_figure({name: margins(logits, mine, seed)}))
    spec = teacher.spec if isinstance(teacher, NodeScores) else None
    if isinstance(teacher, Teacher):
        spec = teacher_spec(task, teacher.config, teacher.seed)
    if spec is not None:
        keep_teachers(run, [teacher_row(spec, found=1, unit="graphs")])


def _fit_config(config: DistillConfig, teaching: Teaching) -> FitConfig:
    select: Selection = "metric" if teaching.answers is None else "loss"
    return FitConfig(given(config.learning_rate), given(config.weight_decay), config.epochs, config.patience, select)
