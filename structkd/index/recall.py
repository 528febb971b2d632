"""Recall of an approximate index against exact search, with queries that are given or made from what is indexed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.index.flat import FlatIndex
from structkd.index.topk import NO_ROW, TopK
from structkd.index.vectors import drawn_rows

_K, _SAMPLE = 10, 400


@dataclass(frozen=True)
class RecallTest:
    """Queries, and how good a document must be to count as one of a query's k best."""

    rows: NDArray[np.int64]
    "The document that each query was made from, which is not counted; -1 where there is none."

    queries: Any
    "What the index is asked."

    source: str
    "Where the queries come from, for the manifest."

    k: int
    "Documents counted per query."

    places: int
    "What to ask an index for: k, and one more where the query's own document may come."

    least: NDArray[np.float32]
    "Score of the k-th best document of each query, by exact search."

    def of(self, top: TopK) -> tuple[float, float]:
        """Share of the k best that were found (a tie with the k-th counts), and its standard error.

        Args:
            top: what the index says to `queries` with `places` places.
        """
        if not self.k:
            return 1.0, 0.0
        hits = top.valid & (top.rows != self.rows[:, None]) & (top.scores >= self.least[:, None])
        shares = np.minimum(hits.sum(axis=1), self.k) / self.k
        return float(shares.mean()), float(shares.std() / len(shares) ** 0.5)

    def says(self, value: float, target: float) -> dict[str, Any]:
        """What the manifest keeps."""
        measured = {"k": self.k, "sample": len(self.rows), "queries": self.source, "value": round(value, 4)}
        return measured | {"target": target}


def recall_test(exact: FlatIndex, seed: int, given: Tensor | None = None) -> RecallTest:
    """400 queries drawn with the seed, and the exact answers; k is 10, or fewer when the index is smaller.

    Args:
        exact: the vectors, searched exactly.
        seed: of the draw.
        given: prepared queries to draw from, float32 [queries, dim]; None: the indexed vectors are the queries.
    """
    drawn = asking_rows(len(exact) if given is None else len(given), _SAMPLE, seed)
    if given is None:
        queries = exact.stored_rows(torch.from_numpy(drawn))
        return asked(exact.search_prepared, queries, drawn, "indexed vectors", len(exact))
    return asked(exact.search_prepared, given[torch.from_numpy(drawn)], no_rows(drawn), "given", len(exact))


def asking_rows(count: int, sample: int, seed: int) -> NDArray[np.int64]:
    """At most `sample` of `count` rows to ask with: not the draw that codes of the same seed were trained on."""
    return drawn_rows(count, sample, seed + 1)


def no_rows(drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """For queries that were made from no document."""
    return np.full(len(drawn), NO_ROW)


def asked(
    search: Callable[[Any, int], TopK],
    queries: Tensor | Sequence[Tensor],
    rows: NDArray[np.int64],
    source: str,
    count: int,
) -> RecallTest:
    """The test that exact search gives.

    Args:
        search: queries, places -> the best documents, exactly.
        queries: what is asked.
        rows: the document that each was made from, or -1.
        source: where they come from.
        count: documents of the index.
    """
    spare = int(rows.max(initial=NO_ROW) != NO_ROW)
    k = min(_K, count - spare)
    least = np.full(len(rows), -np.inf)
    if k:
        top = search(queries, k + spare)
        others = np.where(top.rows == rows[:, None], -np.inf, top.scores)
        least = -np.sort(-others, axis=1)[:, k - 1]
    return RecallTest(rows, queries, source, k, k + spare, least.astype(np.float32))
