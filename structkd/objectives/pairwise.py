"""Objectives on differences of two scores of one list, and the pointwise square; scores of any sign and scale."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from structkd.errors import UsageError
from structkd.objectives._masks import (
    Lists,
    Reduction,
    Value,
    check_flags,
    check_temperature,
    lists_of,
    mean_items,
    reduced,
    square,
)


def margin_mse(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    pairs: Literal["first", "all", "centred"] = "first",
) -> Value:
    """Squared difference of the margins of student and teacher.

    "first": item 0 is the positive, mean over the others of ((s_0 - s_k) - (t_0 - t_k))^2; with two items this is
    the loss of the paper (Hofstaetter et al. 2020, arXiv 2010.02666, equation 4).
    "all": the mean over all distinct pairs of the list; with d = s - t it equals 2n/(n-1) * mean_i (d_i - mean d)^2,
    so it costs O(n). "centred": mean_i (d_i - mean d)^2, the limit of tau^2 * KL as tau grows.

    Raises:
        UsageError: shapes differ, `pairs` is unknown.
    """
    lists = lists_of(student, teacher, mask)
    error = lists.student - lists.teacher
    if pairs == "first":
        others = lists.mask & lists.mask[:, :1]
        others = torch.cat([torch.zeros_like(others[:, :1]), others[:, 1:]], dim=1)
        values = mean_items(square(error[:, :1] - error), others)
        return reduced(values, others.any(-1), weight, reduction)
    if pairs not in ("all", "centred"):
        raise UsageError(f"pairs {pairs!r} is unknown; expected 'first', 'all' or 'centred'.")
    count = lists.mask.sum(-1).to(error.dtype)  # int / int would be float32
    values = mean_items(square(error - mean_items(error, lists.mask)[:, None]), lists.mask)
    if pairs == "all":
        values = values * (2 * count / (count - 1).clamp(min=1))
    return reduced(values, count >= 2, weight, reduction)


def ranknet(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    target: Literal["hard", "soft"] = "hard",
    temperature: float = 1.0,
    positive: Bool[Tensor, "lists items"] | None = None,
) -> Value:
    """RankNet (Burges et al. 2005, equation 3): logistic loss on score differences d = s_i - s_j.

    "hard": mean over pairs with t_i > t_j of softplus(-d); ties are dropped. With `positive`, the pairs are those of
    a positive and a non-positive item and the teacher's scores are not used.
    "soft": P = sigmoid((t_i - t_j) / temperature); mean over i < j of P softplus(-d) + (1 - P) softplus(d).

    Raises:
        UsageError: shapes differ, `target` is unknown, `positive` with "soft", a temperature that is not positive.
    """
    check_temperature(temperature)
    lists = lists_of(student, teacher, mask)
    difference = _differences(lists.student)
    if target == "hard":
        return _pair_mean(softplus(-difference), _ordered_pairs(lists, positive), weight, reduction)
    if target != "soft" or positive is not None:
        raise UsageError(f"target {target!r}: expected 'hard' or 'soft', and 'soft' takes no positives.")
    both = lists.mask[:, :, None] & lists.mask[:, None, :]
    probability = torch.sigmoid(_differences(lists.teacher) / temperature)
    values = probability * softplus(-difference) + (1 - probability) * softplus(difference)
    return _pair_mean(values, torch.triu(both, diagonal=1), weight, reduction)


def weighted_ranknet(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
) -> Value:
    """RankNet weighted by the teacher's margin: mean over pairs with t_i > t_j of (t_i - t_j) softplus(-(s_i - s_j)).

    The baseline of Hofstaetter et al. 2020, section 4. Each pair stands in the teacher's order, so no weight is
    negative; the reference code pushes a pair the wrong way when the teacher prefers the "negative".

    Raises:
        UsageError: shapes differ.
    """
    lists = lists_of(student, teacher, mask)
    # beyond 1e7 a margin is no weight any more: the cap keeps margin * loss inside float32
    margins = _differences(lists.teacher).clamp(max=1e7)
    return _pair_mean(margins * softplus(-_differences(lists.student)), _ordered_pairs(lists, None), weight, reduction)


def pairwise_logistic(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    scale: float = 1.0,
    offset: float = 1.0,
) -> Value:
    """Logistic loss with the teacher's margin as offset.

    Mean over pairs with t_i > t_j of softplus(-scale * ((s_i - s_j) - offset * (t_i - t_j))). offset=0 is hard
    RankNet. A derivation of ours from Margin-MSE: unlike it, a margin larger than the teacher's costs little.

    Raises:
        UsageError: shapes differ.
    """
    lists = lists_of(student, teacher, mask)
    excess = _differences(lists.student) - offset * _differences(lists.teacher)
    return _pair_mean(softplus(-scale * excess), _ordered_pairs(lists, None), weight, reduction)


def hinge(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    margin: float = 1.0,
    gap: float = 0.0,
) -> Value:
    """Ranking hinge (Herbrich et al. 2000): mean over pairs with t_i > t_j of max(0, margin - (s_i - s_j)).

    With `gap`, pairs count only when t_i > t_j + gap: nearer ones are ties that teach nothing (LLP; Guo et al., ICML
    2023, eq. 5, where gap and margin are one number).

    Raises:
        UsageError: shapes differ, `gap` is negative.
    """
    if gap < 0:
        raise UsageError(f"gap {gap}: expected 0 or more.")
    lists = lists_of(student, teacher, mask)
    pairs = _ordered_pairs(lists, None) & (_differences(lists.teacher) > gap)
    return _pair_mean(torch.relu(margin - _differences(lists.student)), pairs, weight, reduction)


def pointwise_mse(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
) -> Value:
    """Mean over valid items of (s - t)^2; the only objective here that is not invariant to a shift of the scores.

    Raises:
        UsageError: shapes differ.
    """
    lists = lists_of(student, teacher, mask)
    values = mean_items(square(lists.student - lists.teacher), lists.mask)
    return reduced(values, lists.mask.any(-1), weight, reduction)


def _differences(scores: Float[Tensor, "lists items"]) -> Float[Tensor, "lists items items"]:
    """x_i - x_j of every ordered pair."""
    return scores[:, :, None] - scores[:, None, :]


def _ordered_pairs(lists: Lists, positive: Tensor | None) -> Bool[Tensor, "lists items items"]:
    """Pairs (i, j) of valid items where i should stand above j: by the teacher, or positives above the rest."""
    both = lists.mask[:, :, None] & lists.mask[:, None, :]
    if positive is None:
        return both & (lists.teacher[:, :, None] > lists.teacher[:, None, :])
    check_flags("positive", positive, lists.student)
    return both & positive[:, :, None] & ~positive[:, None, :]


def _pair_mean(
    values: Float[Tensor, "lists items items"],
    pairs: Bool[Tensor, "lists items items"],
    weight: Tensor | None,
    reduction: str,
) -> Value:
    """Mean over a list's pairs, then the common reduction; a list without a pair does not count."""
    return reduced(mean_items(values.flatten(1), pairs.flatten(1)), pairs.flatten(1).any(-1), weight, reduction)
