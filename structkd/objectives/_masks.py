"""What every objective shares: shape checks, masked soft-max and order, saturating squares, the one reduction.

The rules, once for all (each has a test in `tests/objectives/`):

* a score matrix is [lists, items]: a query's candidates or a node's classes;
* the teacher is data: detached; arithmetic runs in float32 at least;
* masked content never matters, neither to the value nor to the gradient, and its own gradient is exactly 0;
* a list without valid items (pairwise: without a pair) is worth 0, has gradient 0, and does not count in the mean;
* finite scores up to 1e30 give finite values and gradients.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from structkd.errors import UsageError

Reduction = Literal["mean", "sum", "none"]
Value = Float[Tensor, ""] | Float[Tensor, " lists"]

_SQUARE_LIMIT = 1e7  # beyond it `square` goes on linearly: (1e30)^2 is no float32


@dataclass(frozen=True)
class Lists:
    """Checked input of an objective: padded content is overwritten by 0, so it cannot leak through 0 * inf."""

    student: Float[Tensor, "lists items"]
    teacher: Float[Tensor, "lists items"]
    mask: Bool[Tensor, "lists items"]


def lists_of(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Lists:
    """Check the shapes, detach the teacher, promote to float32 or float64, overwrite masked entries by 0.

    Raises:
        UsageError: no tensors, shapes differ (they never broadcast), or the mask is not boolean.
    """
    for name, found in (("student", student), ("teacher", teacher)):
        if not isinstance(found, Tensor):
            raise UsageError(f"{name} is a {type(found).__name__}; expected a torch tensor [lists, items].")
    if student.ndim == 1 == teacher.ndim:
        raise UsageError(
            f"student and teacher are one list of {len(student)} items without a list dimension; expected "
            "[lists, items]. Give student[None] and teacher[None]."
        )
    check_shape("teacher", teacher, student)
    valid = valid_of(student, mask)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return Lists(zeroed(student.to(dtype), valid), zeroed(teacher.detach().to(dtype), valid), valid)


def check_shape(name: str, found: Tensor, scores: Tensor) -> None:
    """UsageError unless `found` has the shape of the student's scores, [lists, items]."""
    if scores.ndim != 2 or found.shape != scores.shape:
        raise UsageError(
            f"{name} has shape {list(found.shape)} and student {list(scores.shape)}; expected the same "
            "[lists, items] for both. Objectives never broadcast: gather the scores list by list first."
        )


def check_flags(name: str, flags: Tensor, scores: Tensor) -> None:
    """UsageError unless `flags` is boolean, of the shape of the scores."""
    check_shape(name, flags, scores)
    if flags.dtype != torch.bool:
        raise UsageError(f"{name} has dtype {flags.dtype}; expected torch.bool, True where an item counts.")


def valid_of(scores: Tensor, mask: Tensor | None) -> Bool[Tensor, "lists items"]:
    """The mask, all True when there is none."""
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    check_flags("mask", mask, scores)
    return mask


def check_temperature(temperature: float) -> None:
    """UsageError unless positive."""
    if not temperature > 0:
        raise UsageError(f"temperature {temperature}: expected a number above 0.")


