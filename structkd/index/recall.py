"""Recall of an approximate index against exact search, with a sample of its own vectors as queries."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.index.flat import FlatIndex
from structkd.index.topk import TopK

_K, _SAMPLE = 10, 400


@dataclass(frozen=True)
class RecallTest:
    """The sample, and how good a document must be to count as one of its k best others."""

    rows: NDArray[np.int64]
    "Rows of the sample, which are the queries."

    queries: Tensor
    "float32 [sample, dim]."

    k: int
    "Documents counted per query, itself not among them."

    least: NDArray[np.float32]
    "Score of the k-th best other document of each query, by exact search."

    def of(self, top: TopK) -> tuple[float, float]:
        """Share of the k best others that were found (a tie with the k-th counts), and its standard error.

        Args:
            top: what the index says to `queries` with k + 1 places.
        """
        hits = top.valid & (top.rows != self.rows[:, None]) & (top.scores >= self.least[:, None])
        shares = np.minimum(hits.sum(axis=1), self.k) / self.k
        return float(shares.mean()), float(shares.std() / len(shares) ** 0.5)

    def says(self, value: float, target: float) -> dict[str, float]:
        """What the manifest keeps."""
        return {"k": self.k, "sample": len(self.rows), "value": round(value, 4), "target": target}


def recall_test(exact: FlatIndex, seed: int) -> RecallTest:
    """400 vectors drawn with the seed, and the exact answers; k is 10, or fewer when the index is smaller."""
    count = len(exact)
    drawn = np.random.default_rng(seed + 1).choice(count, min(_SAMPLE, count), replace=False)
    rows, k = np.sort(drawn), min(_K, count - 1)
    queries = exact.stored_rows(torch.from_numpy(rows))
    least = np.full(len(rows), -np.inf, dtype=np.float32)
    if k:
        top = exact.search_prepared(queries, k + 1)
        others = np.where(top.rows == rows[:, None], -np.inf, top.scores)
        least = -np.sort(-others, axis=1)[:, k - 1]
    return RecallTest(rows, queries, k, least.astype(np.float32))
