"""MultiVectorIndex: exact late interaction (MaxSim) over documents of many vectors each, by blocked matrix products."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError
from structkd.index.draft import Draft
from structkd.index.opened import OpenedIndex
from structkd.index.storage import Stored
from structkd.index.topk import TopK, excluded_rows, ranked, search_without
from structkd.index.vectors import Metric, Vectors, check_k, prepare_queries, resolve_device

_TOKENS = {"cpu": 16384, "cuda": 1 << 20}  # document vectors per product
_QUERIES = 32
_UNIT = 2.0**-24


class MultiVectorIndex(OpenedIndex):
    """Exact MaxSim: score(q, d) = sum over query vectors of the largest inner product with a vector of d.

    Khattab and Zaharia 2020 (ColBERT), eq. 3. Under cosine every vector is normalised inside.

    Attributes:
        metric: cosine or ip.
        dim: dimensions of each vector.
    """

    def __init__(self, stored: Stored, device: str | torch.device = "auto") -> None:
        super().__init__(stored)
        self.metric: Metric = stored.manifest.metric
        self.dim: int = stored.manifest.dim or 0
        self.device = resolve_device(device)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """First vector of each document, and the number of vectors."""
        starts: NDArray[np.int64] = self._stored.arrays("documents")["starts"].numpy()
        return starts

    def search(
        self, queries: Sequence[Vectors], k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None
    ) -> TopK:
        """The k documents with the largest MaxSim.

        Args:
            queries: one [vectors, dim] array per query; a query without vectors scores 0 everywhere.
            k: list length; places beyond the number of documents are invalid.
            exclude: per query, ids of documents that must not come; their places are filled with the next best.

        Raises:
            DataError: another dimension than the index, a value that is not finite, a zero vector under cosine.
            UsageError: k below 1.
        """
        check_k(k)
        prepared = [prepare_queries(query, self.metric, self.dim) for query in queries]
        if exclude is None:
            return self._search(prepared, k)
        banned = excluded_rows(exclude, self.ids, len(prepared))
        return search_without(lambda fetch: self._search(prepared, fetch), banned, k, len(self))

    def _search(self, queries: list[Tensor], k: int) -> TopK:
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for start in range(0, len(queries), _QUERIES):
            group = queries[start : start + _QUERIES]
            for place, (query, found) in enumerate(zip(group, self._products(group), strict=True), start=start):
                rows[place], scores[place] = self._best(query, found, k)
        return TopK(rows, scores, rows >= 0, self.ids)

    def _products(self, group: list[Tensor]) -> Tensor:
        """Float32 MaxSim of every document for a group of queries, [queries, documents] on the host."""
        stacked = torch.cat([query.to(self.device) for query in group])
        owner = torch.repeat_interleave(torch.tensor([len(query) for query in group])).to(self.device)
        out = torch.zeros(len(group), len(self))
        for first, last in self._blocks():
            block = self._stored.vectors[self._starts[first] : self._starts[last]].to(self.device)
            lengths = torch.from_numpy(np.diff(self._starts[first : last + 1])).to(self.device)
            largest = torch.segment_reduce(torch.mm(block, stacked.T), "max", lengths=lengths)
            sums = torch.zeros(len(group), last - first, device=self.device).index_add_(
                0, owner, largest.T.contiguous()
            )
            out[:, first:last] = sums.cpu()
        return out

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of documents with a bounded number of vectors."""
        first, size = 0, _TOKENS[self.device.type]
        while first < len(self):
            last = int(np.searchsorted(self._starts, self._starts[first] + size, side="right")) - 1
            last = min(max(last, first + 1), len(self))
            yield first, last
            first = last

    def _best(self, query: Tensor, found: Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best by exact scores among all that float32 rounding could have misplaced."""
        k_here = min(k, len(found))
        norms = float(query.double().norm(dim=1).sum())
        margin = 2 * (self.dim + len(query) + 2) * _UNIT * norms * float(self.manifest.parameters["largest_norm"])
        least = torch.topk(found, k_here).values[-1] - margin
        candidates = (found >= least).nonzero()[:, 0]
        exact = torch.tensor([self._exact(query, int(row)) for row in candidates], dtype=torch.float32)
        rows, scores, _ = ranked(candidates[None], exact[None], self.ties, k)
        return rows[0], scores[0]

    def _exact(self, query: Tensor, row: int) -> float:
        """MaxSim of one pair in float64."""
        document = self._stored.vectors[self._starts[row] : self._starts[row + 1]].double()
        products = (query.double().unsqueeze(1) * document.unsqueeze(0)).sum(dim=-1)
        return float(products.amax(dim=1).sum())


def write(target: Draft, lengths: Sequence[int]) -> None:
    """Write where each document's vectors start.

    Raises:
        DataError: a document has no vector.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    empty = np.flatnonzero(sizes < 1)
    if len(empty):
        raise DataError(f"document at row {empty[0]}: it has no vectors ({len(empty)} such). Remove it or give it one.")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    target.arrays("documents", {"starts": torch.from_numpy(starts)})