def zeroed(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with 0 at masked positions, whatever stood there (infinity and not-a-number too)."""
    return torch.where(mask, scores, scores.new_zeros(()))


def log_softmax(
    scores: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]
) -> Float[Tensor, "lists items"]:
    """Log-softmax over the valid items; 0 at masked positions, so multiply only by masked probabilities."""
    fill = scores.new_full((), float("-inf"))
    open_scores = torch.where(mask, scores, fill)
    # a list of -inf only has no soft-max; its rows are emptied again below
    open_scores = torch.where(mask.any(-1, keepdim=True), open_scores, scores.new_zeros(()))
    return zeroed(torch.log_softmax(open_scores, dim=-1), mask)


def probabilities(
    log_probabilities: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]
) -> Float[Tensor, "lists items"]:
    """exp of what `log_softmax` returned, 0 at masked positions."""
    return zeroed(log_probabilities.exp(), mask)


def entropy(scores: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]) -> Float[Tensor, " lists"]:
    """Entropy of the soft-max over valid items, in nats; 0 for an empty list."""
    log_p = log_softmax(scores, mask)
    return -(probabilities(log_p, mask) * log_p).sum(-1)


def mean_items(values: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]) -> Float[Tensor, " lists"]:
    """Mean over valid items; 0 for an empty list. Divides before it sums, so that large terms stay finite."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    return (zeroed(values, mask) / count).sum(-1)


def square(values: Tensor) -> Tensor:
    """x^2, continued linearly (and smoothly) beyond |x| = 1e7: finite in float32 up to 1e30, gradient included.

    Real scores stay far inside: SPLADE's, the largest in use, reach 3.3e6.
    """
    size = values.abs()
    inner = values.clamp(-_SQUARE_LIMIT, _SQUARE_LIMIT)  # the branch not taken must be finite as well
    return torch.where(size <= _SQUARE_LIMIT, inner * inner, _SQUARE_LIMIT * (2 * size - _SQUARE_LIMIT))


def standardised(
    scores: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"], ddof: int
) -> Float[Tensor, "lists items"]:
    """z-scores of the valid items of each list; 0 for a constant list and at masked positions."""
    # a first division by the largest size keeps squares of 1e30 inside float32
    largest = scores.abs().amax(-1, keepdim=True)
    scores = scores / torch.where(largest > 0, largest, 1)
    centred = zeroed(scores - mean_items(scores, mask)[:, None], mask)
    count = mask.sum(-1, keepdim=True)
    deviation = (centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    # a constant list leaves only rounding behind, which must not be blown up to size 1
    constant = deviation <= 4 * torch.finfo(scores.dtype).eps
    return torch.where(constant, 0, centred / torch.where(constant, 1, deviation))


def mean_ranks(scores: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]) -> Float[Tensor, "lists items"]:
    """Rank 1, 2, ... of each valid item by descending score; equal scores share the mean of their ranks."""
    both = mask[:, :, None] & mask[:, None, :]
    above = (both & (scores[:, None, :] > scores[:, :, None])).sum(-1)
    equal = (both & (scores[:, None, :] == scores[:, :, None])).sum(-1)
    return above.to(scores.dtype) + (equal.to(scores.dtype) + 1) / 2


def descending(
    scores: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"],
    first: Bool[Tensor, "lists items"] | None = None,
) -> Int[Tensor, "lists items"]:
    """Positions by descending score: items of `first` ahead, masked ones last; ties keep their place in the list."""
    tier = torch.where(mask, 1, 2)
    if first is not None:
        tier = torch.where(first & mask, 0, tier)
    by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
    by_tier = torch.argsort(tier.gather(-1, by_score), dim=-1, stable=True)
    return by_score.gather(-1, by_tier)


def reduced(
    values: Float[Tensor, " lists"], counted: Bool[Tensor, " lists"], weight: Tensor | None, reduction: str
) -> Value:
    """`weight * values`, then all of them ("none"), their sum, or their mean over the lists that count ("mean").

    The weight multiplies and does not enter the denominator, so a weight of 2 everywhere doubles the loss.

    Raises:
        UsageError: an unknown reduction, or a weight that is not one number per list.
    """
    if weight is not None:
        if weight.shape != values.shape:
            raise UsageError(f"weight has shape {list(weight.shape)}; expected one number per list: {len(values)}.")
        values = values * weight.detach().to(values.dtype)
    values = zeroed(values, counted)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction != "mean":
        raise UsageError(f"reduction {reduction!r} is unknown; expected 'mean', 'sum' or 'none'.")
    return (values / counted.sum().clamp(min=1)).sum()
