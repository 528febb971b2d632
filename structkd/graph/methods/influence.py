"""InfGraND: influential nodes weigh more, and the student reads features averaged over hops before it starts.

Eskandari et al., "InfGraND: An Influence-Guided GNN-to-MLP Knowledge Distillation", TMLR 2026.
"""

from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask, clean_features
from structkd.graph.losses import neighbour_weights
from structkd.graph.methods.lesson import Lesson, Teaching, edge_divergence, taught_by
from structkd.graph.published import given
from structkd.graph.spectral import propagation

BLOCK = 2048
"Rows of the similarity matrix that are held at once."


def influential_nodes(lesson: Lesson) -> Teaching:
    """(gamma_1 + gamma_2 I_j) on every KL_tau(t_j || s_i) over E+, (delta_1 + delta_2 I_i) on every label's loss."""
    seen, option = lesson.seen, lesson.config.option
    inputs = Propagated(int(option("hops")))
    x, influence = inputs.seen(seen), global_influence(seen)
    even = neighbour_weights(seen)
    factor = (option("gamma_1") + option("gamma_2") * influence).to(torch.float64)
    weights = even.with_values(even.values * factor[even.columns])
    term = edge_divergence(given(lesson.logits), lambda _: weights, given(lesson.config.temperature))
    shares = option("delta_1") + option("delta_2") * influence[lesson.train_rows]

    def label_loss(out: Tensor, labels: Tensor) -> Tensor:
        return (shares * cross_entropy(out, labels, reduction="none")).mean()

    student = lesson.student()
    return Teaching(student, taught_by(lesson, student, x, [term], label_loss), inputs)


def global_influence(seen: GraphTask) -> Float[Tensor, " nodes"]:
    """I_i = sum_j of cos(x_i, (S^2 x)_j) scaled to [0, 1] over all pairs, over its largest value (eq. 3, 4).

    The sum over j needs no pair: it is <x_i, sum_j y_j>. Only the smallest and largest similarity are looked for
    block by block.
    """
    smoother = propagation(seen).scipy
    x = seen.x.scipy if isinstance(seen.x, SparseMatrix) else sp.csr_array(seen.x.numpy())
    mine, theirs = (_unit_rows(signal) for signal in (x, smoother @ (smoother @ x)))
    transposed = theirs.T.tocsr()
    low, high = np.inf, -np.inf
    for start in range(0, seen.num_nodes, BLOCK):
        block = (mine[start : start + BLOCK] @ transposed).toarray()
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    sums = mine @ np.asarray(theirs.sum(axis=0)).ravel()
    scaled = (sums - seen.num_nodes * low) / max(high - low, 1e-12)
    return torch.from_numpy(scaled / max(float(scaled.max()), 1e-12)).to(torch.float32)


class Propagated:
    """mean(X, S X, ..., S^hops X): a new node must be joined to the graph before the student can answer."""

    kind: ClassVar[str] = "propagated"

    def __init__(self, hops: int) -> None:
        self.hops = hops

    def seen(self, observed: GraphTask) -> Features:
        """Averages over the observed graph alone."""
        smoother = propagation(observed).scipy
        power: Any = observed.x.scipy if isinstance(observed.x, SparseMatrix) else observed.x.numpy()
        total = power
        for _ in range(self.hops):
            power = smoother @ power
            total = total + power
        return clean_features(total / (self.hops + 1), observed.name)

    def whole(self, task: GraphTask) -> Features:
        """Observed nodes as in training; hidden ones averaged over the full graph, which they have joined by then."""
        if not bool(task.hidden.any()):
            return self.seen(task)
        x = _dense(self.seen(task)).clone()
        x[task.observed_rows] = _dense(self.seen(task.observed))
        return clean_features(x, task.name)

    def fields(self) -> dict[str, Any]:
        """Number of hops."""
        return {"hops": self.hops}

    def arrays(self) -> dict[str, Tensor]:
        """None."""
        return {}


def _dense(x: Features) -> Tensor:
    return x.dense() if isinstance(x, SparseMatrix) else x


def _unit_rows(matrix: Any) -> Any:
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sp.csr_array(sp.diags_array(1.0 / np.maximum(norms, 1e-12)) @ matrix)
