"""Late interaction over coded vectors: a fused kernel and its torch twin.

A vector's code names one centroid of each of two codebooks, their sum stands for it. Its products with a query are then
two rows of a table that is made once per query, and a document's MaxSim needs no vector at all.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

_VECTORS = 1 << 18  # coded vectors per step of the twin


@numba.njit(parallel=True, nogil=True, cache=True, fastmath=True)
@no_type_check
def coded_maxsim(codes, starts, table, out):
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


def coded_maxsim_of(codes: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """The same on any device: float32 [documents].

    Args:
        codes: int16 [vectors, 2], on the host.
        starts: int64 [documents + 1], on the host.
        table: float32 [2, centroids, query vectors], on the device.
    """
    parts, first, last = [], 0, len(starts) - 1
    while first < last:
        end = int(torch.searchsorted(starts, starts[first] + _VECTORS, right=True)) - 1
        end = min(max(end, first + 1), last)
        block = codes[starts[first] : starts[end]].to(table.device, torch.int64)
        products = table[0, block[:, 0]] + table[1, block[:, 1]]
        lengths = starts[first : end + 1].diff().to(table.device)
        parts.append(torch.segment_reduce(products, "max", lengths=lengths).sum(dim=1))
        first = end
    return torch.cat(parts)
