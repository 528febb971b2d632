"""Numba kernels of dropout on CPU, in one pass over the values, forward and through a soft-max's backward."""

from typing import no_type_check

from numba import njit

from structkd.kernels import FAST, draw, row_key


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def drop(x, first, low, high, limit, scale, out):  # pragma: no cover
    """out = scale * x where a draw reaches `limit`, else 0; rows count from `first`. `out` may be x."""
    zero = x.dtype.type(0)
    for row in range(x.shape[0]):
        key = row_key(first + row, low, high)
        for column in range(x.shape[1]):
            out[row, column] = zero if draw(key, column) < limit else x[row, column] * scale


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def soft_max_slope(shares, gradient, first, low, high, limit, scale):  # pragma: no cover
    """The gradient of dropped soft-max shares becomes, in place, that of the scores under the soft-max."""
    zero = shares.dtype.type(0)
    for row in range(shares.shape[0]):
        key, total = row_key(first + row, low, high), zero
        for column in range(shares.shape[1]):
            passed = zero if draw(key, column) < limit else gradient[row, column] * scale
            gradient[row, column] = passed
            total += passed * shares[row, column]
        for column in range(shares.shape[1]):
            gradient[row, column] = shares[row, column] * (gradient[row, column] - total)
