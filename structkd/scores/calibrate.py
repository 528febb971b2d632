"""Bring several teachers to one scale before they are combined: per list, or against judgements."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import UsageError

FloatArray = NDArray[np.float64]
Calibration = Literal["none", "z-score", "min-max", "rank", "isotonic"]
Lists = Mapping[str, Mapping[str, float]]


def z_scores(scores: FloatArray) -> FloatArray:
    """(s - mean) / deviation of the list; zeros where all are equal."""
    deviation = scores.std()
    return np.zeros_like(scores) if deviation == 0 else (scores - scores.mean()) / deviation


def min_max(scores: FloatArray) -> FloatArray:
    """0 for the list's lowest score, 1 for its highest; .5 where all are equal."""
    low, high = scores.min(), scores.max()
    return np.full_like(scores, 0.5) if low == high else (scores - low) / (high - low)


def ranks(scores: FloatArray) -> FloatArray:
    """1 for the best of the list down to 0 for its last, by rank; tied scores share their mean rank."""
    if len(scores) == 1:
        return np.ones(1)
    values, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    del values
    return np.asarray((below + (counts - 1) / 2)[place] / (len(scores) - 1))


LIST_RULES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "none": lambda scores: scores,
    "z-score": z_scores,
    "min-max": min_max,
    "rank": ranks,
}
"Calibrations that need the list alone."


def isotonic(scores: FloatArray, targets: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """The non-decreasing function of least squared error from scores to targets (pool adjacent violators).

    Between the pooled means it is linear, beyond the ends it is constant.

    Raises:
        UsageError: fewer than two different scores.
    """
    xs, place = np.unique(scores, return_inverse=True)
    if len(xs) < 2:
        raise UsageError(f"isotonic calibration: {len(xs)} different judged scores; at least 2 are needed.")
    weights = np.bincount(place).astype(np.float64)
    means = np.bincount(place, targets) / weights
    blocks: list[list[float]] = []  # mean, weight, count of xs
    for mean, weight in zip(means.tolist(), weights.tolist(), strict=True):
        blocks.append([mean, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            upper, lower = blocks.pop(), blocks[-1]
            total = lower[1] + upper[1]
            blocks[-1] = [(lower[0] * lower[1] + upper[0] * upper[1]) / total, total, lower[2] + upper[2]]
    fitted = np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])
    return lambda values: np.interp(values, xs, fitted)


def calibrated(lists: Lists, rule: Calibration, grades: Mapping[str, Mapping[str, int]] | None = None) -> Lists:
    """A teacher's lists on the scale of a rule.

    Args:
        lists: query -> document -> score.
        rule: of the lists, or "isotonic" against `grades`.
        grades: judgements, for isotonic alone.

    Raises:
        UsageError: isotonic without a judged pair among the lists.
    """
    if rule != "isotonic":
        by_list = LIST_RULES[rule]
        return {query: _mapped(found, by_list) for query, found in lists.items()}
    judged = [
        (score, grades[query][document])
        for query, found in lists.items()
        if grades and query in grades
        for document, score in found.items()
        if document in grades[query]
    ]
    if not judged:
        raise UsageError("isotonic calibration needs judgements of these pairs: name their --collection and --split.")
    scores, targets = np.asarray(judged, dtype=np.float64).T
    fitted = isotonic(scores, targets)
    return {query: _mapped(found, fitted) for query, found in lists.items()}


def _mapped(found: Mapping[str, float], rule: Callable[[FloatArray], FloatArray]) -> dict[str, float]:
    values = rule(np.asarray(list(found.values()), dtype=np.float64))
    return dict(zip(found, values.tolist(), strict=True))
