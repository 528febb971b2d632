"""TINED: a student of the teacher's own steps, each changing the Dirichlet energy as the teacher's step does.

Jiao et al., "TINED: GNNs-to-MLPs by Teacher Injection and Dirichlet Energy Distillation", ICML 2025.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask, chunks, rows_of
from structkd.graph.losses import node_divergence
from structkd.graph.methods.lesson import Lesson, Teaching, in_turn
from structkd.graph.models.networks import Mlp
from structkd.graph.models.stages import Stage, stages
from structkd.graph.models.students import activations, mlp_of_widths
from structkd.graph.published import given

BATCH = 512
"Nodes per optimiser step of the divergence, the published batch."


def injected_steps(lesson: Lesson) -> Teaching:
    """lambda CE, (1 - lambda) mean KL(t_i || s_i), and rate sum_l (log R_l(student) - log R_l(teacher))^2, in turn.

    R_l is the ratio of Dirichlet energies after and before step l. Transforms start from the teacher's weights and
    learn `copied_rate` times as fast; a layer stands for each propagation and starts as identity.

    An epoch is a step on the labels, one on each batch of nodes, and one on the energies, and the best epoch is that
    of lowest validation cross-entropy, both as released. One step on their sum is not the same method: the ratios
    start far apart, and weighted by ten they drown the rest (64 % in place of 71 % on CiteSeer).
    """
    seen, config = lesson.seen, lesson.config
    steps = stages(given(lesson.teacher), seen)
    student = student_of(steps, given(config.dropout))
    turns = [*_taught(lesson, student), _energies(lesson, student, steps)]
    return Teaching(
        student, in_turn(lambda: turns),
        groups=_groups(student, steps, given(config.learning_rate), config.option("copied_rate")),
        steps=len(turns), answers=one_hot(seen.y.clamp(min=0), seen.classes).to(torch.float32),
    )  # fmt: skip


def _taught(lesson: Lesson, student: Mlp) -> list[Callable[[], Tensor]]:
    """A step on the labels, when they weigh anything, and one on the teacher's answers for each batch of nodes."""
    seen, weight, soft = lesson.seen, given(lesson.config.label_weight), given(lesson.logits).softmax(dim=1)
    rows = lesson.train_rows
    x, labels = rows_of(seen.x, rows), seen.y[rows]
    turns = [lambda: weight * cross_entropy(student(x), labels)] if weight else []
    if weight < 1:
        for part in chunks(seen.num_nodes, BATCH):
            batch = torch.arange(part.start, part.stop)
            turns.append(partial(_divergence, student, rows_of(seen.x, batch), soft[batch], 1 - weight))
    return turns


def _divergence(student: Mlp, x: Features, soft: Tensor, weight: float) -> Tensor:
    return weight * node_divergence(student(x), soft)


def _energies(lesson: Lesson, student: Mlp, steps: Sequence[Stage]) -> Callable[[], Tensor]:
    """A step on the ratios of energies over the whole observed graph."""
    x, energy, rate = lesson.seen.x, dirichlet_energy(lesson.seen), lesson.config.option("rate")
    wanted = [log_ratio(energy(step.before), energy(step.after)) for step in steps]
    start = energy(x)

    def turn() -> Tensor:
        outputs, read = activations(student, x)
        before = [start, *map(energy, read[1:])]
        return rate * ratio_gap(list(zip(before, map(energy, outputs), strict=True)), wanted)

    return turn


def dirichlet_energy(seen: GraphTask) -> Callable[[Features], Tensor]:
    """x -> 1/N sum over directed edges of ||x_i / |x_i| - x_j / |x_j|||^2, without a tensor of the edges' size.

    For symmetric A it equals 2/N sum_i (d_i |u_i|^2 - <u_i, (A u)_i>) with u the rows of unit length, whose lengths
    count as constants in the gradient. A row of zeros stays zero.
    """
    degrees, adjacency = seen.degrees.to(torch.float32), seen.adjacency

    def energy(x: Features) -> Tensor:
        dense = x.dense() if isinstance(x, SparseMatrix) else x
        lengths = dense.detach().norm(dim=1, keepdim=True)
        unit = dense / torch.where(lengths == 0, torch.ones_like(lengths), lengths)
        matrix = adjacency.with_values(adjacency.values.to(unit.dtype))
        around = degrees.to(unit.dtype) * unit.square().sum(dim=1) - (unit * matrix.product(unit)).sum(dim=1)
        return 2 * around.sum() / len(unit)

    return energy


def ratio_gap(
    energies: Sequence[tuple[Float[Tensor, ""], Float[Tensor, ""]]], wanted: Sequence[Float[Tensor, ""] | None]
) -> Float[Tensor, ""]:
    """sum over steps of (log R_student - log R_teacher)^2, R = after / before; a step without energy does not count."""
    total = (energies[-1][1] * 0).sum()
    for (before, after), target in zip(energies, wanted, strict=True):
        mine = log_ratio(before, after)
        if mine is not None and target is not None:
            total = total + (mine - target).square()
    return total


def log_ratio(before: Float[Tensor, ""], after: Float[Tensor, ""]) -> Float[Tensor, ""] | None:
    """log(after / before); None where one of them is 0."""
    return None if before.item() <= 0 or after.item() <= 0 else torch.log(after) - torch.log(before)


def student_of(steps: Sequence[Stage], dropout: float) -> Mlp:
    """An MLP with a layer for every step: transforms copied, propagations as identity."""
    student = mlp_of_widths([int(steps[0].before.shape[1]), *(int(step.after.shape[1]) for step in steps)], dropout)
    with torch.no_grad():
        for layer, step in zip(student.layers, steps, strict=True):
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            assert isinstance(bias, Tensor)
            weight.copy_(torch.eye(*weight.shape) if step.weight is None else step.weight)
            bias.copy_(torch.zeros_like(bias) if step.bias is None else step.bias)
    return student


def _groups(student: Mlp, steps: Sequence[Stage], learning_rate: float, ratio: float) -> list[Mapping[str, Any]]:
    copied: list[Tensor] = []
    fresh: list[Tensor] = []
    for layer, step in zip(student.layers, steps, strict=True):
        (copied if step.kind == "transform" else fresh).extend(layer.parameters())
    return [{"params": copied, "lr": learning_rate * ratio}, {"params": fresh, "lr": learning_rate}]
