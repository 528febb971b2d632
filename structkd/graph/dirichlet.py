"""TINED: a student of the teacher's own steps, each changing the Dirichlet energy as the teacher's step does.

Jiao et al., "TINED: GNNs-to-MLPs by Teacher Injection and Dirichlet Energy Distillation", ICML 2025.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.graph.data import Features, GraphTask
from structkd.graph.lesson import Lesson, Teaching
from structkd.graph.losses import low_frequency, node_weights, soft_targets
from structkd.graph.models import Mlp
from structkd.graph.published import given
from structkd.graph.sparse import SparseMatrix
from structkd.graph.stages import Stage, stages
from structkd.graph.students import activations, mlp_of_widths


def injected_steps(lesson: Lesson) -> Teaching:
    """lambda CE + (1 - lambda) mean_i KL(t_i || s_i) + rate sum_l (log R_l(student) - log R_l(teacher))^2.

    R_l is the ratio of Dirichlet energies after and before step l. Transforms start from the teacher's weights and
    learn `copied_rate` times as fast; a layer stands for each propagation and starts as identity.
    """
    seen, option, config = lesson.seen, lesson.config.option, lesson.config
    steps = stages(given(lesson.teacher), seen)
    student = student_of(steps, given(config.dropout))
    energy = dirichlet_energy(seen)
    wanted = [_log_ratio(energy, step.before, step.after) for step in steps]
    targets = soft_targets(given(lesson.logits), node_weights(seen))
    rows, label_weight, rate = lesson.train_rows, given(config.label_weight), option("rate")
    labels = seen.y[rows]

    def loss_of(_: int) -> Tensor:
        outputs, read = activations(student, seen.x)
        loss = label_weight * cross_entropy(outputs[-1][rows], labels)
        loss = loss + (1 - label_weight) * low_frequency(outputs[-1], targets)
        return loss + rate * ratio_gap(energy, list(zip(read, outputs, strict=True)), wanted)

    return Teaching(
        student, loss_of, groups=_groups(student, steps, given(config.learning_rate), option("copied_rate"))
    )


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
    energy: Callable[[Features], Tensor],
    steps: Sequence[tuple[Features, Tensor]],
    wanted: Sequence[Float[Tensor, ""] | None],
) -> Float[Tensor, ""]:
    """sum over steps of (log R_student - log R_teacher)^2; a step with no energy on one side does not count."""
    total = steps[-1][1].new_zeros(())
    for (before, after), target in zip(steps, wanted, strict=True):
        mine = _log_ratio(energy, before, after)
        if mine is not None and target is not None:
            total = total + (mine - target).square()
    return total


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


def _log_ratio(energy: Callable[[Features], Tensor], before: Features, after: Features) -> Tensor | None:
    old, new = energy(before), energy(after)
    return None if old.item() <= 0 or new.item() <= 0 else torch.log(new) - torch.log(old)


def _groups(student: Mlp, steps: Sequence[Stage], learning_rate: float, ratio: float) -> list[Mapping[str, Any]]:
    copied: list[Tensor] = []
    fresh: list[Tensor] = []
    for layer, step in zip(student.layers, steps, strict=True):
        (copied if step.kind == "transform" else fresh).extend(layer.parameters())
    return [{"params": copied, "lr": learning_rate * ratio}, {"params": fresh, "lr": learning_rate}]
