"""THE tie rule: score descending, then document id ascending (as a string). Search, runs and evaluation use it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.ids import Ids

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


def tie_rank(ids: Sequence[str] | Ids) -> IntArray:
    """Rank of each id in ascending string order; the numeric form of the second half of the rule."""
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)] = np.arange(len(ids))
    return rank


def order(scores: FloatArray, ties: IntArray) -> IntArray:
    """Positions of one list in ranking order.

    Args:
        scores: [items]; not-a-number is refused, since it has no place in an order.
        ties: [items], `tie_rank` of the items' document ids.
    """
    if np.isnan(scores).any():
        raise DataError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} scores are not numbers; they cannot be ranked."
        )
    # negating floats keeps infinities; lexsort's last key is the first criterion
    return np.lexsort((ties, -np.asarray(scores, dtype=np.float64)))


def order_ids(scores: FloatArray, ids: Sequence[str]) -> IntArray:
    """`order` for a list given by its document ids."""
    return order(scores, tie_rank(ids))


def top_k(scores: FloatArray, k: int, ties: IntArray) -> IntArray:
    """The first k positions of `order(scores, ties)`, without sorting what cannot be among them.

    The k-th largest score is found by selection; everything strictly above it is in, and the items that tie with
    it compete by id, so the result is exact even when hundreds of scores are equal.
    """
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    if k >= len(scores):
        return order(scores, ties)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= threshold)
    if len(candidates) < k:  # only not-a-number can hide from the comparison
        return order(scores, ties)[:k]
    return candidates[order(scores[candidates], ties[candidates])[:k]]


def rank_as_scores(count: int) -> IntArray:
    """n, n-1, ..., 1: what an already ordered list hands to an evaluation tool, whose own tie rule then never acts."""
    return np.arange(count, 0, -1, dtype=np.int64)
