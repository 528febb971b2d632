"""What two views of a graph with dense features agree on: features seen through the graph, and features alone.

Random propagation (`committee`) thins out a node's few words. Dense features have many weak ones instead, and every
step over all nodes costs their full width. So they are filtered once, and small networks read the filtered rows of
labelled nodes. Their answers, joined with the shared teacher's, then go from view to view (co-training; Blum &
Mitchell, COLT 1998): a network that reads a node's own features learns the answers of all nodes, one that reads
filtered features learns from it, and their joint answers are what the student is taught. Errors that follow the graph
do not survive a view without it, and the other way round, as long as networks do not learn the answers by heart: each
step hides half of a row, since many weak features together name a node.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask, rows_of
from structkd.graph.evaluate import validation
from structkd.graph.models.networks import Mlp, dropped
from structkd.graph.models.train import FitConfig, fit
from structkd.graph.spectral import propagation
from structkd.graph.targets.committee import clamped
from structkd.graph.targets.shares import Probabilities, normal, with_own_shares

Dense = Float[Tensor, "nodes features"]

BATCH = 1024
"Nodes of an optimiser step when all nodes teach."

LEFT_OUT = 0.5
"Share of a row's features, and of the hidden values, that a network does without at each step."

_SCALE = 10.0  # mean length of a filtered row


_LABELLED = FitConfig(learning_rate=0.01, weight_decay=5e-4, epochs=100, patience=100, select="loss")
_FEATURES = FitConfig(learning_rate=0.005, weight_decay=5e-4, epochs=480, patience=120, select="loss")
_FILTERED = FitConfig(learning_rate=0.005, weight_decay=5e-4, epochs=320, patience=120, select="loss")


@dataclass(frozen=True)
class ViewsConfig:
    """Sizes of the networks behind the views."""

    members: int = 2
    "Networks per filter on labelled nodes."

    readers: int = 3
    "Networks on features alone; more than per filter, since their answers are most of what is taught."

    restarts: tuple[float, ...] = (0.1, 0.2)
    "Restart probabilities of the PageRank filters of features."

    hops: int = 8
    "Terms of those."

    narrow: int = 64
    "Hidden width on filtered features."

    wide: int = 128
    "Hidden width on features alone."

    labelled: FitConfig = _LABELLED
    "How networks learn from labels."

    features: FitConfig = _FEATURES
    "How networks on features alone learn from answers; epochs and patience in optimiser steps."

    filtered: FitConfig = _FILTERED
    "How the network on filtered features learns from answers; likewise."


DEFAULT = ViewsConfig()


def labelled_views(seen: GraphTask, filters: list[Dense], seed: int, config: ViewsConfig = DEFAULT) -> Probabilities:
    """Geometric mean of networks on each filter's rows of the training nodes; validation cross-entropy stops them."""
    members = range(config.members)
    found = [_labelled(seen, x, seed * 1000 + k, config) for x in filters for k in members]
    return geometric_mean(found)


def agreed(
    seen: GraphTask, start: Probabilities, filters: list[Dense], seed: int, config: ViewsConfig = DEFAULT
) -> Probabilities:
    """Answers sent to the features' view, from there to the filtered view, joined."""
    own = features_view(seen, start, seed, config)
    last = seed * 1000 + 100 + config.readers
    again = _taught(seen, filters[-1], clamped(seen, own), config.narrow, config.filtered, last)
    return geometric_mean([own, again])


def features_view(seen: GraphTask, start: Probabilities, seed: int, config: ViewsConfig = DEFAULT) -> Probabilities:
    """What networks on a node's own features make of answers that are brought to the nodes' own class shares first."""
    wanted = clamped(seen, with_own_shares(seen, start))
    seeds = [seed * 1000 + 100 + k for k in range(config.readers)]
    return geometric_mean([_taught(seen, seen.x, wanted, config.wide, config.features, one) for one in seeds])


