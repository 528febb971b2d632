"""Distillation losses over a graph. Teacher sides are computed once; each loss is then a pure function of the student.

Notation: t = softmax(teacher), s = softmax(student), E+ directed edges with self-loops, E- without.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax

from structkd.errors import DataError, UsageError
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask
from structkd.graph.kernels import _edges

KEEP_BYTES = 1 << 28
"Above this many bytes the teacher's side of the difference loss is recomputed per edge instead of kept."


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """Pre-aggregated teacher: sum_ij w_ij KL(t_j || s_i) = constant - sum_i <aggregated_i, log s_i>."""

    aggregated: Float[Tensor, "nodes classes"]
    constant: float
    temperature: float = 1.0


def soft_targets(
    teacher_logits: Float[Tensor, "nodes classes"], weights: SparseMatrix, temperature: float = 1.0
) -> SoftTargets:
    """Targets W t of any weighted edge divergence; W is [student rows, teacher rows].

    W = I/N is GLNN; (A + I)/|E+| is FF-G2M's low-frequency term (Wu et al., AAAI 2023, eq. 8); (masked A + I) over
    its number of entries is KRD. The constant, sum_j (column sum of W)_j <t_j, log t_j>, keeps values equal to the
    edge-wise form.
    """
    log_teacher = log_softmax(teacher_logits.detach() / temperature, dim=1)
    teacher = log_teacher.exp()
    wide = weights.with_values(weights.values.to(teacher.dtype))
    column_sums = torch.zeros(weights.num_columns, dtype=torch.float64)
    column_sums.index_add_(0, weights.columns, weights.values.to(torch.float64))
    negative_entropy = (teacher * log_teacher).sum(dim=1).to(torch.float64)
    return SoftTargets(wide.product(teacher), float((column_sums * negative_entropy).sum()), temperature)


def low_frequency(student_logits: Float[Tensor, "nodes classes"], targets: SoftTargets) -> Float[Tensor, ""]:
    """sum_ij w_ij KL(t_j || s_i) in its exact node form: O(nodes * classes), no edge is touched.

    With W = (A + I)/|E+| this is FF-G2M's L_LFD (Wu et al., AAAI 2023, eq. 8, at temperature 1 as released).
    """
    log_student = log_softmax(student_logits / targets.temperature, dim=1)
    return targets.constant - (targets.aggregated * log_student).sum()


def node_weights(task: GraphTask) -> SparseMatrix:
    """I / N: every student node looks at its own teacher row (GLNN)."""
    nodes = task.num_nodes
    rows = torch.arange(nodes + 1)
    return SparseMatrix(rows, torch.arange(nodes), torch.full((nodes,), 1.0 / nodes, dtype=torch.float64), nodes)


def neighbour_weights(task: GraphTask, keep: Tensor | None = None) -> SparseMatrix:
    """(A + I) / |E+|; with `keep` (bool per directed edge) only those edges, self-loops always (KRD)."""
    edges = task.edge_index if keep is None else task.edge_index[:, keep]
    loops = torch.arange(task.num_nodes)
    rows, columns = torch.cat([edges[0], loops]), torch.cat([edges[1], loops])
    order = torch.argsort(rows * task.num_nodes + columns)
    starts = torch.zeros(task.num_nodes + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=task.num_nodes), 0, out=starts[1:])
    values = torch.full((len(rows),), 1.0 / max(1, len(rows)), dtype=torch.float64)
    return SparseMatrix(starts, columns[order], values, task.num_nodes)


@dataclass(frozen=True, eq=False)
class DifferenceTargets:
    """Teacher side of the high-frequency term over half edges i < j, in compressed rows.

    Attributes:
        starts, columns: the half edges.
        teacher: the teacher's logits.
        soft: softmax(|h_i - h_j| / temperature) per half edge, None when it would be too large to keep.
        entropy: sum over half edges of <p, log p>.
    """

    starts: Int[Tensor, " nodes_plus_one"]
    columns: Int[Tensor, " half"]
    teacher: Float[Tensor, "nodes classes"]
    soft: Float[Tensor, "half classes"] | None
    entropy: float
    temperature: float

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Row i and column j of each half edge."""
        nodes = len(self.starts) - 1
        return torch.repeat_interleave(torch.arange(nodes), self.starts.diff()), self.columns


