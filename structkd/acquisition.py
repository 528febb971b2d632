"""Which lists the teacher is asked about under a budget, which answers are kept, and which domain is drawn from.

A list is a query's candidates or a node's classes: student scores are [lists, items]. Policies return row numbers,
ascending and exactly `budget` many; `known` marks rows whose answer is already stored. Everything is numpy in float64,
and every draw takes a generator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from structkd.errors import UsageError

Scores = Float[np.ndarray, "lists items"]
Rows = Int[np.ndarray, " budget"]
Form = Literal["softmax", "sigmoid"]


def random(
    student: Scores, budget: int, *, generator: np.random.Generator, known: Bool[np.ndarray, " lists"] | None = None
) -> Rows:
    """`budget` open rows, each set equally likely; the student's scores only count the lists.

    Raises:
        UsageError: the budget is negative or exceeds the open rows.
    """
    rows = _open_rows(len(student), budget, known)
    return np.sort(generator.choice(rows, budget, replace=False))


def margin(
    student: Scores,
    budget: int,
    *,
    mask: Bool[np.ndarray, "lists items"] | None = None,
    known: Bool[np.ndarray, " lists"] | None = None,
    form: Form = "softmax",
) -> Rows:
    """The `budget` open rows of largest `gains`, that is of smallest margin; equal ones: the smaller row.

    Margin sampling (Scheffer et al. 2001). It draws nothing, so it takes no generator.

    Raises:
        UsageError: as `gains`, or the budget is negative or exceeds the open rows.
    """
    rows = _open_rows(len(student), budget, known)
    gain = gains(student, mask=mask, form=form)[rows]
    return np.sort(rows[np.argsort(-gain, kind="stable")[:budget]])


def rad(
    student: Scores,
    budget: int,
    *,
    teacher_accuracy: float,
    generator: np.random.Generator,
    penalty: float = 1.0,
    mask: Bool[np.ndarray, "lists items"] | None = None,
    known: Bool[np.ndarray, " lists"] | None = None,
    form: Form = "softmax",
) -> Rows:
    """Robust Active Distillation (Baykal et al., arXiv 2210.01213): rows drawn with the marginals of `water_level`.

    The teacher errs on e = (1 - teacher_accuracy) x open rows, wherever that hurts most; `teacher_accuracy` comes from
    held-out labels.

    Raises:
        UsageError: as `gains` and `water_level`, or an accuracy outside [0, 1].
    """
    if not 0 <= teacher_accuracy <= 1:
        raise UsageError(f"teacher_accuracy {teacher_accuracy}: expected a share in [0, 1], from held-out labels.")
    rows = _open_rows(len(student), budget, known)
    gain = gains(student, mask=mask, form=form)[rows]
    errors = (1 - teacher_accuracy) * len(rows)
    marginals = water_level(gain, budget, errors=errors, penalty=penalty)
    return np.asarray(rows[systematic_sample(marginals.probabilities, generator)])


POLICIES: Mapping[str, Callable[..., Any]] = MappingProxyType({"margin": margin, "rad": rad, "random": random})
"Name -> policy that chooses the lists which the teacher is asked about."


def gains(
    student: Scores, *, mask: Bool[np.ndarray, "lists items"] | None = None, form: Form = "softmax"
) -> Float[np.ndarray, " lists"]:
    """1 - (q_1 - q_2) of each list, q_1 and q_2 its two largest probabilities: 1 for a tie, near 0 for a sure student.

    "softmax" suits a node's classes (RAD's gain); "sigmoid" a query's candidates, whose scores stand for themselves
    (our choice). A list of one valid item has q_2 = 0; a list of none has nothing to ask about: gain 0.

    Raises:
        UsageError: scores are not [lists, items], the mask does not fit, an unknown form, scores that are no numbers.
    """
    scores, valid = _checked(student, mask)
    if form not in ("softmax", "sigmoid"):
        raise UsageError(f"form {form!r} is unknown; expected 'softmax' or 'sigmoid'.")
    q = _softmax(scores, valid) if form == "softmax" else np.where(valid, _sigmoid(scores), 0.0)
    best = np.sort(np.concatenate([q, np.zeros((len(q), 2))], axis=1), axis=1)[:, -2:]
    return np.asarray(np.where(valid.any(1), 1 - (best[:, 1] - best[:, 0]), 0.0))


@dataclass(frozen=True, eq=False)
class Marginals:
    """How likely each point is to be asked about.

    Attributes:
        probabilities: [points], in [0, 1], their sum is the budget.
        level: the water level c; no point but a filled-up one promises more than this gain.
        value: what the game is worth before the rest was filled up.
        unspent: the part of the budget that would only have served the adversary, spread evenly over what was left.
    """

    probabilities: Float[np.ndarray, " points"]
    level: float
    value: float
    unspent: float


def water_level(gain: Float[np.ndarray, " points"], budget: int, *, errors: float, penalty: float = 1.0) -> Marginals:
    """Exact solution of RAD's game for p <= 1: max over p of sum z - (1 + penalty) (sum of the e largest z), z = p g.

    The adversary makes the teacher wrong on `errors` = e points (a fraction of a point counts in part), each of which
    costs -penalty g. For one level c, points in order of falling gain get p = min(1, c / g) until the budget is
    spent, the last one in part; V(c) = sum p g - (1 + penalty) e c is concave and piecewise linear, so bisection on
    its slope finds the best c to the last bit. With errors=0 these are the `budget` largest gains. The paper's own
    rule p = b / (g H_m) may exceed 1 and, cut there, leaves most of the budget unspent. Whether the paper's game has
    penalty 0 or 1 is not settled; both are one parameter.

    Raises:
        UsageError: gains are negative or no numbers, the budget is outside 0 ... points, errors or penalty negative.
    """
    g = np.asarray(gain, dtype=np.float64)
    if g.ndim != 1 or not (np.isfinite(g).all() and (g >= 0).all()):
        raise UsageError("gains must be one finite number of at least 0 per point.")
    if not 0 <= budget <= len(g):
        raise UsageError(f"budget {budget}: expected 0 to {len(g)}, the number of points.")
    if not (errors >= 0 and penalty >= 0):
        raise UsageError(f"errors {errors}, penalty {penalty}: expected numbers of at least 0.")
    order = np.argsort(-g, kind="stable")
    cost = (1 + penalty) * errors
    level = _best_level(g[order], budget, cost)
    p = np.empty_like(g)
    p[order] = _filled(g[order], budget, level)
    value = float(p @ g - cost * level)
    unspent = max(0.0, budget - float(p.sum()))
    room = float((1 - p).sum())
    if unspent and room:
        p = p + (1 - p) * min(1.0, unspent / room)
    return Marginals(p, level, value, unspent)


def _best_level(g: Float[np.ndarray, " points"], budget: int, cost: float) -> float:
    """The level that maximises V, by bisection on the sign of its slope; g falls."""
    # the slope just above 0 is one per point of some gain, whatever the budget
    if budget == 0 or int((g > 0).sum()) <= cost:
        return 0.0
    if cost == 0:
        return float(g[0])
    low, high = 0.0, float(g[0])
    while low < (middle := low + (high - low) / 2) < high:
        if _slope(g, budget, middle, cost) > 0:
            low = middle
        else:
            high = middle
    return high if _slope(g, budget, low, cost) > 0 else low


def _slope(g: Float[np.ndarray, " points"], budget: int, level: float, cost: float) -> float:
    """dV/dc: each point held down by the level gains 1 and takes 1 / g of the budget from the last, partial point."""
    capped = g > level
    spent = np.cumsum(np.where(capped, level / np.where(capped, g, 1), 1.0))
    partial = int(np.searchsorted(spent, budget, side="right"))
    held = g[:partial][capped[:partial]]
    taken = g[partial] * float((1 / held).sum()) if partial < len(g) else 0.0
    return len(held) - taken - cost


def _filled(g: Float[np.ndarray, " points"], budget: int, level: float) -> Float[np.ndarray, " points"]:
    """p = min(1, level / g) from the largest gain on, until the budget is spent."""
    capped = g > level
    p = np.where(capped, level / np.where(capped, g, 1), 1.0)
    before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
    return np.asarray(np.clip(budget - before, 0.0, p))


def systematic_sample(
    probabilities: Float[np.ndarray, " points"], generator: np.random.Generator
) -> Int[np.ndarray, " budget"]:
    """Rows without replacement, ascending: row i is in with probability p_i, and their number is always sum p.

    Systematic sampling (Madow 1949): points of spacing 1 with one random start, laid over the cumulated p of the rows
    in random order. It fixes the marginals, not the joint probabilities.

    Raises:
        UsageError: a probability outside [0, 1], or a sum that is no whole number.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    total = float(p.sum())
    budget = round(total)
    if not ((p >= 0).all() and (p <= 1 + 1e-9).all()) or abs(total - budget) > 1e-6:
        raise UsageError(f"probabilities must lie in [0, 1] and sum to a whole number; they sum to {total:.6g}.")
    if budget == 0:
        return np.empty(0, dtype=np.int64)
    order = generator.permutation(len(p))
    ends = np.cumsum(p[order]) * (budget / total)
    ends[-1] = budget
    hits = np.searchsorted(ends, generator.random() + np.arange(budget), side="right")
    chosen = np.zeros(len(p), dtype=bool)
    chosen[order[np.minimum(hits, len(p) - 1)]] = True
    # a p of 1 + rounding can be hit twice: the likeliest row left takes the second place
    for row in np.argsort(-np.where(chosen, -1.0, p), kind="stable")[: budget - int(chosen.sum())]:
        chosen[row] = True
    return np.flatnonzero(chosen)


