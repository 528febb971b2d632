"""Several teachers' node logits -> one target, by a fixed rule or by one that learns from held-out labels."""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from structkd.errors import UsageError
from structkd.graph.data.task import GraphTask
from structkd.objectives import ensembles, targets

Stack = Float[Tensor, "teachers nodes classes"]
Logits = Float[Tensor, "nodes classes"]

_STEPS = 200  # updates of a gate or an aggregator
_RATE = 0.01


def fuse(
    seen: GraphTask, teachers: Sequence[Tensor], rule: str, seed: int, embeddings: Sequence[Tensor] = ()
) -> Logits:
    """One target from several teachers' logits of the observed nodes; a single teacher is returned as it is.

    mean, median, z-mean, reciprocal-rank (standardised): fixed. confidence: teachers weighed per node, by the label
    where the node trains, by their entropy elsewhere. router: a gate on the teachers' mean scores, trained on
    validation labels (`ensembles.Router`). set-attention: an aggregator of embeddings of one width (without
    `embeddings`: of the probabilities), and a classifier on it, trained on the training labels
    (`ensembles.SetAttention`).

    Raises:
        UsageError: an unknown rule, teachers of different shapes.
    """
    if rule not in FUSE:
        raise UsageError(f"--fuse {rule!r}: expected one of {', '.join(FUSE)}.")
    if not teachers or any(teacher.shape != teachers[0].shape for teacher in teachers):
        raise UsageError("teachers to fuse must be one or more, with logits of the same nodes and classes.")
    if len(teachers) == 1:
        return teachers[0]
    stack = torch.stack([teacher.detach() for teacher in teachers])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found: Tensor = FUSE[rule](seen, stack, embeddings)
    return found.detach()


def _by_confidence(seen: GraphTask, stack: Tensor, _: Sequence[Tensor]) -> Tensor:
    labels = one_hot(seen.y.clamp(min=0), seen.classes).bool() & seen.train[:, None]
    return ensembles.weighted_mean(stack, ensembles.confidence_weights(stack, positive=labels))


def _routed(seen: GraphTask, stack: Tensor, _: Sequence[Tensor]) -> Tensor:
    features, valid = stack.mean(0).log_softmax(-1), seen.valid
    router = ensembles.Router(stack.shape[2], len(stack))
    positive = one_hot(seen.y[valid], seen.classes).bool()
    optimizer = torch.optim.Adam(router.parameters(), lr=_RATE)
    for _step in range(_STEPS):
        optimizer.zero_grad()
        loss = ensembles.gate_loss(stack[:, valid], router(features[valid]), positive, balance=0.1)
        torch.autograd.backward([loss])
        optimizer.step()
    with torch.no_grad():
        return ensembles.routed(stack, router(features))


def _attended(seen: GraphTask, stack: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
    """Logits of a classifier on the pooled embedding; dropout keeps it from learning the few labels by heart."""
    tokens = torch.stack(list(embeddings)) if len(embeddings) == len(stack) else stack.softmax(-1)
    width = tokens.shape[2]
    joined = ensembles.SetAttention(width, num_heads=16 if width % 16 == 0 else 1)
    head = torch.nn.Linear(width, seen.classes)
    optimizer = torch.optim.Adam([*joined.parameters(), *head.parameters()], lr=_RATE / 10)
    rows = torch.nonzero(seen.train).flatten()
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(head(joined(tokens[:, rows])), seen.y[rows])
        torch.autograd.backward([loss])
        optimizer.step()
    joined.eval()
    with torch.no_grad():
        found: Tensor = head(joined(tokens))
    return found


Rule = Callable[[GraphTask, Any, Sequence[Tensor]], Tensor]

FUSE: MappingProxyType[str, Rule] = MappingProxyType(
    {
        "mean": lambda seen, stack, _: ensembles.mean(stack),
        "median": lambda seen, stack, _: ensembles.median(stack),
        "z-mean": lambda seen, stack, _: ensembles.standardised_mean(stack),
        # 1 / 61 and 1 / 67 as logits are no preference at all: the same order, spread as z-scores
        "reciprocal-rank": lambda seen, stack, _: targets.standardise(ensembles.reciprocal_rank(stack)),
        "confidence": _by_confidence,
        "router": _routed,
        "set-attention": _attended,
    }
)
"Name on the command line -> rule that makes one target of several teachers."
