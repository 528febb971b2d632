"""Distil node scores into an MLP: every method is a label term plus edge divergences with their own weights."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.errors import UsageError
from structkd.graph.data import Features, GraphTask
from structkd.graph.evaluate import metric_of, report
from structkd.graph.losses import (
    SoftTargets,
    difference_targets,
    high_frequency,
    low_frequency,
    neighbour_weights,
    node_weights,
    soft_targets,
)
from structkd.graph.models import Mlp
from structkd.graph.published import OWN, given
from structkd.graph.sparse import SparseMatrix
from structkd.graph.spectral import band_agreement
from structkd.graph.targets import choose_target, clamped
from structkd.graph.teacher import check_scores, recipe_of
from structkd.graph.train import Fit, FitConfig, fit
from structkd.runs import Run
from structkd.scores import NodeScores

Logits = Float[Tensor, "nodes classes"]


@dataclass(frozen=True)
class DistillConfig:
    """A student and what it is taught; what is left open comes from the published table, or a default."""

    method: str = "ff-g2m"
    "mlp, glnn, lfd, hfd, ff-g2m or structkd."

    teacher: str = "gcn"
    "Name of the teacher model: picks the row of published hyper-parameters."

    label_weight: float | None = None
    "Weight of the labels' cross-entropy; the teacher's terms get one minus it."

    temperature: float | None = None
    "Temperature of the high-frequency term."

    layers: int | None = None
    "Number of layers."

    hidden: int | None = None
    "Hidden width."

    dropout: float | None = None
    "Dropout between layers."

    learning_rate: float | None = None
    "Adam's learning rate."

    weight_decay: float | None = None
    "Adam's weight decay."

    epochs: int = 500
    "At most so many epochs."

    patience: int = 50
    "Stop after so many epochs without a validation score that reaches the best."

    watch_every: int = 0
    "Record agreement with the teacher per band every so many epochs; 0: never."

    def resolved(self, task: GraphTask) -> "DistillConfig":
        """The same with every open field filled for this task."""
        row = OWN if self.method == "structkd" else recipe_of(task, self.teacher)
        return replace(
            self,
            label_weight=row.label_weight if self.label_weight is None else self.label_weight,
            temperature=row.temperature if self.temperature is None else self.temperature,
            layers=row.student_layers if self.layers is None else self.layers,
            hidden=row.student_hidden if self.hidden is None else self.hidden,
            dropout=row.student_dropout if self.dropout is None else self.dropout,
            learning_rate=row.learning_rate if self.learning_rate is None else self.learning_rate,
            weight_decay=row.weight_decay if self.weight_decay is None else self.weight_decay,
        )


@dataclass(frozen=True, eq=False)
class DistillResult:
    """What distillation gives.

    Attributes:
        student: a torch module, x -> logits; weights of best validation.
        history: one mapping per epoch: step, loss, valid, and band agreement where watched.
        metrics: valid, test (both at best validation), cos_low, cos_high, error_low, error_high, epochs, cpu_seconds;
            ind, tran, prod in the settings that define them.
        config: the resolved configuration.
        run: the run folder, when one was given.
        target: what taught the student; the default method says which candidate validation chose.
    """

    student: Mlp
    history: tuple[Mapping[str, float], ...]
    metrics: dict[str, float]
    config: DistillConfig
    input_class: str = "graph_free"
    run: Run | None = None
    target: str = "teacher"


@dataclass(frozen=True)
class Method:
    """One row of the method table: which teacher terms it adds, and what its student reads at inference.

    `chosen`: its target is picked on validation among spectral responses and a committee (`targets`), labels included.
    """

    low: Callable[[GraphTask], SparseMatrix] | None = None
    high: bool = False
    chosen: bool = False
    input_class: str = "graph_free"


METHODS: dict[str, Method] = {
    "mlp": Method(),
    "glnn": Method(low=node_weights),
    "lfd": Method(low=neighbour_weights),
    "hfd": Method(high=True),
    "ff-g2m": Method(low=neighbour_weights, high=True),
    "structkd": Method(low=node_weights, chosen=True),
}


def distill(
    task: GraphTask,
    teacher: NodeScores | Logits | None,
    config: DistillConfig | None = None,
    seed: int | None = None,
    run: Run | None = None,
) -> DistillResult:
    """Train a student by lambda CE(labels) + (1 - lambda) (teacher terms); the only reported test figure is the one
    at best validation.

    mlp: CE. glnn: KL(t_i || s_i) (Zhang et al., ICLR 2022). lfd, hfd, ff-g2m: Wu et al., AAAI 2023, eq. 8, 10, 11.
    structkd: glnn's term towards a target chosen on validation (see `targets`), the training labels put in.

    Args:
        task: the problem; only `task.observed` reaches training.
        teacher: logits of the observed nodes; for plain mlp they serve the band metrics only and may be None.

    Raises:
        UsageError: an unknown method, or no teacher for a method that needs one.
        DataError: logits of another graph or size.
    """
    config = (config or DistillConfig()).resolved(task)
    seed = task.seed if seed is None else seed
    if config.method not in METHODS:
        raise UsageError(f"method {config.method!r}: expected one of {', '.join(METHODS)}.")
    logits = teacher_logits(task, teacher)
    seen = task.observed
    student = _student(seen, config, seed)
    target, teaching, started = "teacher", logits, time.process_time()
    if METHODS[config.method].chosen and logits is not None:
        best = choose_target(seen, logits, seed)
        target, teaching = best.name, clamped(seen, best.probabilities).clamp_min(1e-12).log()
    preparing = time.process_time() - started
    loss_of = loss_function(seen, teaching, student, config)
    valid_rows = torch.nonzero(seen.valid).flatten()
    valid_x, valid_labels = rows_of(seen.x, valid_rows), seen.y[valid_rows]
    everyone = torch.ones(len(valid_rows), dtype=torch.bool)

    def validate() -> tuple[float, float]:
        out = student(valid_x)
        return metric_of(out, valid_labels, everyone, seen.metric), float(cross_entropy(out, valid_labels))

    watch = _watcher(seen, student, logits, config.watch_every)
    result = fit(student, loss_of, validate, _fit_config(config), seed, watch)
    metrics = _metrics(task, student, logits, result)
    metrics["cpu_seconds"] += preparing
    if run is not None:
        for line in result.history:
            run.log(**line)
        run.finish(metrics)
    return DistillResult(student, result.history, metrics, config, METHODS[config.method].input_class, run, target)


def teacher_logits(task: GraphTask, teacher: NodeScores | Logits | None) -> Tensor | None:
    """The teacher's logits of the observed nodes as a tensor, checked against the graph."""
    if teacher is None:
        return None
    if isinstance(teacher, Tensor):
        expected = (task.observed.num_nodes, task.classes)
        if tuple(teacher.shape) != expected:
            raise UsageError(f"teacher logits of shape {tuple(teacher.shape)}; expected {expected} (observed nodes).")
        return teacher.detach().to(torch.float32)
    check_scores(teacher, task)
    return torch.from_numpy(np.array(teacher.logits, dtype=np.float32))