def agreement(
    student: Scores,
    teacher: Scores,
    *,
    student_confidence: float = 0.5,
    teacher_confidence: float = 0.5,
    mask: Bool[np.ndarray, "lists items"] | None = None,
) -> Bool[np.ndarray, " lists"]:
    """Lists to keep: both name the same first item, each with at least its confidence (largest soft-max probability).

    The filter of KD3 (arXiv 2307.11469) reduced to its idea; fixed
    thresholds take the place of its schedule. A list whose first place is tied, on either side, has no first item.

    Raises:
        UsageError: shapes differ, a confidence outside [0, 1].
    """
    if not (0 <= student_confidence <= 1 and 0 <= teacher_confidence <= 1):
        raise UsageError(f"confidences {student_confidence}, {teacher_confidence}: expected numbers in [0, 1].")
    s, valid = _checked(student, mask)
    t, _ = _checked(teacher, mask)
    if s.shape != t.shape:
        raise UsageError(f"teacher has shape {list(t.shape)} and student {list(s.shape)}; expected the same.")
    p, q = _softmax(t, valid), _softmax(s, valid)
    if not p.shape[1]:
        return np.zeros(len(p), dtype=bool)
    first_p, first_q = p == p.max(1, keepdims=True), q == q.max(1, keepdims=True)
    same = (first_p == first_q).all(1) & (first_p.sum(1) == 1) & valid.any(1)
    return np.asarray(same & (p.max(1) >= teacher_confidence) & (q.max(1) >= student_confidence))


