"""Numba kernels over half edges (i < j), CPU: the pairwise-difference divergence with its gradient in one pass."""

import math
from typing import no_type_check

import numpy as np
from numba import njit

from structkd.kernels import FAST


@njit(cache=True, nogil=True, inline="always", fastmath=FAST)
@no_type_check
def _soften(logits, i, j, sharpness, difference, soft):  # pragma: no cover
    """Fill difference = |logits_i - logits_j| * sharpness and its softmax; returns the log normaliser."""
    classes = logits.shape[1]
    largest = logits.dtype.type(0)
    for c in range(classes):
        value = abs(logits[i, c] - logits[j, c]) * sharpness
        difference[c] = value
        if value > largest:
            largest = value
    total = logits.dtype.type(0)
    for c in range(classes):
        value = math.exp(difference[c] - largest)
        soft[c] = value
        total += value
    scale = logits.dtype.type(1) / total
    for c in range(classes):
        soft[c] *= scale
    return float(largest + math.log(total))


@njit(cache=True, nogil=True, inline="always", fastmath=FAST)
@no_type_check
def _pull(student, i, j, soft, wanted, sharpness, gradient):  # pragma: no cover
    """Add the gradient of one edge, (q - p) * sharpness along the sign of each difference, to both of its ends."""
    zero = student.dtype.type(0)
    for c in range(student.shape[1]):
        slope = (soft[c] - wanted[c]) * sharpness
        gap = student[i, c] - student[j, c]
        signed = slope if gap > zero else (-slope if gap < zero else zero)
        gradient[i, c] += signed
        gradient[j, c] -= signed


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def difference_targets(starts, columns, teacher, sharpness, soft):  # pragma: no cover
    """Fill soft [half edges, classes] with the teacher's side; returns the sum of p log p over edges."""
    classes = teacher.shape[1]
    difference = np.empty(classes, dtype=teacher.dtype)
    total = 0.0
    for i in range(len(starts) - 1):
        for position in range(starts[i], starts[i + 1]):
            normaliser = _soften(teacher, i, columns[position], sharpness, difference, soft[position])
            inner = 0.0
            for c in range(classes):
                inner += soft[position, c] * difference[c]
            total += inner - normaliser
    return total


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def difference_divergence(starts, columns, targets, student, sharpness, gradient):  # pragma: no cover
    """Sum over half edges of the cross-entropy -sum_c p log q; adds its gradient to `gradient` in the same pass."""
    classes = student.shape[1]
    difference = np.empty(classes, dtype=student.dtype)
    soft = np.empty(classes, dtype=student.dtype)
    zero = student.dtype.type(0)
    total = 0.0
    for i in range(len(starts) - 1):
        for position in range(starts[i], starts[i + 1]):
            j = columns[position]
            normaliser = _soften(student, i, j, sharpness, difference, soft)
            inner = zero
            for c in range(classes):
                inner += targets[position, c] * difference[c]
            _pull(student, i, j, soft, targets[position], sharpness, gradient)
            total += normaliser - inner
    return total


@njit(cache=True, nogil=True, fastmath=FAST)
@no_type_check
def difference_divergence_recomputed(starts, columns, teacher, student, sharpness, gradient):  # pragma: no cover
    """Sum over half edges of KL(p || q), the teacher's side recomputed: no memory of the size of the edge list."""
    classes = student.shape[1]
    wanted_difference = np.empty(classes, dtype=student.dtype)
    wanted = np.empty(classes, dtype=student.dtype)
    difference = np.empty(classes, dtype=student.dtype)
    soft = np.empty(classes, dtype=student.dtype)
    zero = student.dtype.type(0)
    total = 0.0
    for i in range(len(starts) - 1):
        for position in range(starts[i], starts[i + 1]):
            j = columns[position]
            wanted_normaliser = _soften(teacher, i, j, sharpness, wanted_difference, wanted)
            normaliser = _soften(student, i, j, sharpness, difference, soft)
            inner = zero
            for c in range(classes):
                inner += wanted[c] * (wanted_difference[c] - difference[c])
            _pull(student, i, j, soft, wanted, sharpness, gradient)
            total += inner - wanted_normaliser + normaliser
    return total
