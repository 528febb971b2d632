"""Numba kernels of a layer on CPU: sparse rows times a dense matrix, and relu with dropout in one pass."""

from typing import no_type_check

from numba import njit

from structkd.kernels import FAST, draw, row_key


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def multiply_rows(starts, columns, values, dense, out):  # pragma: no cover
    """out = (compressed rows) @ dense; four entries of a row at a time, so a row of out is read and written less."""
    width = out.shape[1]
    for i in range(len(starts) - 1):
        mine = out[i]
        for c in range(width):
            mine[c] = 0
        place, end = starts[i], starts[i + 1]
        while place + 4 <= end:
            first, second = dense[columns[place]], dense[columns[place + 1]]
            third, fourth = dense[columns[place + 2]], dense[columns[place + 3]]
            a, b, e, f = values[place], values[place + 1], values[place + 2], values[place + 3]
            for c in range(width):
                mine[c] += a * first[c] + b * second[c] + e * third[c] + f * fourth[c]
            place += 4
        while place < end:
            one, factor = dense[columns[place]], values[place]
            for c in range(width):
                mine[c] += factor * one[c]
            place += 1


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def relu_dropout(x, low, high, limit, scale, out):  # pragma: no cover
    """out = scale * relu(x) where a draw reaches `limit`, else 0; the draw is a hash of row, column and two words."""
    zero = x.dtype.type(0)
    for i in range(x.shape[0]):
        key = row_key(i, low, high)
        for c in range(x.shape[1]):
            value = x[i, c]
            out[i, c] = zero if draw(key, c) < limit or value <= zero else value * scale


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def relu_dropout_slope(gradient, out, scale, slope):  # pragma: no cover
    """slope = scale * gradient where out is not 0, else 0."""
    zero = out.dtype.type(0)
    for i in range(out.shape[0]):
        for c in range(out.shape[1]):
            slope[i, c] = gradient[i, c] * scale if out[i, c] != zero else zero
