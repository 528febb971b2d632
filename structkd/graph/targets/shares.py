"""Class shares that the nodes have, where the training set was drawn to hide them.

A training set with as many nodes of each class as of any other was drawn by class: its shares belong to the draw, and
a model fitted to it answers as if classes were equally frequent. Its answers on the unlabelled nodes say how frequent
they are (label shift; Saerens, Latinne & Decaestecker, "Adjusting the outputs of a classifier to new a priori
probabilities", Neural Computation 2002, eq. 2.2 to 2.4), and how it answers for validation nodes of each class says how
far those answers are to be believed (Lipton, Wang & Smola, "Detecting and Correcting for Label Shift with Black Box
Predictors", ICML 2018, section 4; the ridge: Azizzadenesheli et al., "Regularized Learning for Domain Adaptation under
Label Shifts", ICLR 2019).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from structkd.graph.data.task import GraphTask

Probabilities = Float[Tensor, "nodes classes"]
Shares = Float[Tensor, " classes"]

RIDGE = 1e-3
"Least ridge; it decides only where answers are alike, and the system has no single solution."

LEAST = 0.25
"Of the share that the answers show, what a class keeps at least: a class put at nothing would never be answered."


def drawn_by_class(seen: GraphTask, nodes: Bool[Tensor, " nodes"]) -> bool:
    """Whether every class has the same number of these labelled nodes, give or take one."""
    counts = torch.bincount(seen.y[nodes], minlength=seen.classes)
    return int(counts.max() - counts.min()) <= 1


def with_own_shares(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """p_i(c) times the share of class c among unlabelled nodes, rows normalised; unchanged for a training set drawn at
    random.

    For answers of models fitted to even shares. Shares are the mean answer's, as validation nodes explain them. The EM
    of Saerens et al. would need answers that are well calibrated: else its steps move the shares to whole classes.
    """
    shares = _shares(seen, probabilities)
    return probabilities if shares is None else normal(probabilities * _explained(seen, probabilities, shares))


def with_explained_shares(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """The same for answers that show the nodes' own shares already: only what validation nodes tell of them is new."""
    shares = _shares(seen, probabilities)
    if shares is None:
        return probabilities
    return normal(probabilities * (_explained(seen, probabilities, shares) / shares.clamp_min(1e-12)))


def with_even_shares(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """The same answers as if classes were equally frequent, to compare with those of models fitted to such a set; on
    validation nodes that were drawn by class too, else answers are compared as they are."""
    shares = _shares(seen, probabilities) if drawn_by_class(seen, seen.valid) else None
    return probabilities if shares is None else normal(probabilities / shares.clamp_min(1e-12))


def _explained(seen: GraphTask, probabilities: Probabilities, shown: Shares) -> Shares:
    """Shares w that explain the mean answer m by the answers to each class: min |A w - m|^2 + ridge |w - m|^2, where
    A[:, c] is the mean answer on validation nodes of class c; m itself where a class has fewer than two.

    m - A m is what m leaves unexplained. Some of that is the draw of the validation nodes, whose variance they tell:
    the ridge is that variance over the rest of |m - A m|^2 (method of moments), and m stands where no rest is left.
    """
    answers, mean = probabilities.double(), shown.double()
    groups = [answers[seen.valid & (seen.y == label)] for label in range(seen.classes)]
    if min(map(len, groups)) < 2:
        return shown
    answered = torch.stack([group.mean(dim=0) for group in groups], dim=1)
    noise = sum(mean[c] ** 2 * group.var(dim=0).sum() / len(group) for c, group in enumerate(groups))
    left = mean - answered @ mean
    signal = left @ left - noise
    if float(signal) <= 0:
        return shown
    ridge = max(float(noise / signal), RIDGE)
    matrix = answered.T @ answered + ridge * torch.eye(seen.classes, dtype=torch.float64)
    found = mean + torch.linalg.solve(matrix, answered.T @ left)
    return torch.maximum(found, LEAST * mean).to(shown.dtype)


def _shares(seen: GraphTask, probabilities: Probabilities) -> Shares | None:
    """Mean answer over unlabelled nodes; None where the training set hides nothing, or no node is unlabelled."""
    free = ~(seen.train | seen.valid)
    return probabilities[free].mean(dim=0) if drawn_by_class(seen, seen.train) and bool(free.any()) else None


def normal(probabilities: Probabilities) -> Probabilities:
    """The same with rows that sum to one."""
    return probabilities / probabilities.sum(dim=1, keepdim=True).clamp_min(1e-12)
