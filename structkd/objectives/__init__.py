"""Distillation objectives: pure functions of tensors, for node logits and for candidate scores alike.

Every function of `OBJECTIVES` has one signature:

    objective(student, teacher, mask=None, weight=None, reduction="mean", *, <its own parameters>)

with `student` and `teacher` [lists, items] (a query's candidates, a node's classes), `mask` [lists, items] True at
valid items, `weight` [lists], and a scalar ("mean", "sum") or [lists] ("none") out. `targets` transforms teachers,
`weights` weighs lists, `ensembles` joins several teachers, `REPRESENTATIONS` compares embeddings; `subclasses` splits
the classes of a teacher, `dual_head` is a student of two heads, `fusion_ratio` (experimental) learns whom to trust.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from structkd.objectives import dual_head, ensembles, fusion_ratio, representation, subclasses, targets, weights
from structkd.objectives.listwise import (
    balanced_kl,
    jeffreys,
    jensen_shannon,
    kl,
    listmle,
    listnet,
    plackett_luce,
    reverse_kl,
)
from structkd.objectives.pairwise import hinge, margin_mse, pairwise_logistic, pointwise_mse, ranknet, weighted_ranknet

__all__ = [
    "OBJECTIVES",
    "ORDER_OBJECTIVES",
    "REPRESENTATIONS",
    "balanced_kl",
    "dual_head",
    "ensembles",
    "fusion_ratio",
    "hinge",
    "jeffreys",
    "jensen_shannon",
    "kl",
    "listmle",
    "listnet",
    "margin_mse",
    "pairwise_logistic",
    "plackett_luce",
    "pointwise_mse",
    "ranknet",
    "representation",
    "reverse_kl",
    "subclasses",
    "targets",
    "weighted_ranknet",
    "weights",
]

OBJECTIVES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "balanced-kl": balanced_kl,
        "hinge": hinge,
        "jeffreys": jeffreys,
        "jensen-shannon": jensen_shannon,
        "kl": kl,
        "listmle": listmle,
        "listnet": listnet,
        "margin-mse": margin_mse,
        "pairwise-logistic": pairwise_logistic,
        "plackett-luce": plackett_luce,
        "pointwise-mse": pointwise_mse,
        "ranknet": ranknet,
        "reverse-kl": reverse_kl,
        "weighted-ranknet": weighted_ranknet,
    }
)
"Name on the command line -> objective."

REPRESENTATIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "affinity-kl": representation.affinity_kl,
        "cosine": representation.cosine,
        "feature-mse": representation.feature_mse,
        "infonce": representation.infonce,
        "similarity-preserving": representation.similarity_preserving,
    }
)
"Name on the command line -> objective on embeddings; affinity-kl needs neighbour lists besides."

ORDER_OBJECTIVES = frozenset({"hinge", "listmle", "plackett-luce", "ranknet"})
"""The objectives that a teacher which only orders (`order:FILE`) can serve; "plackett-luce" then with steps="log"."""
