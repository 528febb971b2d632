"""What every opened index is made of: a stored folder, its ids and manifest; the search call around each kind's own.

A kind adds `_search` and, for vectors kept elsewhere, `block`; borders, exclusions and neighbour graphs are here once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from structkd.errors import DataError
from structkd.index.folder.manifest import IndexManifest
from structkd.index.folder.names import StoredIds
from structkd.index.folder.storage import Stored
from structkd.index.neighbours import Symmetric, neighbour_graph
from structkd.index.topk import TopK, excluded_rows, search_without
from structkd.index.vectors import Metric, Vectors, check_k, exact_scores, picker, prepare_queries

_BLOCK = 65536


class OpenedIndex:
    """An index over a stored folder.

    Attributes:
        kind: a key of `structkd.index.INDEXES`.
        manifest: what the folder says about the index, the measured recall among it.
    """

    def __init__(self, stored: Stored) -> None:
        self.manifest: IndexManifest = stored.manifest
        self.kind: str = stored.manifest.kind
        self._stored = stored

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def ids(self) -> StoredIds:
        """Document ids in row order."""
        return self._stored.ids

    @property
    def ties(self) -> NDArray[np.int64]:
        """Tie rank of each row's id."""
        return self._stored.ties


class OpenedVectors(OpenedIndex, ABC):
    """An index with one vector per document.

    Attributes:
        metric: cosine, ip or l2.
        dim: dimensions.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        self.metric: Metric = stored.manifest.metric
        self.dim: int = stored.manifest.dim or 0

    def search(self, queries: Vectors, k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None) -> TopK:
        """The k documents with the largest score: inner product, cosine, or minus the squared distance (l2).

        An approximate kind chooses among the documents it looks at; `manifest.recall` says how many it misses.

        Args:
            queries: [queries, dim], any real type; normalised here under cosine.
            k: list length; places that the index cannot fill are invalid (row -1).
            exclude: per query, ids of documents that must not come; their places are filled with the next best.

        Returns:
            TopK in the order of `structkd.ordering`. Scores are computed in float64 and rounded once, so they do not
            depend on the kind, the other queries, the tile or the device.

        Raises:
            DataError: another dimension than the index, a value that is not finite, a zero query under cosine.
            UsageError: k below 1.
            DeviceError: not even the smallest piece fits on the device.
        """
        check_k(k)
        prepared = prepare_queries(queries, self.metric, self.dim)
        if exclude is None:
            return self._search(prepared, k)
        banned = excluded_rows(exclude, self.ids, len(prepared))
        return search_without(lambda fetch: self._search(prepared, fetch), banned, k, len(self))

    def knn_graph(self, k: int, symmetric: Symmetric = "none", self_loops: bool = False) -> csr_array:
        """The k nearest others of every indexed vector, [count, count] CSR of scores (see `neighbour_graph`)."""
        return neighbour_graph(
            lambda start, stop: self._search(self.block(start, stop), k + 1),
            len(self),
            k,
            symmetric,
            self._own_scores() if self_loops else None,
        )

    @abstractmethod
    def _search(self, queries: Float[Tensor, "queries dim"], k: int) -> TopK:
        """The k best documents of prepared queries."""

    def block(self, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        """The stored vectors of rows start to stop (normalised under cosine), on the host."""
        return self._stored.vectors[start:stop]

    def _own_scores(self) -> NDArray[np.float32]:
        """The score of each row with itself."""
        parts = []
        for start in range(0, len(self), _BLOCK):
            block = self.block(start, min(len(self), start + _BLOCK))
            own = exact_scores(block, picker(block), torch.arange(len(block)).unsqueeze(1), self.metric)
            parts.append(own[:, 0].numpy())
        return np.concatenate(parts)


class OpenedTexts(OpenedIndex, ABC):
    """An index of texts."""

    def search(self, texts: Sequence[str], k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None) -> TopK:
        """The k best documents of each query text, in the order of `structkd.ordering`.

        A document that shares no word with the query scores 0 and is no hit: such places are invalid, so a list may be
        shorter than k, and a query without any known word has an empty list.

        Args:
            texts: query texts.
            k: list length.
            exclude: per query, ids of documents that must not come; their places are filled with the next best.

        Raises:
            UsageError: k below 1.
            DataError: `texts` is one string instead of a list.
        """
        check_k(k)
        if isinstance(texts, str):
            raise DataError("found one string, expected a list of query texts. Write [text].")
        if exclude is None:
            return self._search(texts, k)
        banned = excluded_rows(exclude, self.ids, len(texts))
        return search_without(lambda fetch: self._search(texts, fetch), banned, k, len(self))

    @abstractmethod
    def _search(self, texts: Sequence[str], k: int) -> TopK:
        """The k best documents of each text."""
