"""Numba kernels: random walks over compressed rows, and skip-gram vectors of their nodes."""

import math
from typing import no_type_check

import numpy as np
from numba import njit

TABLE = 1 << 20
"Places that nodes share by how often they are drawn as negatives."


@njit(cache=True, nogil=True)
@no_type_check
def random_walks(starts, columns, walks, length, random):  # pragma: no cover
    """[walks * nodes, length] node numbers; every node starts `walks` walks, and an isolated one stays where it is."""
    nodes = len(starts) - 1
    out = np.empty((walks * nodes, length), dtype=np.int64)
    for walk in range(walks):
        order = random.permutation(nodes)
        for place in range(nodes):
            node = order[place]
            for step in range(length):
                out[walk * nodes + place, step] = node
                degree = starts[node + 1] - starts[node]
                if degree > 0:
                    node = columns[starts[node] + random.integers(0, degree)]
    return out


@njit(cache=True, nogil=True, fastmath=True)
@no_type_check
def skip_gram(walks, nodes, width, window, negatives, epochs, random):  # pragma: no cover
    """Vectors [nodes, width] by skip-gram with negative sampling; rate .025 falling to nothing, windows drawn.

    Negatives come from a table of places, as word2vec's: a search per draw was half of the time.
    """
    vectors = ((random.random((nodes, width)) - 0.5) / width).astype(np.float32)
    contexts = np.zeros((nodes, width), dtype=np.float32)
    counts = np.zeros(nodes)
    for node in walks.ravel():
        counts[node] += 1
    share = np.cumsum(counts**0.75)
    table = np.searchsorted(share, (np.arange(TABLE) + 0.5) / TABLE * share[-1]).astype(np.int32)
    word = np.uint64(random.integers(0, 2**62))
    total, done = epochs * walks.size, 0
    slope = np.empty(width, dtype=np.float32)
    for _ in range(epochs):
        for walk in range(len(walks)):
            for centre in range(walks.shape[1]):
                rate = np.float32(max(0.025 * (1 - done / total), 1e-4))
                done += 1
                node, reach = walks[walk, centre], 1 + random.integers(0, window)
                for place in range(max(0, centre - reach), min(walks.shape[1], centre + reach + 1)):
                    if place == centre:
                        continue
                    slope[:] = 0
                    for draw in range(negatives + 1):
                        if draw == 0:
                            other, label = walks[walk, place], np.float32(1)
                        else:
                            word = word * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                            other, label = table[word >> np.uint64(64 - 20)], np.float32(0)
                            if other == walks[walk, place]:
                                continue
                        inner = np.float32(0)
                        for c in range(width):
                            inner += vectors[node, c] * contexts[other, c]
                        step = rate * (label - np.float32(1 / (1 + math.exp(-inner))))
                        for c in range(width):
                            slope[c] += step * contexts[other, c]
                            contexts[other, c] += step * vectors[node, c]
                    for c in range(width):
                        vectors[node, c] += slope[c]
    return vectors
