"""Several teachers -> one target: [teachers, lists, items] -> [lists, items]; masked items become 0.

Teachers differ in scale: standardise (`standardised_mean`) or use ranks, unless they are runs of one model.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from structkd.errors import UsageError
from structkd.objectives._masks import log_softmax, mean_ranks, standardised, valid_of, zeroed


def mean(
    teachers: Float[Tensor, "teachers lists items"], *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """Mean of the raw scores (Hofstaetter et al. 2020: T2, three models of one kind).

    Raises:
        UsageError: the stack is not [teachers, lists, items], or holds no teacher.
    """
    scores, valid = _stack(teachers, mask)
    return zeroed((scores / len(scores)).sum(0), valid)


def weighted_mean(
    teachers: Float[Tensor, "teachers lists items"],
    weights: Float[Tensor, " teachers"] | Float[Tensor, "teachers lists"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
) -> Float[Tensor, "lists items"]:
    """Mean with one weight per teacher, or per teacher and list (`confidence_weights`); normalised to sum 1.

    Raises:
        UsageError: the shapes do not fit, a weight is negative, weights of a list sum to 0.
    """
    scores, valid = _stack(teachers, mask)
    shares = weights.detach().to(scores.dtype)
    if shares.shape not in (scores.shape[:1], scores.shape[:2]):
        raise UsageError(
            f"weights have shape {list(shares.shape)}; expected [{len(scores)}] or {list(scores.shape[:2])}."
        )
    if bool((shares < 0).any()) or bool((shares.sum(0) <= 0).any()):
        raise UsageError("weights must be at least 0, and above 0 for one teacher of each list.")
    shares = (shares / shares.sum(0)).reshape(*shares.shape, *[1] * (3 - shares.ndim))
    return zeroed((shares * scores).sum(0), valid)


def median(
    teachers: Float[Tensor, "teachers lists items"], *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """Median of the raw scores, the mean of the middle two for an even number: one wild teacher cannot move it."""
    scores, valid = _stack(teachers, mask)
    ordered = scores.sort(dim=0).values
    low, high = ordered[(len(scores) - 1) // 2], ordered[len(scores) // 2]
    return zeroed(low / 2 + high / 2, valid)


def standardised_mean(
    teachers: Float[Tensor, "teachers lists items"], *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """Mean of the z-scores: every teacher's list to mean 0 and population deviation 1; a constant list becomes 0."""
    scores, valid = _stack(teachers, mask)
    return torch.stack([standardised(teacher, valid, 0) for teacher in scores]).mean(0)


def reciprocal_rank(
    teachers: Float[Tensor, "teachers lists items"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    known: Bool[Tensor, "teachers lists items"] | None = None,
    offset: float = 60.0,
) -> Float[Tensor, "lists items"]:
    """Reciprocal-rank fusion (Cormack et al. 2009): sum over teachers of 1 / (offset + rank); tied scores share
    the mean of their ranks. An item that a teacher does not know (`known` False) gets 0 from it.

    Raises:
        UsageError: the shapes do not fit.
    """
    scores, valid = _stack(teachers, mask)
    if known is not None and known.shape != scores.shape:
        raise UsageError(f"known has shape {list(known.shape)}; expected that of the teachers, {list(scores.shape)}.")
    total = torch.zeros_like(scores[0])
    for position, teacher in enumerate(scores):
        listed = valid if known is None else valid & known[position]
        total = total + zeroed(1 / (offset + mean_ranks(zeroed(teacher, listed), listed)), listed)
    return total


def confidence_weights(
    teachers: Float[Tensor, "teachers lists items"],
    *,
    positive: Bool[Tensor, "lists items"] | None = None,
    mask: Bool[Tensor, "lists items"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "teachers lists"]:
    """Weights that sum to 1 over the teachers: softmax(-CE(label, p_k) / temperature), for `weighted_mean`.

    CE is -log of the probability that a teacher gives to the positives together; a list without one (or no
    `positive` at all) uses the teacher's entropy in place of it.

    Raises:
        UsageError: the shapes do not fit, the temperature is not positive.
    """
    if not temperature > 0:
        raise UsageError(f"temperature {temperature}: expected a number above 0.")
    scores, valid = _stack(teachers, mask)
    costs = torch.stack([_cost(teacher, valid, positive) for teacher in scores])
    return torch.softmax(-costs / temperature, dim=0)


def _cost(teacher: Tensor, valid: Tensor, positive: Tensor | None) -> Float[Tensor, " lists"]:
    """Cross-entropy of the positives, entropy where there is none."""
    log_p = log_softmax(teacher, valid)
    surprise = -(zeroed(log_p.exp(), valid) * log_p).sum(-1)
    if positive is None:
        return surprise
    labelled = positive & valid
    own = torch.logsumexp(log_p.masked_fill(~labelled, -1e30), dim=-1)
    return torch.where(labelled.any(-1), -own, surprise)


def _stack(teachers: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Detached scores in float32 or float64 with masked items 0, and the mask."""
    if teachers.ndim != 3 or len(teachers) == 0:
        raise UsageError(f"teachers have shape {list(teachers.shape)}; expected [teachers, lists, items], one or more.")
    valid = valid_of(teachers[0], mask)
    return zeroed(teachers.detach().to(torch.promote_types(teachers.dtype, torch.float32)), valid), valid
