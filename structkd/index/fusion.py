"""Hybrid search: several runs over the same documents become one, by rank or by score."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError, UsageError
from structkd.ordering import order_ids
from structkd.trec import Run

RANK_CONSTANT = 60.0

Value = Callable[
    [int, NDArray[np.float64]], NDArray[np.float64]
]  # position of the run, its list's scores -> what counts


def reciprocal_rank(
    runs: Sequence[Run],
    *,
    constant: float = RANK_CONSTANT,
    weights: Sequence[float] | None = None,
    depth: int | None = None,
) -> Run:
    """Reciprocal rank fusion: score(d) = sum over runs of weight / (constant + rank of d), 0 where a run lacks d.

    Cormack, Clarke and Buettcher 2009 (SIGIR), with their constant of 60. Only ranks count, so the runs may come from
    models whose scores have nothing in common. Ranks start at 1 and follow the order of the run.

    Args:
        runs: at least one; a query that some run lacks is fused from the others.
        constant: the larger, the less the first ranks stand out.
        weights: one per run; all 1 when None.
        depth: how many documents of each list count; all when None.

    Raises:
        UsageError: no runs, a weight, the constant or the depth out of range, or not one weight per run.
    """
    factors = _weights(runs, weights)
    if not (np.isfinite(constant) and constant >= 0):
        raise UsageError(f"constant is {constant}; expected a number of at least 0.")

    def value(run: int, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return factors[run] / (constant + np.arange(1, len(scores) + 1, dtype=np.float64))

    return _fused(runs, depth, value)


def weighted(
    runs: Sequence[Run], weights: Sequence[float] | None = None, *, normalise: str = "min-max", depth: int | None = None
) -> Run:
    """Weighted sum of scores: score(d) = sum over runs of weight * normalised score, 0 where a run lacks d.

    min-max maps each list to [0, 1] (Fox and Shaw 1994, CombSUM over normalised scores): (s - min) / (max - min), and 1
    for a list of equal scores; "z-score" gives (s - mean) / standard deviation, with the list's smallest value for a
    document that the run lacks (0 would be average); "none" adds raw scores, again with the list's smallest for absent
    documents.

    Args:
        runs: at least one; a query that some run lacks is fused from the others.
        weights: one per run; all 1 when None.
        normalise: min-max, z-score or none.
        depth: how many documents of each list count; all when None.

    Raises:
        UsageError: no runs, an unknown normalisation, a depth below 1, or not one weight per run.
        DataError: a score is not finite.
    """
    factors = _weights(runs, weights)
    if normalise not in _NORMALISE:
        raise UsageError(f"normalise {normalise!r} is unknown; expected one of {', '.join(_NORMALISE)}.")
    change = _NORMALISE[normalise]

    def value(run: int, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        if not np.isfinite(scores).all():
            raise DataError(f"run {run + 1}: a score is not finite; it cannot be added. Fuse by rank instead.")
        return factors[run] * change(scores)

    return _fused(runs, depth, value, absent="zero" if normalise == "min-max" else "smallest")


def _min_max(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    span = scores.max() - scores.min()
    return (scores - scores.min()) / span if span > 0 else np.ones_like(scores)


def _z_score(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 0 else np.zeros_like(scores)


def _as_is(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return scores


_NORMALISE = {"min-max": _min_max, "z-score": _z_score, "none": _as_is}


def _weights(runs: Sequence[Run], weights: Sequence[float] | None) -> list[float]:
    if not runs:
        raise UsageError("found no runs to fuse; give at least one.")
    factors = [1.0] * len(runs) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(runs):
        raise UsageError(f"found {len(factors)} weights for {len(runs)} runs; give one weight per run.")
    if not all(np.isfinite(factors)):
        raise UsageError(f"weights {factors}: expected finite numbers.")
    return factors


def _fused(runs: Sequence[Run], depth: int | None, value: Value, absent: str = "zero") -> Run:
    """Add up what each run gives to each document of a query; queries in order of appearance."""
    if depth is not None and depth < 1:
        raise UsageError(f"depth is {depth}; expected a whole number of at least 1.")
    lists = {}
    for query in dict.fromkeys(query for run in runs for query in run.lists):
        total: dict[str, float] = {}
        given: list[tuple[dict[str, float], float]] = []
        for position, run in enumerate(runs):
            documents, scores = run.lists.get(query, ([], np.empty(0)))
            documents, scores = documents[:depth], scores[:depth]
            if not len(documents):
                continue
            values = value(position, scores)
            missing = float(values.min()) if absent == "smallest" else 0.0
            given.append((dict(zip(documents, values.tolist(), strict=True)), missing))
        for listed, _ in given:
            total |= dict.fromkeys(listed, 0.0)
        for listed, missing in given:
            for document in total:
                total[document] += listed.get(document, missing)
        names, sums = list(total), np.fromiter(total.values(), dtype=np.float64, count=len(total))
        order = order_ids(sums, names)
        lists[query] = ([names[place] for place in order], sums[order])
    return Run(lists)
