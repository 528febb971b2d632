"""Objectives on a whole list: divergences of soft-max distributions, and likelihoods of the teacher's order.

p = softmax(t / tau_t) and q = softmax(s / tau_s) over the valid items of a list.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from structkd.errors import UsageError
from structkd.objectives._masks import (
    Lists,
    Reduction,
    Value,
    check_flags,
    check_shape,
    check_temperature,
    descending,
    lists_of,
    log_softmax,
    probabilities,
    reduced,
    zeroed,
)
from structkd.objectives.weights import entropy_balance

_LOWEST = -1e37  # stands for -inf where the gradient of logcumsumexp would meet inf - inf


def kl(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    rescale: bool = False,
) -> Value:
    """KL(p || q) = sum_i p_i log(p_i / q_i) (Hinton et al. 2015, arXiv 1503.02531); gradient (q - p) / tau_s.

    Args:
        student: scores of the student.
        teacher: scores of the teacher.
        mask: True at valid items.
        weight: a factor per list.
        reduction: "mean" over lists that count, "sum", or "none".
        temperature: of the teacher.
        student_temperature: of the student; None is the teacher's.
        rescale: multiply by the student's temperature squared, so that gradients keep their size.

    Raises:
        UsageError: shapes differ, a temperature is not positive.
    """
    lists, log_p, log_q = _distributions(student, teacher, mask, temperature, student_temperature)
    values = _divergence(log_p, log_q, lists.mask)
    return _finish(values, lists, weight, reduction, _scale(temperature, student_temperature, rescale))


def reverse_kl(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    rescale: bool = False,
) -> Value:
    """KL(q || p) = sum_i q_i log(q_i / p_i): the student settles on one mode of the teacher. Parameters as in `kl`.

    Raises:
        UsageError: shapes differ, a temperature is not positive.
    """
    lists, log_p, log_q = _distributions(student, teacher, mask, temperature, student_temperature)
    values = _divergence(log_q, log_p, lists.mask)
    return _finish(values, lists, weight, reduction, _scale(temperature, student_temperature, rescale))


def jensen_shannon(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    rescale: bool = False,
) -> Value:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991); at most log 2. Parameters as in `kl`.

    Raises:
        UsageError: shapes differ, a temperature is not positive.
    """
    lists, log_p, log_q = _distributions(student, teacher, mask, temperature, student_temperature)
    log_m = zeroed(torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0)), lists.mask)
    values = (_divergence(log_p, log_m, lists.mask) + _divergence(log_q, log_m, lists.mask)) / 2
    return _finish(values, lists, weight, reduction, _scale(temperature, student_temperature, rescale))


def jeffreys(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    rescale: bool = False,
) -> Value:
    """KL(p || q) + KL(q || p) (Jeffreys 1946). Parameters as in `kl`.

    Raises:
        UsageError: shapes differ, a temperature is not positive.
    """
    lists, log_p, log_q = _distributions(student, teacher, mask, temperature, student_temperature)
    values = _divergence(log_p, log_q, lists.mask) + _divergence(log_q, log_p, lists.mask)
    return _finish(values, lists, weight, reduction, _scale(temperature, student_temperature, rescale))


def balanced_kl(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    high: float = 2.0,
    low: float = 1.0,
    sharpness: float | None = None,
) -> Value:
    """BD-KD: nu KL(p || q) + delta KL(q || p), the weights from `weights.entropy_balance` (arXiv 2212.12965).

    high = low = 1 is `jeffreys`. The values 2 and 1 are ours: the abstract gives none.

    Raises:
        UsageError: shapes differ.
    """
    lists, log_p, log_q = _distributions(student, teacher, mask, 1.0, None)
    forward, backward = entropy_balance(
        lists.student, lists.teacher, mask=lists.mask, high=high, low=low, sharpness=sharpness
    )
    values = forward * _divergence(log_p, log_q, lists.mask) + backward * _divergence(log_q, log_p, lists.mask)
    return _finish(values, lists, weight, reduction, 1.0)


