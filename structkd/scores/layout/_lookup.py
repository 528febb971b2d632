"""Find many (query row, document row) pairs in a CSR: a numba kernel and its numpy twin. Gather rows of logits.

The kernels are serial on purpose: on batches of a few thousand pairs waking threads costs twenty times the search.
They release the interpreter lock, so data-loader threads and processes run it side by side.
"""

from typing import no_type_check

import numba
import numpy as np
from numpy.typing import NDArray

from structkd.scores.layout.document_rows import DocumentRows, PackedRows

IntArray = NDArray[np.int64]

_WHOLE: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)


@numba.njit(nogil=True, inline="always")
@no_type_check
def _row(low, high, place):
    """One document row; `high` is empty where rows are whole in `low`."""
    return np.int64(low[place]) | (np.int64(high[place]) << 16) if len(high) else np.int64(low[place])


@numba.njit(nogil=True, cache=True)
@no_type_check
def _find(slots, offsets, rows_low, rows_high, query_rows, document_rows, base, positions):
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
            if _row(rows_low, rows_high, middle) < wanted:
                low = middle + 1
            else:
                high = middle
        if low < end and _row(rows_low, rows_high, low) == wanted:
            positions[i] = base + low


def find_numba(
    slots: NDArray[np.int32],
    offsets: NDArray[np.int32],
    documents: DocumentRows,
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
    low, high = (documents.low, documents.high) if isinstance(documents, PackedRows) else (documents, _WHOLE)
    _find(slots, offsets, low, high, query_rows, document_rows, base, positions)


def find_numpy(
    slots: NDArray[np.int32],
    offsets: NDArray[np.int32],
    documents: DocumentRows,
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


@numba.njit(nogil=True, cache=True)
@no_type_check
def _widen(halves, rows, bits, out):
    """Rows of half floats as float32: their bits in place of a float's, then times 2^112 for the exponent's bias.

    Each line of 32 rows is touched before the first is widened: memory then answers side by side, not in turn (twice
    the speed; `benchmarks/bench_score_store.py`). Returns what it touched, or the compiler would leave that out.
    """
    scale, width, touched = np.float32(2.0**112), halves.shape[1], np.uint32(0)
    for start in range(0, len(rows), 32):
        end = min(len(rows), start + 32)
        for i in range(start, end):
            for j in range(0, width, 32):
                touched += np.uint32(halves[rows[i], j])
            touched += np.uint32(halves[rows[i], width - 1])
        for i in range(start, end):
            row = rows[i]
            for j in range(width):
                half = np.uint32(halves[row, j])
                sign = (half & np.uint32(0x8000)) << np.uint32(16)
                bits[i, j] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | sign
            for j in range(width):
                out[i, j] *= scale
    return touched


@numba.njit(nogil=True, cache=True)
@no_type_check
def _copy(values, rows, out):
    """Rows of float32."""
    for i in range(len(rows)):
        row = rows[i]
        for j in range(values.shape[1]):
            out[i, j] = values[row, j]


def gather_rows(values: NDArray[np.floating], rows: IntArray, out: NDArray[np.float32]) -> None:
    """Write rows of finite float16 or float32 logits into `out`; the caller has checked the range.

    numpy gathers half floats into a copy and widens that value by value: a fifth of the speed.
    """
    if not values.shape[1]:
        return
    if values.dtype == np.float16:
        _widen(values.view(np.uint16), rows, out.view(np.uint32), out)
    else:
        _copy(values, rows, out)
