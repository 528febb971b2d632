"""Which documents a fast multi-vector search scores exactly: those whose coded vectors promise the most.

Every document vector is coded by two centroids (`codebooks`); MaxSim over the codes estimates a document without
reading its vectors (centroid interaction, Santhanam et al. 2022, PLAID, eq. 3-5, over the sums of two centroids). Codes
err in a document's favour or against it, and much alike from query to query: what a sample of queries shows of that
error is taken off (`offsets`). Documents with many similar vectors are found only so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

CODES, OFFSETS = "codes", "offsets"
"Files of an index: what `Coded` holds."

_AT_ONCE = 8
_VECTORS = 1 << 18  # coded vectors per step on a device


@dataclass(frozen=True)
class Coded:
    """Coded vectors of all documents.

    Attributes:
        codebooks: two sets of centroids whose sums stand for vectors.
        codes: centroid of each vector in each set.
        starts: first vector of each document, and the number of vectors.
        offsets: what is added to each document's estimate.
    """

    codebooks: Float[Tensor, "2 centroids dim"]
    codes: Int[Tensor, "vectors 2"]
    starts: Int[Tensor, " ends"]
    offsets: Float[Tensor, " documents"]

    def estimates(self, query: Float[Tensor, "tokens dim"], device: torch.device) -> Float[Tensor, " documents"]:
        """About the MaxSim of every document with one query, on the host."""
        table = torch.matmul(self.codebooks.to(device), query.to(device).T)
        if device.type != "cpu":
            return coded_maxsim_of(self.codes, self.starts, table).cpu() + self.offsets
        from structkd.index.multi_vector._maxsim import coded_maxsim  # numba takes a while to import

        out = torch.empty(len(self.offsets))
        coded_maxsim(self.codes.numpy(), self.starts.numpy(), table.contiguous().numpy(), out.numpy())
        return out + self.offsets

    def best(self, query: Tensor, count: int, device: torch.device) -> Int[Tensor, " list"]:
        """The documents with the largest estimates, at most `count`."""
        found = self.estimates(query, device)
        return torch.topk(found, min(count, len(found))).indices


def mean_errors(
    coded: Coded, queries: Sequence[Tensor], exact: Callable[[list[Tensor]], Float[Tensor, "queries documents"]]
) -> Float[Tensor, " documents"]:
    """How far each document's estimates lie below its scores on average; zeros without queries.

    Args:
        coded: with offsets of zero.
        queries: each [vectors, dim].
        exact: MaxSim of every document for some queries.
    """
    total = torch.zeros(len(coded.offsets), dtype=torch.float64)
    for start in range(0, len(queries), _AT_ONCE):
        group = list(queries[start : start + _AT_ONCE])
        for query, scores in zip(group, exact(group), strict=True):
            total += scores.double() - coded.estimates(query, torch.device("cpu")).double()
    return (total / max(1, len(queries))).float()


def coded_maxsim_of(codes: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """The kernel's twin on any device: float32 [documents].

    Args:
        codes: int16 [vectors, 2], on the host.
        starts: int64 [documents + 1], on the host.
        table: float32 [2, centroids, query vectors], on the device.
    """
    parts = []
    for first, last in document_ranges(starts.numpy(), _VECTORS):
        block = codes[starts[first] : starts[last]].to(table.device, torch.int64)
        products = table[0, block[:, 0]] + table[1, block[:, 1]]
        lengths = starts[first : last + 1].diff().to(table.device)
        parts.append(torch.segment_reduce(products, "max", lengths=lengths).sum(dim=1))
    return torch.cat(parts)


def document_ranges(starts: NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents with at most `size` vectors, or of one document.

    Args:
        starts: first vector of each document, and the number of vectors.
        size: vectors of a range.
    """
    first, count = 0, len(starts) - 1
    while first < count:
        last = int(np.searchsorted(starts, starts[first] + size, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield first, last
        first = last
