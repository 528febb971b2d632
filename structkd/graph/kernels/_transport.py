"""Numba kernels: exact optimal transport between the neighbourhoods at the two ends of an edge."""

from typing import no_type_check

import numpy as np
from numba import njit

BALL_BYTES = 1 << 29
"Most memory of the table that tells at once which nodes are two steps apart; a larger graph merges rows instead."


@no_type_check
def edge_curvature(starts, columns, idleness, out):
    """Fill out[position] for every directed edge i < j with 1 - W1(m_i, m_j), and its mirror image.

    m_i puts `idleness` parts of d_i + idleness on i and one part on each neighbour.
    """
    nodes = len(starts) - 1
    words = (nodes + 63) // 64
    balls = np.zeros((nodes, words) if nodes * words * 8 <= BALL_BYTES else (0, 0), dtype=np.uint64)
    _fill(starts, columns, idleness, balls, out)


@njit(cache=True, nogil=True)
@no_type_check
def _fill(starts, columns, idleness, balls, out):  # pragma: no cover
    nodes = len(starts) - 1
    if len(balls):
        _mark_balls(starts, columns, balls)
    touched = np.full(nodes, -1)  # whose neighbour a node is, for the row of costs at hand
    excess = np.zeros(nodes, dtype=np.int64)  # m_i - m_j in parts of the product of both totals
    for i in range(nodes):
        for position in range(starts[i], starts[i + 1]):
            j = columns[position]
            if j <= i:
                continue
            mass_i, mass_j = starts[i + 1] - starts[i] + idleness, starts[j + 1] - starts[j] + idleness
            excess[i] += idleness * mass_j
            excess[j] -= idleness * mass_i
            for place in range(starts[i], starts[i + 1]):
                excess[columns[place]] += mass_j
            for place in range(starts[j], starts[j + 1]):
                excess[columns[place]] -= mass_i
            # steps are a metric: mass that both have at a node stays there, and i and j are neighbours of each other
            sources, supply = _kept(starts, columns, i, excess, 1)
            sinks, demand = _kept(starts, columns, j, excess, -1)
            excess[i] = excess[j] = 0
            for end in (i, j):
                for place in range(starts[end], starts[end + 1]):
                    excess[columns[place]] = 0
            cost = np.empty((len(sources), len(sinks)), dtype=np.int8)
            for row in range(len(sources)):
                source = sources[row]
                for place in range(starts[source], starts[source + 1]):
                    touched[columns[place]] = source
                for column in range(len(sinks)):
                    sink = sinks[column]
                    cost[row, column] = (
                        1 if touched[sink] == source else 2 if _near(starts, columns, balls, source, sink) else 3
                    )
            value = 1 - transport(cost, supply, demand) / (mass_i * mass_j)
            out[position] = value
            out[starts[j] + np.searchsorted(columns[starts[j] : starts[j + 1]], i)] = value


@njit(cache=True, nogil=True)
@no_type_check
def _mark_balls(starts, columns, balls):  # pragma: no cover
    """Bit b of row a: some node is a neighbour of both."""
    for a in range(len(starts) - 1):
        for place in range(starts[a], starts[a + 1]):
            middle = columns[place]
            for other in range(starts[middle], starts[middle + 1]):
                b = columns[other]
                balls[a, b >> 6] |= np.uint64(1) << np.uint64(b & 63)


@njit(cache=True, nogil=True)
@no_type_check
def _near(starts, columns, balls, a, b):  # pragma: no cover
    """Whether some node is a neighbour of both."""
    if len(balls):
        return (balls[a, b >> 6] >> np.uint64(b & 63)) & np.uint64(1) == 1
    first, second = starts[a], starts[b]
    while first < starts[a + 1] and second < starts[b + 1]:
        if columns[first] == columns[second]:
            return True
        if columns[first] < columns[second]:
            first += 1
        else:
            second += 1
    return False


@njit(cache=True, nogil=True)
@no_type_check
def _kept(starts, columns, i, excess, sign):  # pragma: no cover
    """The nodes of a closed neighbourhood whose excess has this sign, and how much it is."""
    room = starts[i + 1] - starts[i] + 1
    nodes, masses, count = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64), 0
    for place in range(starts[i], starts[i + 1] + 1):
        node = columns[place] if place < starts[i + 1] else i
        mass = sign * excess[node]
        if mass > 0:
            nodes[count], masses[count] = node, mass
            count += 1
    return nodes[:count], masses[:count]


@njit(cache=True, nogil=True)
@no_type_check
def transport(cost, supply, demand):  # pragma: no cover
    """Least sum of cost * flow that moves `supply` to `demand`, all whole numbers, both of one total.

    Primal-dual: the length of a shortest augmenting path never falls and never exceeds the largest cost, since every
    source reaches every sink at once. So there are at most as many phases as costs differ, each a maximal flow over
    edges of no reduced cost (Dinic), and what is left for the last one needs no flow at all.
    """
    sources, sinks = cost.shape
    flow = np.zeros((sinks, sources), dtype=np.int64)  # always read along the sources of one sink
    left, wanted = supply.copy(), demand.copy()
    high, low = np.zeros(sources, dtype=np.int64), np.zeros(sinks, dtype=np.int64)  # potentials
    total, remaining = 0, left.sum()
    if remaining == 0:
        return total
    largest = np.int64(cost.max())
    while True:
        length = _shortest(cost, flow, left, wanted, high, low, largest)
        if length == largest:
            return total + largest * remaining
        moved = _saturate(cost, flow, left, wanted, high, low)
        total, remaining = total + length * moved, remaining - moved
        if remaining == 0:
            return total


