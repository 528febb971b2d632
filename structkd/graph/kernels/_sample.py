"""Numba kernels over compressed rows (starts, columns), CPU: neighbour sampling, neighbour sums, cleaning of edges."""

from typing import no_type_check

import numpy as np
from numba import njit

_STEP, _MIX_A, _MIX_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WORD = np.uint64(0xFFFFFFFF)


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _mixed(state):  # pragma: no cover
    """SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_A
    state = (state ^ (state >> np.uint64(27))) * _MIX_B
    return state ^ (state >> np.uint64(31))


@njit(cache=True, nogil=True)
@no_type_check
def _below(state, limit):  # pragma: no cover
    """A uniform whole number below `limit` and the next state, without modulo bias (Lemire, TOMACS 2019)."""
    wide = np.uint64(limit)
    threshold = ((_WORD - wide) + np.uint64(1)) % wide
    while True:
        state += _STEP
        product = (_mixed(state) >> np.uint64(32)) * wide
        if (product & _WORD) >= threshold:
            return state, np.int64(product >> np.uint64(32))


@njit(cache=True, nogil=True)
@no_type_check
def block_starts(starts, targets, fan_out, out):  # pragma: no cover
    """Fill out[k + 1] with the entries of targets[0 .. k]: min(degree, fan_out) each; fan_out < 0 takes all."""
    out[0] = 0
    for k in range(len(targets)):
        degree = starts[targets[k] + 1] - starts[targets[k]]
        out[k + 1] = out[k] + (degree if fan_out < 0 or degree < fan_out else fan_out)


@njit(cache=True, nogil=True)
@no_type_check
def draw(starts, columns, targets, seed, block, out):  # pragma: no cover
    """Fill out[block[k] : block[k + 1]] with that many different neighbours of targets[k], uniformly (Floyd).

    The draw depends on the seed and the node alone, so neither the batch nor the thread changes it.
    """
    for k in range(len(targets)):
        first = starts[targets[k]]
        degree = starts[targets[k] + 1] - first
        begin = block[k]
        count = block[k + 1] - begin
        if count == degree:
            for position in range(count):
                out[begin + position] = columns[first + position]
            continue
        state = _mixed(_mixed(np.uint64(seed) * _MIX_B + _STEP) + np.uint64(targets[k]) * _STEP)
        for filled in range(count):
            last = degree - count + filled
            state, chosen = _below(state, last + 1)
            for earlier in range(filled):
                if out[begin + earlier] == chosen:
                    chosen = last
                    break
            out[begin + filled] = chosen
        for position in range(count):
            out[begin + position] = columns[first + out[begin + position]]


@njit(cache=True, nogil=True)
@no_type_check
def renumber(targets, drawn, place, sources):  # pragma: no cover
    """Replace global rows in `drawn` by local ones; fill `sources` with targets, then others as they first appear.

    `place` [nodes] is scratch of -1 and is left so. Returns the number of sources.
    """
    for k in range(len(targets)):
        place[targets[k]] = k
        sources[k] = targets[k]
    count = len(targets)
    for position in range(len(drawn)):
        node = drawn[position]
        if place[node] < 0:
            place[node] = count
            sources[count] = node
            count += 1
        drawn[position] = place[node]
    for k in range(count):
        place[sources[k]] = -1
    return count


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
@no_type_check
def neighbour_sums(starts, columns, signal, column_scale, row_scale, loop, first, out):  # pragma: no cover
    """out[i - first] = row_scale_i (sum_j column_scale_j signal_j + loop column_scale_i signal_i), a block of rows."""
    width = signal.shape[1]
    for k in range(len(out)):
        i = first + k
        own = loop * column_scale[i]
        for c in range(width):
            out[k, c] = own * signal[i, c]
        for position in range(starts[i], starts[i + 1]):
            j = columns[position]
            scale = column_scale[j]
            for c in range(width):
                out[k, c] += scale * signal[j, c]
        for c in range(width):
            out[k, c] *= row_scale[i]


@njit(cache=True, nogil=True)
@no_type_check
def counted_rows(rows, columns, starts):  # pragma: no cover
    """Add to starts[i + 1] the entries that row i takes from both directions of each edge; loops are left out."""
    for position in range(len(rows)):
        if rows[position] != columns[position]:
            starts[rows[position] + 1] += 1
            starts[columns[position] + 1] += 1


@njit(cache=True, nogil=True)
@no_type_check
def placed_columns(rows, columns, cursor, out):  # pragma: no cover
    """Write both directions of each edge to where `cursor` says; loops are left out."""
    for position in range(len(rows)):
        i, j = rows[position], columns[position]
        if i != j:
            out[cursor[i]] = j
            cursor[i] += 1
            out[cursor[j]] = i
            cursor[j] += 1


@njit(cache=True, nogil=True)
@no_type_check
def sorted_rows(starts, columns):  # pragma: no cover
    """Sort each row, drop repeats, close the gaps; `starts` and `columns` change in place. Returns the entries left."""
    filled = 0
    begin = starts[0]
    for i in range(len(starts) - 1):
        end = starts[i + 1]
        row = np.sort(columns[begin:end])
        starts[i] = filled
        for k in range(len(row)):
            if k == 0 or row[k] != row[k - 1]:
                columns[filled] = row[k]
                filled += 1
        begin = end
    starts[len(starts) - 1] = filled
    return filled
