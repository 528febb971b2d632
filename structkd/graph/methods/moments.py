"""G2MLP: neighbourhoods of student and teacher agree in mean and spread, the more so by where the graph is curved.

Arxiv 2610.10520. No code is public: weights and the form of the curvature are readings of ours, said below.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.errors import UsageError
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask
from structkd.graph.kernels import _transport
from structkd.graph.losses import low_frequency, node_weights, soft_targets
from structkd.graph.methods.lesson import Lesson, Teaching
from structkd.graph.models.stages import hidden_layer
from structkd.graph.models.students import activations
from structkd.graph.published import given
from structkd.graph.spectral import propagation

SMALLEST = 1e-8
"Added to a variance before its root, whose slope at nought has no end."


def matched_neighbourhoods(lesson: Lesson) -> Teaching:
    """GLNN's term + weight mean_i (e^kappa_i gap_i(hidden) + e^-kappa_i gap_i(logits)).

    gap_i = ||m_t - m_s||^2 / width + ||sqrt v_t - sqrt v_s||^2 / width over node i and its neighbours; the width is
    ours, so that one weight serves narrow and wide layers.
    """
    seen, config = lesson.seen, lesson.config
    student, logits = lesson.student(), given(lesson.logits)
    hidden = hidden_layer(given(lesson.teacher), seen)
    if hidden.shape[1] != config.hidden or len(student.layers) < 2:
        raise UsageError(
            f"g2mlp compares hidden layers of one width; the teacher's has {hidden.shape[1]}, the student's "
            f"{config.hidden}. Use --hidden {hidden.shape[1]}, and two layers or more."
        )
    average, bend = propagation(seen, 1.0, "row"), curvature(seen)
    wanted = [moments(average, hidden), moments(average, logits)]
    weights = [torch.exp(bend), torch.exp(-bend)]
    targets = soft_targets(logits, node_weights(seen))
    rows, label_weight, share = lesson.train_rows, given(config.label_weight), config.option("moments")

    def loss_of(_: int) -> Tensor:
        outputs, read = activations(student, seen.x)
        taught = low_frequency(outputs[-1], targets)
        inner = read[-1]
        assert isinstance(inner, Tensor)
        for mine, theirs, weight in zip((inner, outputs[-1]), wanted, weights, strict=True):
            taught = taught + share * moment_gap(moments(average, mine), theirs, weight)
        return label_weight * cross_entropy(outputs[-1][rows], seen.y[rows]) + (1 - label_weight) * taught

    return Teaching(student, loss_of)


def moments(
    average: SparseMatrix, signal: Float[Tensor, "nodes width"]
) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "nodes width"]]:
    """Mean and standard deviation of each feature over a node and its neighbours."""
    matrix = average.with_values(average.values.to(signal.dtype))
    mean = matrix.product(signal)
    variance = (matrix.product(signal.square()) - mean.square()).clamp_min(0)
    return mean, torch.sqrt(variance + SMALLEST)


def moment_gap(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], weight: Float[Tensor, " nodes"]
) -> Float[Tensor, ""]:
    """Mean over nodes of weight_i (squared gap of means + squared gap of deviations) / width."""
    gaps = sum((mine - theirs).square().mean(dim=1) for mine, theirs in zip(student, teacher, strict=True))
    assert isinstance(gaps, Tensor)
    return (weight * gaps).mean()


def curvature(seen: GraphTask) -> Float[Tensor, " nodes"]:
    """Mean Ollivier-Ricci curvature of a node's edges, 0 for an isolated node; kept with the task.

    kappa(i, j) = 1 - W1(m_i, m_j) (Ollivier, J. Funct. Anal. 2009), m_i uniform over node and neighbours, distances
    in steps; exact transport per edge.
    """
    found = seen.__dict__.get("_curvature")
    if found is None:
        starts, columns = seen.adjacency.starts.numpy(), seen.adjacency.columns.numpy()
        edges = np.zeros(len(columns))
        _transport.edge_curvature(starts, columns, 1, edges)
        sums = np.bincount(np.repeat(np.arange(len(starts) - 1), np.diff(starts)), edges, len(starts) - 1)
        found = torch.from_numpy(sums / np.maximum(np.diff(starts), 1)).to(torch.float32)
        seen.__dict__["_curvature"] = found  # a frozen task never changes, so neither does this
    return found
