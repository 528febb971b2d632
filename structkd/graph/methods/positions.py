"""Positions of nodes from random walks, and how a node that joins later gets one."""

from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor

from structkd.errors import DataError
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.kernels import _walks

NEGATIVES = 5


def deep_walk(
    seen: GraphTask, *, walks: int, length: int, window: int, epochs: int, width: int, seed: int
) -> Float[Tensor, "nodes width"]:
    """DeepWalk vectors of every node (Perozzi et al., KDD 2014), isolated nodes at nought.

    Skip-gram over uniform walks with negative sampling, where the first paper has hierarchical softmax.
    """
    adjacency, random = seen.adjacency, np.random.default_rng([seed, 1])
    paths = _walks.random_walks(adjacency.starts.numpy(), adjacency.columns.numpy(), walks, length, random)
    found = _walks.skip_gram(paths, seen.num_nodes, width, window, NEGATIVES, epochs, random)
    found[seen.degrees.numpy() == 0] = 0
    return torch.from_numpy(found)


class Positioned:
    """Features with a position joined on: a new node takes the mean of its observed neighbours', nought without any.

    So the student needs the graph when a new node arrives.
    """

    kind: ClassVar[str] = "positioned"

    def __init__(self, table: Float[Tensor, "observed width"]) -> None:
        self.table = table

    def seen(self, observed: GraphTask) -> Features:
        """Features of the observed nodes and their own positions."""
        return self._joined(observed, self.table)

    def whole(self, task: GraphTask) -> Features:
        """Observed nodes as in training, hidden ones at the mean of their observed neighbours."""
        rows = task.observed_rows
        if len(rows) != len(self.table):
            raise DataError(
                f"{task.name}: {len(rows)} observed nodes, but positions of {len(self.table)}. The student was taught "
                "on another graph, split or setting."
            )
        table = torch.zeros(task.num_nodes, self.table.shape[1])
        table[rows] = self.table
        into = task.edge_index[:, task.hidden[task.edge_index[0]] & ~task.hidden[task.edge_index[1]]]
        counts = torch.bincount(into[0], minlength=task.num_nodes).clamp_min(1)
        sums = torch.zeros_like(table).index_add_(0, into[0], table[into[1]])
        return self._joined(task, torch.where(task.hidden[:, None], sums / counts[:, None], table))

    def fields(self) -> dict[str, Any]:
        """None."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """The observed nodes' positions."""
        return {"table": self.table}

    @staticmethod
    def _joined(task: GraphTask, table: Tensor) -> Features:
        if isinstance(task.x, SparseMatrix):
            return SparseMatrix.of(sp.hstack([task.x.scipy, sp.csr_array(table.numpy().astype(np.float32))]))
        return torch.cat([task.x, table], dim=1)