def teacher_filter(
    teacher: Scores,
    own: Int[np.ndarray, " lists"],
    *,
    top: int | None = None,
    threshold: float | None = None,
    mask: Bool[np.ndarray, "lists items"] | None = None,
) -> Bool[np.ndarray, " lists"]:
    """Synthetic queries to keep: item `own`, the text a query was made from, convinces the teacher.

    Kept is a list whose own item is among the teacher's `top` (items of equal score do not push it down; round-trip
    consistency, Promptagator, arXiv 2209.11755) or whose own score is at least `threshold` (the critic of Symbolic
    Knowledge Distillation, arXiv 2110.07178); with both, either is enough. A masked own item is never kept.

    Raises:
        UsageError: neither `top` nor `threshold`, `top` below 1, an own item outside its list.
    """
    scores, valid = _checked(teacher, mask)
    if top is None and threshold is None:
        raise UsageError("teacher_filter got neither top nor threshold; give one of them, or both.")
    if top is not None and top < 1:
        raise UsageError(f"top {top}: expected at least 1.")
    if own.shape != scores.shape[:1] or bool(((own < 0) | (own >= scores.shape[1])).any()):
        raise UsageError(f"own must be one item number in 0 ... {scores.shape[1] - 1} for each of {len(scores)} lists.")
    mine = np.take_along_axis(scores, own[:, None], axis=1)
    keep = np.zeros(len(scores), dtype=bool)
    if top is not None:
        keep |= (valid & (scores > mine)).sum(1) < top
    if threshold is not None:
        keep |= mine[:, 0] >= threshold
    return np.asarray(keep & np.take_along_axis(valid, own[:, None], axis=1)[:, 0])


