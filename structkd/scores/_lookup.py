"""Find many (query row, document row) pairs in a CSR: a numba kernel and its numpy twin.

The kernel is serial on purpose: on batches of a few thousand pairs waking threads costs twenty times the search.
It releases the interpreter lock, so data-loader threads and processes run it side by side.
"""

from typing import no_type_check

import numba
import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@numba.njit(nogil=True, cache=True)
@no_type_check
def _find(slots, offsets, documents, query_rows, document_rows, base, positions):
    """Binary search of each document in its query's sorted slice; `positions` keeps its value where absent."""
    for i in range(len(query_rows)):
        query = query_rows[i]
        if query < 0 or query >= len(slots):
            continue
        slot = slots[query]
        if slot < 0:
            continue
        wanted = document_rows[i]
        low = np.int64(offsets[slot])
        end = np.int64(offsets[slot + 1])
        high = end
        while low < high:
            middle = (low + high) >> 1
            if np.int64(documents[middle]) < wanted:
                low = middle + 1
            else:
                high = middle
        if low < end and np.int64(documents[low]) == wanted:
            positions[i] = base + low


def find_numba(
    slots: NDArray[np.int32],
    offsets: NDArray[np.int32],
    documents: NDArray[np.uint32],
    query_rows: IntArray,
    document_rows: IntArray,
    base: int,
    positions: IntArray,
) -> None:
    """Write base + position of each pair into `positions` (unchanged where the pair is absent).

    Args:
        slots: [query rows] list number of a query row, -1 when it has none here.
        offsets: [lists + 1] start of each list in `documents`.
        documents: [values] document rows, ascending within a list.
        query_rows: [pairs]; rows outside `slots` count as absent.
        document_rows: [pairs].
        base: added to each position found.
        positions: [pairs], written in place.
    """
    _find(slots, offsets, documents, query_rows, document_rows, base, positions)


def find_numpy(
    slots: NDArray[np.int32],
    offsets: NDArray[np.int32],
    documents: NDArray[np.uint32],
    query_rows: IntArray,
    document_rows: IntArray,
    base: int,
    positions: IntArray,
) -> None:
    """`find_numba` without numba: all binary searches advance in lockstep."""
    inside = (query_rows >= 0) & (query_rows < len(slots))
    slot = np.where(inside, slots[np.where(inside, query_rows, 0)], -1) if len(slots) else np.full(len(inside), -1)
    which = np.flatnonzero(slot >= 0)
    if not len(which):
        return
    slot, wanted = slot[which], document_rows[which]
    low, end = offsets[slot].astype(np.int64), offsets[slot + 1].astype(np.int64)
    length = end - low
    last = len(documents) - 1
    while True:
        if not (length > 0).any():
            break
        half = length >> 1
        middle = low + half
        smaller = (length > 0) & (documents[np.minimum(middle, last)] < wanted)
        low = np.where(smaller, middle + 1, low)
        length = np.where(smaller, length - half - 1, half)
    found = (low < end) & (documents[np.minimum(low, last)] == wanted)
    positions[which[found]] = base + low[found]
