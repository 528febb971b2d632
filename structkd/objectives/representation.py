"""Objectives on embeddings: one row per text or node. Student and teacher widths may differ where only relations count.

Every function: `name(student [rows, dims], teacher [rows, dims], mask [rows], weight [rows], reduction, *, ...)`, a
scalar or [rows] out. Masked rows take no part, neither as rows nor as partners of others.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from structkd.errors import UsageError
from structkd.objectives._masks import (
    Reduction,
    Value,
    check_temperature,
    log_softmax,
    mean_items,
    probabilities,
    reduced,
    square,
    zeroed,
)

Rows = Float[Tensor, " rows"] | None


def feature_mse(
    student: Float[Tensor, "rows dims"],
    teacher: Float[Tensor, "rows dims"],
    mask: Bool[Tensor, " rows"] | None = None,
    weight: Rows = None,
    reduction: Reduction = "mean",
) -> Value:
    """Mean over dimensions of (s - t)^2 (FitNets, arXiv 1412.6550, equation 3; the mean in place of half the sum).

    Raises:
        UsageError: shapes differ.
    """
    s, t, valid = _rows(student, teacher, mask, same_width=True)
    return reduced(square(s - t).mean(-1), valid, weight, reduction)


def cosine(
    student: Float[Tensor, "rows dims"],
    teacher: Float[Tensor, "rows dims"],
    mask: Bool[Tensor, " rows"] | None = None,
    weight: Rows = None,
    reduction: Reduction = "mean",
) -> Value:
    """1 - cos(s, t) of each row; a zero row has cosine 0.

    Raises:
        UsageError: shapes differ.
    """
    s, t, valid = _rows(student, teacher, mask, same_width=True)
    return reduced(1 - (_unit(s) * _unit(t)).sum(-1), valid, weight, reduction)


def similarity_preserving(
    student: Float[Tensor, "rows student_dims"],
    teacher: Float[Tensor, "rows teacher_dims"],
    mask: Bool[Tensor, " rows"] | None = None,
    weight: Rows = None,
    reduction: Reduction = "mean",
) -> Value:
    """Difference of the row-normalised Gram matrices M = rownorm(F F^T): mean over rows i of |M_S[i] - M_T[i]|^2 / B.

    With reduction "mean" this is |M_S - M_T|_F^2 / B^2 (Tung and Mori 2019, arXiv 1907.09682, equation 4; DisWOT's
    Gram term). Invariant to rotation and scale of either side.

    Raises:
        UsageError: the numbers of rows differ.
    """
    s, t, valid = _rows(student, teacher, mask, same_width=False)
    with torch.autocast(s.device.type, enabled=False):
        difference = _unit(_gram(s)) - _unit(_gram(t))
    return reduced(difference.square().sum(-1) / valid.sum().clamp(min=1), valid, weight, reduction)


def affinity_kl(
    student: Float[Tensor, "rows student_dims"],
    teacher: Float[Tensor, "rows teacher_dims"],
    mask: Bool[Tensor, " rows"] | None = None,
    weight: Rows = None,
    reduction: Reduction = "mean",
    *,
    neighbours: Int[Tensor, "rows neighbours"],
    sigma: float = 1.0,
) -> Value:
    """KL from the teacher's to the student's affinities on fixed neighbour lists (arXiv 2306.12442, local term).

    A_ij = exp(-|F_i - F_j|^2 / (2 sigma)); per row KL(softmax_j A^T || softmax_j A^S), j over the row's neighbours
    (graph edges, or the teacher's nearest rows). The direction is ours: the paper does not state one.

    Args:
        student: embeddings of the student.
        teacher: embeddings of the teacher.
        neighbours: rows of each row's neighbours; -1 pads.
        mask: True at valid rows.
        weight: a factor per row.
        reduction: "mean" over rows that count, "sum", or "none".
        sigma: width of the kernel.

    Raises:
        UsageError: the numbers of rows differ, `sigma` is not positive.
    """
    if not sigma > 0:
        raise UsageError(f"sigma {sigma}: expected a number above 0.")
    s, t, valid = _rows(student, teacher, mask, same_width=False)
    known = (neighbours >= 0) & valid[:, None]
    partner = neighbours.clamp(min=0)
    known = known & valid[partner]
    log_p = log_softmax(zeroed(_affinity(t, partner, sigma), known), known)
    log_q = log_softmax(zeroed(_affinity(s, partner, sigma), known), known)
    values = (probabilities(log_p, known) * (log_p - log_q)).sum(-1)
    return reduced(values, known.any(-1), weight, reduction)


def mutual_information(
    critic: Float[Tensor, "rows rows"],
    *,
    alpha: float = 1.0,
    baseline: Float[Tensor, " rows"] | None = None,
    distinct: Bool[Tensor, "rows rows"] | None = None,
    weight: Rows = None,
    reduction: Reduction = "mean",
) -> Value:
    """Minus the MI-alpha lower bound on the mutual information of student and teacher (Distiller, arXiv 2109.11105).

    With the critic s_ij = f(S_i, T_j), the log-baseline b_i and
    a_ij = log(alpha mean_{k != j} e^{s_ik} + (1 - alpha) e^{b_i}),
    I = 1 + mean_{i != j} (s_ii - a_ij) - mean_{i != j} exp(s_ij - a_ii).
    alpha=0 is TUBA (b = 1: NWJ), alpha=1 leave-one-out InfoNCE. alpha lies in [0, 1]; the reference code takes its
    logit instead. The pairs (i, j) that `distinct` excludes (duplicates) are no negatives.

    Raises:
        UsageError: the critic is not square, `alpha` outside [0, 1], no baseline where alpha < 1.
    """
    size = critic.shape[0]
    if critic.ndim != 2 or critic.shape != (size, size):
        raise UsageError(f"critic has shape {list(critic.shape)}; expected [rows, rows], the pairs on the diagonal.")
    if not 0 <= alpha <= 1 or (alpha < 1 and baseline is None):
        raise UsageError(f"alpha {alpha}: expected a number in [0, 1], with a baseline when it is below 1.")
    scores = critic.to(torch.promote_types(critic.dtype, torch.float32))
    negative = ~torch.eye(size, dtype=torch.bool, device=critic.device)
    negative = negative if distinct is None else negative & distinct
    log_mean = _leave_one_out(scores, negative)
    if alpha < 1 and baseline is not None:
        floor = baseline.to(scores.dtype)[:, None].expand_as(scores)
        shares = scores.new_tensor([alpha, 1 - alpha]).log()
        log_mean = floor if alpha == 0 else torch.logaddexp(log_mean + shares[0], floor + shares[1])
    own = scores.diagonal()[:, None]
    joint = mean_items(own - log_mean, negative)
    marginal = mean_items(zeroed(scores - log_mean.diagonal()[:, None], negative).exp(), negative)
    return reduced(marginal - joint - 1, negative.any(-1), weight, reduction)


def infonce(
    student: Float[Tensor, "rows dims"],
    teacher: Float[Tensor, "rows dims"],
    mask: Bool[Tensor, " rows"] | None = None,
    weight: Rows = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 0.05,
) -> Value:
    """InfoNCE (arXiv 1807.03748, equation 4): cross-entropy of cos(S_i, T_j) / temperature with the row's own j = i.

    Raises:
        UsageError: shapes differ, the temperature is not positive.
    """
    check_temperature(temperature)
    s, t, valid = _rows(student, teacher, mask, same_width=True)
    with torch.autocast(s.device.type, enabled=False):
        scores = _unit(s) @ _unit(t).T / temperature
    log_q = log_softmax(scores, valid[:, None] & valid[None, :])
    return reduced(-log_q.diagonal(), valid, weight, reduction)


def _rows(
    student: Tensor, teacher: Tensor, mask: Tensor | None, same_width: bool
) -> tuple[Tensor, Tensor, Bool[Tensor, " rows"]]:
    """Checked embeddings, the teacher's detached, masked rows overwritten by 0."""
    fits = student.shape == teacher.shape if same_width else student.shape[:1] == teacher.shape[:1]
    if not fits or student.ndim != 2 or teacher.ndim != 2:
        expected = "equal shapes [rows, dims]" if same_width else "[rows, dims] with equally many rows"
        raise UsageError(f"student is {list(student.shape)}, teacher {list(teacher.shape)}; expected {expected}.")
    valid = torch.ones_like(student[:, 0], dtype=torch.bool) if mask is None else mask
    if valid.shape != student.shape[:1] or valid.dtype != torch.bool:
        raise UsageError(f"mask is {valid.dtype} {list(valid.shape)}; expected torch.bool [{len(student)}].")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    open_rows = valid[:, None]
    return zeroed(student.to(dtype), open_rows), zeroed(teacher.detach().to(dtype), open_rows), valid


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero, with zero gradient. Scales first, so that 1e30 does not overflow."""
    largest = rows.detach().abs().amax(-1, keepdim=True)
    empty = largest == 0
    scaled = rows / torch.where(empty, 1, largest)
    squares = scaled.square().sum(-1, keepdim=True)
    return torch.where(empty, 0, scaled / torch.where(empty, 1, squares).sqrt())


def _gram(rows: Tensor) -> Float[Tensor, "rows rows"]:
    """F F^T up to a constant factor, which the row norm removes: products of 1e30 would overflow."""
    largest = rows.detach().abs().max().clamp(min=torch.finfo(rows.dtype).tiny) if rows.numel() else 1.0
    scaled = rows / largest
    return scaled @ scaled.T


def _affinity(rows: Tensor, partner: Tensor, sigma: float) -> Float[Tensor, "rows neighbours"]:
    """Gaussian kernel of each row with its neighbours."""
    squares = square(rows[:, None, :] - rows[partner]).sum(-1)
    return torch.exp(-squares / (2 * sigma))


def _leave_one_out(
    scores: Float[Tensor, "rows rows"], negative: Bool[Tensor, "rows rows"]
) -> Float[Tensor, "rows rows"]:
    """log mean over k != j of exp(s_ik), the own pair included where it is not j; excluded duplicates left out.

    What stands before j and what stands after it, added: O(rows^2), and without the cancellation of sum minus own.
    """
    use = negative | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    spread = scores.masked_fill(~use, -1e30)
    nothing = torch.full_like(spread[:, :1], -1e30)
    before = torch.cat([nothing, torch.logcumsumexp(spread, dim=-1)[:, :-1]], dim=-1)
    after = torch.cat([torch.logcumsumexp(spread.flip(-1), dim=-1).flip(-1)[:, 1:], nothing], dim=-1)
    count = use.sum(-1, keepdim=True) - use.to(torch.int64)
    return torch.logaddexp(before, after) - count.clamp(min=1).to(scores.dtype).log()