def difference_targets(
    teacher_logits: Float[Tensor, "nodes classes"],
    edge_index: Int[Tensor, "2 edges"],
    temperature: float = 1.0,
    keep_bytes: int = KEEP_BYTES,
) -> DifferenceTargets:
    """Prepare `high_frequency`: half the symmetric edges, and the teacher's side when it fits in `keep_bytes`.

    Raises:
        UsageError: the temperature is not positive.
        DataError: edge_index is not symmetric without self-loops.
    """
    if not temperature > 0:
        raise UsageError(f"temperature {temperature}: expected a positive number.")
    teacher = teacher_logits.detach().contiguous()
    half = edge_index[:, edge_index[0] < edge_index[1]]
    if 2 * half.shape[1] != edge_index.shape[1]:
        raise DataError(
            f"{edge_index.shape[1]} directed edges, {half.shape[1]} of them upwards: expected both directions of each "
            "edge and no self-loops. Use GraphTask.create, which cleans edges."
        )
    starts = torch.zeros(len(teacher) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(half[0], minlength=len(teacher)), 0, out=starts[1:])
    columns = half[1][torch.argsort(half[0], stable=True)].contiguous()
    size = half.shape[1] * teacher.shape[1] * teacher.element_size()
    if size > keep_bytes or teacher.is_cuda:
        return DifferenceTargets(starts, columns, teacher, None, 0.0, temperature)
    soft = torch.empty(half.shape[1], teacher.shape[1], dtype=teacher.dtype)
    entropy = _edges.difference_targets(
        starts.numpy(), columns.numpy(), teacher.numpy(), 1.0 / temperature, soft.numpy()
    )
    return DifferenceTargets(starts, columns, teacher, soft, float(entropy), temperature)


def high_frequency(student_logits: Float[Tensor, "nodes classes"], targets: DifferenceTargets) -> Float[Tensor, ""]:
    """FF-G2M's L_HFD: mean over edges of KL(softmax(|h_i - h_j|/tau) || softmax(|z_i - z_j|/tau)).

    Wu et al., AAAI 2023, eq. 10, as released: raw logits, no tau^2, gradient into both ends. Symmetric in (i, j), so
    half the edges give the same value. On CPU a fused kernel computes value and gradient in one pass over edges and
    keeps no [edges, classes] tensor; elsewhere `high_frequency_torch` runs. No edges: 0 with zero gradient.
    """
    if not len(targets.columns):
        return (student_logits * 0).sum()
    if student_logits.device.type != "cpu":
        return high_frequency_torch(student_logits, targets)
    value: Tensor = _Difference.apply(student_logits, targets)  # type: ignore[no-untyped-call]
    return value


def high_frequency_torch(
    student_logits: Float[Tensor, "nodes classes"], targets: DifferenceTargets, chunk: int = 1 << 20
) -> Float[Tensor, ""]:
    """The torch twin of the kernel, any device: chunks of half edges, recomputed in the backward pass."""
    rows, columns = (part.to(student_logits.device) for part in targets.pairs)
    teacher = targets.teacher.to(student_logits)
    total = student_logits.new_zeros(())
    for start in range(0, len(columns), chunk):
        part = slice(start, start + chunk)
        total = total + torch.utils.checkpoint.checkpoint(
            _difference_chunk, student_logits, teacher, rows[part], columns[part], targets.temperature,
            use_reentrant=False,
        )  # fmt: skip
    return total / max(1, len(columns))


def _difference_chunk(student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    log_student = log_softmax((student[rows] - student[columns]).abs() / temperature, dim=1)
    log_teacher = log_softmax((teacher[rows] - teacher[columns]).abs() / temperature, dim=1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum()


class _Difference(torch.autograd.Function):
    """The fused kernel: the gradient is ready with the value and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: DifferenceTargets) -> Tensor:
        logits = student.detach().contiguous()
        gradient = torch.zeros_like(logits)
        sharpness = logits.numpy().dtype.type(1.0 / targets.temperature)
        edges = targets.starts.numpy(), targets.columns.numpy()
        if targets.soft is not None and targets.soft.dtype == logits.dtype:
            total = targets.entropy + _edges.difference_divergence(
                *edges, targets.soft.numpy(), logits.numpy(), sharpness, gradient.numpy()
            )
        else:
            teacher = targets.teacher.to(logits.dtype).numpy()
            total = _edges.difference_divergence_recomputed(
                *edges, teacher, logits.numpy(), sharpness, gradient.numpy()
            )
        count = len(targets.columns)
        ctx.save_for_backward(gradient.div_(count))
        return logits.new_tensor(total / count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None


def node_divergence(
    student_logits: Float[Tensor, "nodes classes"], soft: Float[Tensor, "nodes classes"]
) -> Float[Tensor, ""]:
    """Mean over nodes of KL(soft || softmax(student))."""
    parts: Tensor = torch.special.xlogy(soft, soft) - soft * student_logits.log_softmax(dim=1)
    return parts.sum(dim=1).mean()


def band_matching(
    student_logits: Float[Tensor, "nodes classes"], teacher_band: Float[Tensor, "nodes classes"], smoother: SparseMatrix
) -> Float[Tensor, ""]:
    """||(I - S) s - (I - S) t||_F^2 / ||(I - S) t||_F^2 on probabilities: what the high-band metric measures, directly.

    `teacher_band` is (I - S) t, computed once.
    """
    student = student_logits.softmax(dim=1)
    band = student - smoother.product(student)
    size = max(float(teacher_band.square().sum()), float(np.finfo(np.float32).tiny))
    return (band - teacher_band).square().sum() / size