def domain_weights(
    student_loss: Float[np.ndarray, " domains"],
    teacher_loss: Float[np.ndarray, " domains"],
    *,
    previous: Float[np.ndarray, " domains"] | None = None,
    smoothing: float = 0.5,
    temperature: float = 1.0,
    limit: float = 10.0,
) -> Float[np.ndarray, " domains"]:
    """DDK (arXiv 2407.16154): the share of each domain in the next batches, more where the student
    lags further behind the teacher.

    With the ratio rho = exp(student cross-entropy - teacher cross-entropy), that is of perplexities, on validation
    data: first (`previous` None) softmax(rho / temperature); then, with psi = previous x exp(rho / temperature),
    smoothing x psi / sum psi + (1 - smoothing) / N. So a later share is at least (1 - smoothing) / N, and equal ratios
    keep uniform shares uniform. rho is cut at `limit` (ours): it stands in an exponent, and a teacher of perplexity
    near 1 would take all. Domains are collections or query types; degree buckets or communities of a graph.

    Raises:
        UsageError: shapes differ, losses are no numbers, smoothing outside [0, 1], temperature or limit not positive.
    """
    if student_loss.ndim != 1 or student_loss.shape != teacher_loss.shape or not len(student_loss):
        raise UsageError(
            f"student_loss has shape {list(student_loss.shape)}, teacher_loss {list(teacher_loss.shape)}; expected one "
            "cross-entropy per domain in both."
        )
    gap = np.asarray(student_loss, dtype=np.float64) - np.asarray(teacher_loss, dtype=np.float64)
    if not np.isfinite(gap).all():
        raise UsageError("a validation cross-entropy is not a finite number; every domain needs one.")
    if not 0 <= smoothing <= 1 or not temperature > 0 or not limit > 0:
        raise UsageError(
            f"smoothing {smoothing}, temperature {temperature}, limit {limit}: expected smoothing in [0, 1] and the "
            "others above 0."
        )
    push = np.exp(np.minimum(gap, np.log(limit))) / temperature
    powers = np.exp(push - push.max())
    if previous is None:
        return np.asarray(powers / powers.sum())
    if previous.shape != gap.shape or not (previous >= 0).all() or not np.isclose(previous.sum(), 1):
        raise UsageError(f"previous shares must be {len(gap)} numbers of at least 0 with sum 1.")
    psi = previous * powers
    # all of the old share may sit where exp underflows; then the push alone decides
    psi = psi if psi.sum() > 0 else powers
    return np.asarray(smoothing * psi / psi.sum() + (1 - smoothing) / len(gap))


def _open_rows(count: int, budget: int, known: Bool[np.ndarray, " lists"] | None) -> Int[np.ndarray, " open"]:
    """Rows whose answer is not stored yet; the budget must fit into them."""
    if known is not None and known.shape != (count,):
        raise UsageError(f"known has shape {list(known.shape)}; expected one flag for each of {count} lists.")
    rows = np.arange(count) if known is None else np.flatnonzero(~known)
    if not 0 <= budget <= len(rows):
        raise UsageError(f"budget {budget}: expected 0 to {len(rows)}, the number of lists not asked about yet.")
    return rows


def _checked(
    scores: Float[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None
) -> tuple[Float[np.ndarray, "lists items"], Bool[np.ndarray, "lists items"]]:
    """Scores in float64 with masked ones 0, and the mask."""
    if scores.ndim != 2:
        raise UsageError(f"scores have shape {list(scores.shape)}; expected [lists, items].")
    valid = np.ones(scores.shape, dtype=bool) if mask is None else mask
    if valid.shape != scores.shape:
        raise UsageError(f"mask has shape {list(valid.shape)}; expected that of the scores, {list(scores.shape)}.")
    out = np.where(valid, scores, 0).astype(np.float64)
    if np.isnan(out).any():
        raise UsageError(f"{int(np.isnan(out).sum())} valid scores are not numbers; mask items without a score.")
    return out, valid


def _softmax(
    scores: Float[np.ndarray, "lists items"], valid: Bool[np.ndarray, "lists items"]
) -> Float[np.ndarray, "lists items"]:
    """Soft-max over the valid items; 0 at the others."""
    top = np.max(scores, axis=1, keepdims=True, initial=-np.inf, where=valid)
    powers = np.where(valid, np.exp(np.minimum(scores - np.where(np.isfinite(top), top, 0), 0)), 0.0)
    return np.asarray(powers / np.maximum(powers.sum(1, keepdims=True), np.finfo(np.float64).tiny))


def _sigmoid(scores: Float[np.ndarray, "lists items"]) -> Float[np.ndarray, "lists items"]:
    """1 / (1 + exp(-s)) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -scores)))