@njit(cache=True, nogil=True)
@no_type_check
def _shortest(cost, flow, left, wanted, high, low, largest):  # pragma: no cover
    """Raise the potentials to the distances from what is left; the length of a shortest path to what is wanted."""
    sources, sinks = cost.shape
    far = largest + 1
    to_source, to_sink = np.full(sources, far), np.full(sinks, far)
    for i in range(sources):
        if left[i] > 0:
            to_source[i] = 0
    done_source, done_sink = np.zeros(sources, dtype=np.bool_), np.zeros(sinks, dtype=np.bool_)
    for distance in range(far):
        found = True
        while found:
            found = False
            for i in range(sources):
                if to_source[i] == distance and not done_source[i]:
                    done_source[i] = found = True
                    for j in range(sinks):
                        to_sink[j] = min(to_sink[j], distance + cost[i, j] + high[i] - low[j])
            for j in range(sinks):
                if to_sink[j] == distance and not done_sink[j]:
                    done_sink[j] = found = True
                    for i in range(sources):
                        if flow[j, i] > 0:  # of no reduced cost
                            to_source[i] = min(to_source[i], distance)
    nearest, end = far, 0
    for j in range(sinks):
        if wanted[j] > 0 and to_sink[j] < nearest:
            nearest, end = to_sink[j], j
    for i in range(sources):
        high[i] += min(to_source[i], nearest)
    for j in range(sinks):
        low[j] += min(to_sink[j], nearest)
    return low[end]


@njit(cache=True, nogil=True)
@no_type_check
def _saturate(cost, flow, left, wanted, high, low):  # pragma: no cover
    """A maximal flow over edges of no reduced cost; what it moved."""
    sources, sinks = cost.shape
    levels_source, levels_sink = np.empty(sources, dtype=np.int64), np.empty(sinks, dtype=np.int64)
    next_source, next_sink = np.empty(sources, dtype=np.int64), np.empty(sinks, dtype=np.int64)
    room = min(sources, sinks) + 1
    path_source, path_sink = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    moved = 0
    while _levels(cost, flow, left, wanted, high, low, levels_source, levels_sink):
        next_source[:], next_sink[:] = 0, 0
        for start in range(sources):
            path_source[0], depth = start, 0
            while left[start] > 0:
                i = path_source[depth]
                j = _next_sink(cost, high, low, levels_source, levels_sink, next_source, i)
                if j >= 0 and wanted[j] > 0:
                    path_sink[depth] = j
                    moved += _push(flow, left, wanted, path_source, path_sink, depth)
                    depth = 0
                    continue
                if j >= 0:
                    path_sink[depth] = j
                elif depth > 0:  # back to the sink that led here
                    depth -= 1
                    next_sink[path_sink[depth]] += 1
                else:
                    break
                # at a sink that wants no more: on through a source that serves it, or back
                i = _next_source(flow, levels_source, levels_sink, next_sink, path_sink[depth])
                if i >= 0:
                    depth += 1
                    path_source[depth] = i
                else:
                    next_source[path_source[depth]] += 1
    return moved


@njit(cache=True, nogil=True)
@no_type_check
def _next_sink(cost, high, low, levels_source, levels_sink, next_source, i):  # pragma: no cover
    """The sink a level on that source i tries next, -1 when it has tried all."""
    while next_source[i] < len(low):
        j = next_source[i]
        if levels_sink[j] == levels_source[i] + 1 and cost[i, j] + high[i] == low[j]:
            return j
        next_source[i] += 1
    return -1


@njit(cache=True, nogil=True)
@no_type_check
def _next_source(flow, levels_source, levels_sink, next_sink, j):  # pragma: no cover
    """The source a level on whose flow to sink j may be taken back, -1 when it has tried all."""
    while next_sink[j] < len(levels_source):
        i = next_sink[j]
        if flow[j, i] > 0 and levels_source[i] == levels_sink[j] + 1:
            return i
        next_sink[j] += 1
    return -1


@njit(cache=True, nogil=True)
@no_type_check
def _push(flow, left, wanted, path_source, path_sink, depth):  # pragma: no cover
    """Move along a path what its ends and the flows that it takes back allow; how much that is."""
    start, end = path_source[0], path_sink[depth]
    amount = min(left[start], wanted[end])
    for step in range(depth):
        amount = min(amount, flow[path_sink[step], path_source[step + 1]])
    for step in range(depth):
        flow[path_sink[step], path_source[step]] += amount
        flow[path_sink[step], path_source[step + 1]] -= amount
    flow[end, path_source[depth]] += amount
    left[start] -= amount
    wanted[end] -= amount
    return amount


@njit(cache=True, nogil=True)
@no_type_check
def _levels(cost, flow, left, wanted, high, low, levels_source, levels_sink):  # pragma: no cover
    """Steps from what is left over edges of no reduced cost; whether anything wanted is reached."""
    sources, sinks = cost.shape
    levels_source[:], levels_sink[:] = -1, -1
    for i in range(sources):
        if left[i] > 0:
            levels_source[i] = 0
    level, reached, grown = 0, False, True
    while grown and not reached:
        grown = False
        for i in range(sources):
            if levels_source[i] == level:
                for j in range(sinks):
                    if levels_sink[j] < 0 and cost[i, j] + high[i] == low[j]:
                        levels_sink[j] = level + 1
                        grown = True
                        reached = reached or wanted[j] > 0
        for j in range(sinks):
            if levels_sink[j] == level + 1 and not reached:
                for i in range(sources):
                    if levels_source[i] < 0 and flow[j, i] > 0:
                        levels_source[i] = level + 2
        level += 2
    return reached
