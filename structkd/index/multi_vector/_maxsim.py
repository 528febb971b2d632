"""Late interaction over coded vectors: a fused kernel; its torch twin stands in `candidates`.

A vector's code names one centroid of each of two codebooks, their sum stands for it. Its products with a query are then
two rows of a table that is made once per query, and a document's MaxSim needs no vector at all.
"""

from typing import no_type_check

import numba
import numpy as np
import torch


@no_type_check
def coded_maxsim(codes, starts, table, out):
    """The kernel on as many threads as torch has, and torch's as they were.

    The first parallel kernel of a process sets OpenMP's threads to all cores, and torch's are the same.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    _coded_maxsim(codes, starts, table, out)
    torch.set_num_threads(threads)


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=True)
@no_type_check
def _coded_maxsim(codes, starts, table, out):
    """out[d] = sum over q of the largest table[0, c0, q] + table[1, c1, q] among document d's codes (c0, c1).

    Args:
        codes: int16 [vectors, 2].
        starts: int64 [documents + 1], every document with at least one vector.
        table: float32 [2, centroids, query vectors].
        out: float32 [documents].
    """
    width = table.shape[2]
    for document in numba.prange(len(starts) - 1):
        best = np.empty(width, np.float32)
        first = starts[document]
        for j in range(width):
            best[j] = table[0, codes[first, 0], j] + table[1, codes[first, 1], j]
        for vector in range(first + 1, starts[document + 1]):
            coarse, fine = codes[vector, 0], codes[vector, 1]
            for j in range(width):
                best[j] = max(best[j], table[0, coarse, j] + table[1, fine, j])
        total = np.float32(0)
        for j in range(width):
            total += best[j]
        out[document] = total