def loss_function(
    seen: GraphTask, logits: Tensor | None, student: Mlp, config: DistillConfig
) -> Callable[[int], Tensor]:
    """epoch -> loss of a method; teacher sides are prepared here, once."""
    method = METHODS[config.method]
    train_rows = torch.nonzero(seen.train).flatten()
    labels = seen.y[train_rows]
    if method.low is None and not method.high:
        train_x = rows_of(seen.x, train_rows)  # labels alone need no other row
        return lambda _: cross_entropy(student(train_x), labels)
    if logits is None:
        raise UsageError(f"method {config.method} needs teacher scores; only mlp does without.")
    terms = _teacher_terms(seen, logits, method, config)
    weight = given(config.label_weight)

    def loss_of(_: int) -> Tensor:
        out = student(seen.x)
        loss = (1 - weight) * torch.stack([term(out) for term in terms]).sum()
        return loss + weight * cross_entropy(out[train_rows], labels) if weight else loss

    return loss_of


def _teacher_terms(
    seen: GraphTask, logits: Tensor, method: Method, config: DistillConfig
) -> list[Callable[[Tensor], Tensor]]:
    terms: list[Callable[[Tensor], Tensor]] = []
    if method.low is not None:
        low: SoftTargets = soft_targets(logits, method.low(seen))
        terms.append(lambda out: low_frequency(out, low))
    if method.high:
        high = difference_targets(logits, seen.edge_index, given(config.temperature))
        terms.append(lambda out: high_frequency(out, high))
    return terms


def rows_of(x: Features, rows: Tensor) -> Features:
    """Some rows of dense or sparse features."""
    return x.rows(rows) if isinstance(x, SparseMatrix) else x[rows]


@torch.no_grad()
def predict(student: Mlp, x: Features) -> Logits:
    """The student's logits in eval mode."""
    student.eval()
    out: Tensor = student(x)
    return out


def _student(seen: GraphTask, config: DistillConfig, seed: int) -> Mlp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mlp(seen.num_features, given(config.hidden), seen.classes, given(config.layers), given(config.dropout))


def _watcher(
    seen: GraphTask, student: Mlp, logits: Tensor | None, every: int
) -> Callable[[int], dict[str, float]] | None:
    if not every or logits is None:
        return None
    wanted = logits.softmax(dim=1)

    def watch(epoch: int) -> dict[str, float]:
        if epoch != 1 and epoch % every:
            return {}
        return band_agreement(seen, student(seen.x).softmax(dim=1), wanted)

    return watch


def _metrics(task: GraphTask, student: Mlp, logits: Tensor | None, result: Fit) -> dict[str, float]:
    mine = predict(student, task.x)
    out = {"valid": result.valid, **report(task, mine)}
    if logits is not None:
        observed = mine[task.observed_rows].softmax(dim=1)
        out |= band_agreement(task.observed, observed, logits.softmax(dim=1))
    return out | {"epochs": float(result.epochs), "cpu_seconds": result.cpu_seconds}


def _fit_config(config: DistillConfig) -> FitConfig:
    return FitConfig(given(config.learning_rate), given(config.weight_decay), config.epochs, config.patience)


def config_fields(config: DistillConfig) -> dict[str, Any]:
    """The fields as plain values, for fingerprints."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
