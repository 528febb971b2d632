"""The two protocols that every kind of index answers: of vectors and of texts."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from structkd.ids import Ids
from structkd.index.neighbours import Symmetric
from structkd.index.topk import TopK
from structkd.index.vectors import Metric, Vectors


@runtime_checkable
class VectorIndex(Protocol):
    """An index of vectors: kind, metric, dim, ids; search and neighbour graph."""

    kind: str
    metric: Metric
    dim: int

    def __len__(self) -> int:
        """How many vectors it holds."""
        ...

    @property
    def ids(self) -> Ids:
        """Document ids in row order."""
        ...

    @property
    def ties(self) -> NDArray[np.int64]:
        """Tie rank of each row's id."""
        ...

    def search(self, queries: Vectors, k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None) -> TopK:
        """The k best documents of each query; `exclude` names documents per query that must not come."""
        ...

    def block(self, start: int, stop: int) -> Tensor:
        """The stored vectors of rows start to stop (normalised under cosine), on the host."""
        ...

    def knn_graph(self, k: int, symmetric: Symmetric = "none", self_loops: bool = False) -> csr_array:
        """The k nearest neighbours of each indexed vector as a sparse matrix of scores."""
        ...


@runtime_checkable
class LexicalIndex(Protocol):
    """An index of texts."""

    kind: str

    def __len__(self) -> int:
        """How many documents it holds."""
        ...

    @property
    def ids(self) -> Ids:
        """Document ids in row order."""
        ...

    def search(self, texts: Sequence[str], k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None) -> TopK:
        """The k best documents of each query text; `exclude` names documents per query that must not come."""
        ...
