"""A weight per list from the scores themselves: how sure a teacher is, and which direction of KL to prefer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from structkd.objectives._masks import (
    check_temperature,
    entropy,
    lists_of,
    log_softmax,
    probabilities,
    valid_of,
    zeroed,
)


def confidence(
    teacher: Float[Tensor, "lists items"], *, mask: Bool[Tensor, "lists items"] | None = None, temperature: float = 1.0
) -> Float[Tensor, " lists"]:
    """Largest soft-max probability of each list, in (0, 1]; 0 for an empty list.

    Raises:
        UsageError: the mask does not fit, the temperature is not positive (the same for the other two).
    """
    return _probabilities(teacher, mask, temperature).amax(-1)


def certainty(
    teacher: Float[Tensor, "lists items"], *, mask: Bool[Tensor, "lists items"] | None = None, temperature: float = 1.0
) -> Float[Tensor, " lists"]:
    """1 - H(p) / log n: 1 for a one-hot teacher, 0 for a uniform one; 0 for lists of fewer than two items."""
    check_temperature(temperature)
    valid = valid_of(teacher, mask)
    scores = zeroed(teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32)), valid) / temperature
    count = valid.sum(-1)
    largest = count.clamp(min=2).to(scores.dtype).log()
    return torch.where(count >= 2, (1 - entropy(scores, valid) / largest).clamp(0, 1), scores.new_zeros(()))


def margin(
    teacher: Float[Tensor, "lists items"], *, mask: Bool[Tensor, "lists items"] | None = None, temperature: float = 1.0
) -> Float[Tensor, " lists"]:
    """Difference of the two largest soft-max probabilities, in [0, 1]; 1 where one item is valid, 0 where none is."""
    p = _probabilities(teacher, mask, temperature)
    best = torch.cat([p, torch.zeros_like(p[:, :1])], dim=1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def entropy_balance(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    high: float = 2.0,
    low: float = 1.0,
    sharpness: float | None = None,
) -> tuple[Float[Tensor, " lists"], Float[Tensor, " lists"]]:
    """Weights (forward KL, reverse KL) of BD-KD (arXiv 2212.12965), detached.

    Where the student is over-confident, H(p) > H(q), the forward KL gets `high` and the reverse `low`; elsewhere the
    other way round. With `sharpness` k the switch is soft: w = sigmoid(k (H(p) - H(q))) mixes the two.

    Raises:
        UsageError: shapes differ.
    """
    lists = lists_of(student.detach(), teacher, mask)
    gap = entropy(lists.teacher, lists.mask) - entropy(lists.student, lists.mask)
    switch = (gap > 0).to(gap.dtype) if sharpness is None else torch.sigmoid(sharpness * gap)
    forward = low + (high - low) * switch
    return forward, high + low - forward


def _probabilities(teacher: Tensor, mask: Tensor | None, temperature: float) -> Float[Tensor, "lists items"]:
    check_temperature(temperature)
    valid = valid_of(teacher, mask)
    scores = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
    return probabilities(log_softmax(zeroed(scores, valid) / temperature, valid), valid)