def listnet(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    rescale: bool = False,
) -> Value:
    """ListNet top-1, soft cross-entropy: -sum_i p_i log q_i (Cao et al. 2007, equation 5) = `kl` + entropy of p.

    Same gradient as `kl`; its minimum is the teacher's entropy, not 0. Parameters as in `kl`.

    Raises:
        UsageError: shapes differ, a temperature is not positive.
    """
    lists, log_p, log_q = _distributions(student, teacher, mask, temperature, student_temperature)
    values = -(probabilities(log_p, lists.mask) * log_q).sum(-1)
    return _finish(values, lists, weight, reduction, _scale(temperature, student_temperature, rescale))


def listmle(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    positive: Bool[Tensor, "lists items"] | None = None,
    order: Int[Tensor, "lists items"] | None = None,
    top_k: int | None = None,
) -> Value:
    """ListMLE (Xia et al. 2008, equation 6): -log likelihood of the teacher's order o under Plackett-Luce,
    sum_k [logsumexp_{l >= k} s_{o_l} - s_{o_k}]. Parameters as in `plackett_luce`; O(n log n).

    Raises:
        UsageError: shapes differ, `top_k` below 1.
    """
    lists = lists_of(student, teacher, mask)
    positions = _order(lists, positive, order)
    steps = lists.mask.gather(-1, positions).to(lists.student.dtype)
    return _likelihood(lists, positions, steps, top_k, weight, reduction)


def plackett_luce(
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    reduction: Reduction = "mean",
    *,
    temperature: float = 1.0,
    positive: Bool[Tensor, "lists items"] | None = None,
    label_first: bool = True,
    order: Int[Tensor, "lists items"] | None = None,
    top_k: int | None = None,
    steps: Literal["teacher", "uniform", "log"] = "teacher",
) -> Value:
    """Plackett-Luce distillation, PLD (arXiv 2506.12542, equation 7), in O(n log n):

    L = sum_k alpha_k [logsumexp_{l >= k} s_{o_l} - s_{o_k}],  alpha_k = softmax(t / temperature)_{o_k}.

    The order o puts positives first (several: among themselves by the teacher, our convention), then descends by
    teacher score; equal scores keep their place in the list. Gradient: exp(s_{o_j}) A_j - alpha_j with
    A_j = sum_{k <= j} alpha_k exp(-lse_k); it sums to 0 over a list.

    Args:
        student: scores of the student.
        teacher: scores of the teacher.
        mask: True at valid items.
        weight: a factor per list.
        reduction: "mean" over lists that count, "sum", or "none".
        temperature: of the teacher; raise it for raw cross-encoder logits, which make alpha nearly one-hot.
        positive: relevant documents, or the true class; may be all False.
        label_first: False ignores `positive`: right where the teacher knows better than the labels.
        order: a permutation of the items, best first, in place of the order by scores (listwise teachers).
        top_k: keep the first k terms; their denominators stay those of the full list.
        steps: alpha: the teacher's soft-max, or for teachers that give an order only "uniform" (1/n) or "log"
            (1/log2(1 + k), normalised to sum 1).

    Raises:
        UsageError: shapes differ, a temperature is not positive, `top_k` below 1, `steps` is unknown.
    """
    check_temperature(temperature)
    lists = lists_of(student, teacher, mask)
    positions = _order(lists, positive if label_first else None, order)
    ordered_mask = lists.mask.gather(-1, positions)
    if steps == "teacher":
        alpha = probabilities(log_softmax(lists.teacher / temperature, lists.mask), lists.mask).gather(-1, positions)
    elif steps in ("uniform", "log"):
        alpha = _rank_weights(ordered_mask, lists.student.dtype, logarithmic=steps == "log")
    else:
        raise UsageError(f"steps {steps!r} is unknown; expected 'teacher', 'uniform' or 'log'.")
    return _likelihood(lists, positions, alpha, top_k, weight, reduction)