def feature_filters(seen: GraphTask, config: ViewsConfig = DEFAULT) -> list[Dense]:
    """S^2 x, then PageRank of x over averages of neighbours for each restart; columns standardised, rows of one scale.

    PageRank by its first terms: restart sum_k (1 - restart)^k R^k x, R = D~^-1 (A + I), the rest on the last term.
    """
    x = _dense(seen)
    smoother, averages = propagation(seen), propagation(seen, normalisation="row")
    filtered = [restart * x for restart in config.restarts]
    power = x
    for hop in range(1, config.hops + 1):
        power = averages.product(power)
        for place, restart in enumerate(config.restarts):
            weight = (1 - restart) ** hop * (1.0 if hop == config.hops else restart)
            filtered[place] += weight * power
    return [_standardised(each) for each in (smoother.product(smoother.product(x)), *filtered)]


def geometric_mean(parts: list[Probabilities]) -> Probabilities:
    """exp of the mean log-probability, rows normalised: a sure member outweighs an unsure one."""
    logs = torch.stack([part.clamp_min(1e-6).log() for part in parts])
    return normal(logs.mean(dim=0).exp())


def steps_of(nodes: int) -> int:
    """Batches of about BATCH nodes that make an epoch."""
    return max(1, round(nodes / BATCH))


def shuffled(nodes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of rows without end: every row once, then all of them in another order."""
    while True:
        order = torch.randperm(nodes, generator=generator)
        yield from order.tensor_split(steps_of(nodes))


def _labelled(seen: GraphTask, x: Dense, seed: int, config: ViewsConfig) -> Probabilities:
    model = _network(seen, config.narrow, seed)
    mine, labels = x[seen.train], seen.y[seen.train]
    validate = validation(seen, partial(model, x[seen.valid]))
    fit(model, lambda _: cross_entropy(model(mine), labels), validate, config.labelled, seed)
    return _answers(model, x)


def _taught(
    seen: GraphTask, x: Features, answers: Probabilities, width: int, settings: FitConfig, seed: int
) -> Probabilities:
    """What a network answers that learnt others' answers on all nodes; validation nodes say when it is closest."""
    model, order = _network(seen, width, seed), shuffled(seen.num_nodes, torch.Generator().manual_seed(seed))
    steps = steps_of(seen.num_nodes)
    held, wanted = rows_of(x, torch.nonzero(seen.valid).flatten()), answers[seen.valid]

    def loss_of(_: int) -> Tensor:
        rows = next(order)
        return cross_entropy(model(rows_of(x, rows)), answers[rows])

    def validate() -> tuple[float, float]:
        loss = float(cross_entropy(model(held), wanted))
        return -loss, loss

    epochs, patience = (-(-number // steps) for number in (settings.epochs, settings.patience))
    fit(model, loss_of, validate, replace(settings, epochs=epochs, patience=patience), seed, steps=steps)
    return _answers(model, x)


class Reader(nn.Module):
    """A network of one hidden layer that reads half of a row's features at a training step, all of them afterwards."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.mlp = Mlp(inputs, width, classes, 2, LEFT_OUT)

    def forward(self, x: Features) -> Float[Tensor, "nodes classes"]:
        """Logits of each row."""
        out: Tensor = self.mlp(dropped(x, LEFT_OUT, self.training))
        return out


def _network(seen: GraphTask, width: int, seed: int) -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Reader(seen.num_features, width, seen.classes)


@torch.no_grad()
def _answers(model: nn.Module, x: Features) -> Probabilities:
    out: Tensor = model(x)
    return out.softmax(dim=1)


def _dense(seen: GraphTask) -> Dense:
    return seen.x.dense() if isinstance(seen.x, SparseMatrix) else seen.x


def _standardised(x: Dense) -> Dense:
    centred = (x - x.mean(dim=0)) / x.std(dim=0).clamp_min(1e-6)
    out: Tensor = centred * (_SCALE / centred.norm(dim=1).mean().clamp_min(1e-6))
    return out
