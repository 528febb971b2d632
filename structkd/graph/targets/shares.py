"""Class shares that the nodes have, where the training set was drawn to hide them.

A training set with as many nodes of each class as of any other was drawn by class: its shares belong to the draw, and
a model fitted to it answers as if classes were equally frequent. Its answers on the unlabelled nodes say how frequent
they are (label shift; Saerens, Latinne & Decaestecker, "Adjusting the outputs of a classifier to new a priori
probabilities", Neural Computation 2002, eq. 2.2 to 2.4).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from structkd.graph.data.task import GraphTask

Probabilities = Float[Tensor, "nodes classes"]


def drawn_by_class(seen: GraphTask, nodes: Bool[Tensor, " nodes"]) -> bool:
    """Whether every class has the same number of these labelled nodes, give or take one."""
    counts = torch.bincount(seen.y[nodes], minlength=seen.classes)
    return int(counts.max() - counts.min()) <= 1


def with_own_shares(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """p_i(c) times the mean of p(c) over unlabelled nodes, rows normalised; unchanged for a training set drawn at
    random.

    That is the first step of the EM of Saerens et al. Further steps run away where answers are badly calibrated: their
    shares then move to whole classes, while one step can at most repeat the shares that the answers show.
    """
    shares = _shares(seen, probabilities)
    return probabilities if shares is None else normal(probabilities * shares)


def with_even_shares(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """The same answers as if classes were equally frequent, to compare with those of models fitted to such a set; on
    validation nodes that were drawn by class too, else answers are compared as they are."""
    shares = _shares(seen, probabilities) if drawn_by_class(seen, seen.valid) else None
    return probabilities if shares is None else normal(probabilities / shares.clamp_min(1e-12))


def _shares(seen: GraphTask, probabilities: Probabilities) -> Float[Tensor, " classes"] | None:
    """Mean answer over unlabelled nodes; None where the training set hides nothing, or no node is unlabelled."""
    free = ~(seen.train | seen.valid)
    return probabilities[free].mean(dim=0) if drawn_by_class(seen, seen.train) and bool(free.any()) else None


def normal(probabilities: Probabilities) -> Probabilities:
    """The same with rows that sum to one."""
    return probabilities / probabilities.sum(dim=1, keepdim=True).clamp_min(1e-12)
