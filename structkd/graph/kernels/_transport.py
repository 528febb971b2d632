"""Numba kernel: exact optimal transport between the neighbourhoods at the two ends of an edge."""

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def _common(columns, start_a, end_a, start_b, end_b):  # pragma: no cover
    """Whether two sorted rows share an entry."""
    a, b = start_a, start_b
    while a < end_a and b < end_b:
        if columns[a] == columns[b]:
            return True
        if columns[a] < columns[b]:
            a += 1
        else:
            b += 1
    return False


@njit(cache=True, nogil=True)
@no_type_check
def _distance(starts, columns, a, b):  # pragma: no cover
    """Steps between two nodes that are known to be at most 3 apart."""
    if a == b:
        return 0
    place = starts[a] + np.searchsorted(columns[starts[a] : starts[a + 1]], b)
    if place < starts[a + 1] and columns[place] == b:
        return 1
    return 2 if _common(columns, starts[a], starts[a + 1], starts[b], starts[b + 1]) else 3


@njit(cache=True, nogil=True)
@no_type_check
def transport(cost, supply, demand):  # pragma: no cover
    """Least sum of cost * flow that moves `supply` to `demand` (whole numbers of one total), by shortest paths.

    Successive shortest augmenting paths with potentials over the dense bipartite graph of sources and sinks.
    """
    sources, sinks = cost.shape
    flow = np.zeros((sources, sinks), dtype=np.int64)
    left, wanted = supply.copy(), demand.copy()
    high, low = np.zeros(sources), np.zeros(sinks)  # potentials
    total, remaining = 0.0, left.sum()
    far = 1e18
    while remaining > 0:
        to_source, to_sink = np.full(sources, far), np.full(sinks, far)
        from_sink, from_source = np.full(sources, -1), np.full(sinks, -1)
        done_source, done_sink = np.zeros(sources, dtype=np.bool_), np.zeros(sinks, dtype=np.bool_)
        for i in range(sources):
            if left[i] > 0:
                to_source[i] = 0.0
        while True:
            best, kind, at = far, 0, -1
            for i in range(sources):
                if not done_source[i] and to_source[i] < best:
                    best, kind, at = to_source[i], 0, i
            for j in range(sinks):
                if not done_sink[j] and to_sink[j] < best:
                    best, kind, at = to_sink[j], 1, j
            if at < 0:
                break
            if kind == 0:
                done_source[at] = True
                for j in range(sinks):
                    length = best + cost[at, j] + high[at] - low[j]
                    if length < to_sink[j] - 1e-12:
                        to_sink[j], from_source[j] = length, at
            else:
                done_sink[at] = True
                for i in range(sources):
                    if flow[i, at] > 0:
                        length = best - cost[i, at] - high[i] + low[at]
                        if length < to_source[i] - 1e-12:
                            to_source[i], from_sink[i] = length, at
        end, shortest = -1, far
        for j in range(sinks):
            if wanted[j] > 0 and to_sink[j] < shortest:
                end, shortest = j, to_sink[j]
        for i in range(sources):
            high[i] += min(to_source[i], shortest)
        for j in range(sinks):
            low[j] += min(to_sink[j], shortest)
        amount, j = wanted[end], end
        while True:
            i = from_source[j]
            if from_sink[i] < 0:
                amount = min(amount, left[i])
                break
            j = from_sink[i]
            amount = min(amount, flow[i, j])
        wanted[end] -= amount
        j = end
        while True:
            i = from_source[j]
            flow[i, j] += amount
            if from_sink[i] < 0:
                left[i] -= amount
                break
            j = from_sink[i]
            flow[i, j] -= amount
        remaining -= amount
    for i in range(sources):
        for j in range(sinks):
            total += cost[i, j] * flow[i, j]
    return total


@njit(cache=True, nogil=True)
@no_type_check
def edge_curvature(starts, columns, idleness, out):  # pragma: no cover
    """Fill out[position] for every directed edge i < j with 1 - W1(m_i, m_j), and its mirror image.

    m_i puts `idleness` parts of d_i + idleness on i and one part on each neighbour.
    """
    for i in range(len(starts) - 1):
        for position in range(starts[i], starts[i + 1]):
            j = columns[position]
            if j <= i:
                continue
            here, there = starts[i + 1] - starts[i], starts[j + 1] - starts[j]
            first, second = np.empty(here + 1, dtype=np.int64), np.empty(there + 1, dtype=np.int64)
            first[:here], second[:there] = columns[starts[i] : starts[i + 1]], columns[starts[j] : starts[j + 1]]
            first[here], second[there] = i, j
            cost = np.empty((here + 1, there + 1))
            for a in range(here + 1):
                for b in range(there + 1):
                    cost[a, b] = _distance(starts, columns, first[a], second[b])
            mass_first, mass_second = here + idleness, there + idleness
            supply = np.full(here + 1, mass_second, dtype=np.int64)
            demand = np.full(there + 1, mass_first, dtype=np.int64)
            supply[here] *= idleness
            demand[there] *= idleness
            value = 1 - transport(cost, supply, demand) / (mass_first * mass_second)
            out[position] = value
            mirror = starts[j] + np.searchsorted(columns[starts[j] : starts[j + 1]], i)
            out[mirror] = value