def _distributions(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float, student_temperature: float | None
) -> tuple[Lists, Tensor, Tensor]:
    """Checked lists, log p of the teacher, log q of the student."""
    other = temperature if student_temperature is None else student_temperature
    check_temperature(temperature)
    check_temperature(other)
    lists = lists_of(student, teacher, mask)
    log_p = log_softmax(lists.teacher / temperature, lists.mask)
    return lists, log_p, log_softmax(lists.student / other, lists.mask)


def _divergence(log_a: Tensor, log_b: Tensor, mask: Tensor) -> Float[Tensor, " lists"]:
    """KL(a || b) of two masked log-distributions."""
    return (probabilities(log_a, mask) * (log_a - log_b)).sum(-1)


def _scale(temperature: float, student_temperature: float | None, rescale: bool) -> float:
    tau = temperature if student_temperature is None else student_temperature
    return tau * tau if rescale else 1.0


def _finish(values: Tensor, lists: Lists, weight: Tensor | None, reduction: str, scale: float) -> Value:
    return reduced(values * scale, lists.mask.any(-1), weight, reduction)


def _order(lists: Lists, positive: Tensor | None, order: Tensor | None) -> Int[Tensor, "lists items"]:
    """Positions best first, masked items last."""
    if positive is not None:
        check_flags("positive", positive, lists.student)
    if order is None:
        return descending(lists.teacher, lists.mask, positive)
    check_shape("order", order, lists.student)
    if order.is_floating_point():
        raise UsageError(f"order has dtype {order.dtype}; expected whole numbers, the positions of the items.")
    if not torch.equal(order.sort(dim=-1).values, torch.arange(order.shape[-1], device=order.device).expand_as(order)):
        raise UsageError(f"order: expected a permutation of 0..{order.shape[-1] - 1} in each row, best item first.")
    # the given permutation as scores: what stands first gets the highest
    places = torch.arange(order.shape[-1], 0, -1, device=order.device).expand_as(order).to(lists.teacher.dtype)
    return descending(torch.zeros_like(places).scatter(-1, order, places), lists.mask, positive)


def _rank_weights(
    ordered_mask: Bool[Tensor, "lists items"], dtype: torch.dtype, logarithmic: bool
) -> Float[Tensor, "lists items"]:
    """Weights of the ranks 1, 2, ... that sum to 1 over the valid items."""
    ranks = torch.arange(1, ordered_mask.shape[-1] + 1, device=ordered_mask.device, dtype=dtype)
    raw = (1 / torch.log2(1 + ranks)) if logarithmic else torch.ones_like(ranks)
    weights = torch.where(ordered_mask, raw, 0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)


def _likelihood(
    lists: Lists,
    positions: Int[Tensor, "lists items"],
    alpha: Float[Tensor, "lists items"],
    top_k: int | None,
    weight: Tensor | None,
    reduction: str,
) -> Value:
    """sum_k alpha_k [logsumexp over what is left - s of the one chosen], in the given order."""
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k {top_k}: expected at least 1.")
    ordered_mask = lists.mask.gather(-1, positions)
    scores = lists.student.gather(-1, positions)
    highest = scores.detach().masked_fill(~ordered_mask, _LOWEST).amax(-1, keepdim=True) if scores.shape[-1] else 0.0
    scores = zeroed(scores - highest, ordered_mask)  # shift-invariant; keeps exp and its gradient in range
    left = torch.logcumsumexp(scores.masked_fill(~ordered_mask, _LOWEST).flip(-1), dim=-1).flip(-1)
    terms = zeroed(alpha * zeroed(left - scores, ordered_mask), ordered_mask)[:, :top_k]
    return reduced(terms.sum(-1), lists.mask.any(-1), weight, reduction)
