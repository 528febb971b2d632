"""A committee of small graph models: what the labels and the graph say of every node, beyond a given teacher.

Members propagate first and read a random half of the nodes' features each time (random propagation; Feng et al.,
"Graph Random Neural Networks", NeurIPS 2020, section 3.2). In the first round draws of one member are held together by
consistency regularisation (eq. 5 to 7); in later rounds members learn from the committee's own confident answers
(self-training), and the draws go free. Only training labels teach; validation labels stop each member.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, one_hot, relu

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.evaluate import validation
from structkd.graph.models.networks import Linear, dropped
from structkd.graph.models.train import FitConfig, fit
from structkd.graph.spectral import low_pass, propagation
from structkd.graph.targets.shares import Probabilities, normal

_MEMBER = FitConfig(learning_rate=0.01, weight_decay=5e-3, epochs=300, patience=80, select="loss")


@dataclass(frozen=True)
class CommitteeConfig:
    """Size of a committee and how it teaches itself."""

    members: int = 3
    "Models of a round; their mean answers."

    rounds: int = 4
    "Rounds, the first on labels alone included."

    trusted: float = 0.5
    "Share of each class's unlabelled nodes, most confident first, whose answers the next round learns from."

    restart: float = 0.2
    "Restart probability of the PageRank that smooths answers before they are trusted."

    hidden: int = 32
    "Hidden width of a member."

    draws: int = 2
    "Random propagations of a step that consistency holds together (first round)."

    sharpening: float = 0.5
    "Temperature of their mean."

    member: FitConfig = _MEMBER
    "How a member is fitted."


DEFAULT = CommitteeConfig()


class RandomPropagation(nn.Module):
    """PageRank-propagated features into an MLP; training hides half of the nodes and half of the features' entries.

    The first map comes before the propagation: both are linear, and the hidden width is the narrow side.
    """

    steps = 8
    restart = 0.1

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first = Linear(inputs, hidden, bias=False, glorot=True)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.last = Linear(hidden, classes)

    def forward(self, x: Features, graph: SparseMatrix) -> Float[Tensor, "nodes classes"]:
        """Logits of each node."""
        start: Tensor = self.first(dropped(x, 0.5, self.training) if isinstance(x, SparseMatrix) else x)
        if self.training:
            start = start * dropout(torch.ones(start.shape[0], 1), 0.5)
        out = start
        for _ in range(self.steps):
            out = (1 - self.restart) * graph.product(out) + self.restart * start
        logits: Tensor = self.last(dropout(relu(out + self.bias), 0.5, self.training))
        return logits


def consult(seen: GraphTask, seed: int, config: CommitteeConfig = DEFAULT) -> Iterator[Probabilities]:
    """The committee's mean probabilities after each round; a round is computed when it is asked for."""
    answers, taught = one_hot_labels(seen), seen.train
    for number in range(config.rounds):
        seeds = [seed * 1000 + number * config.members + k for k in range(config.members)]
        members = [_member(seen, answers, taught, one, config, consistent=number == 0) for one in seeds]
        found = torch.stack(members).mean(dim=0)
        yield found
        smooth = pagerank(seen, clamped(seen, found), config.restart)
        answers, taught = confident_answers(seen, smooth, config.trusted)


def confident_answers(
    seen: GraphTask, probabilities: Probabilities, share: float
) -> tuple[Probabilities, Bool[Tensor, " nodes"]]:
    """Hard answers, and the nodes to trust: training nodes with their labels, and each class's most confident others.

    Validation nodes are never trusted: they must stay able to choose.
    """
    chosen = probabilities.argmax(dim=1)
    confidence = normal(probabilities).max(dim=1).values
    trusted = seen.train.clone()
    for label in range(seen.classes):
        rows = torch.nonzero((chosen == label) & ~seen.valid & ~seen.train).flatten()
        best = rows[confidence[rows].argsort(descending=True, stable=True)]
        trusted[best[: int(share * len(rows))]] = True
    return clamped(seen, one_hot(chosen, seen.classes).to(torch.float32)), trusted


def clamped(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """The same with the training rows replaced by their labels."""
    return torch.where(seen.train[:, None], one_hot_labels(seen), probabilities)


def one_hot_labels(seen: GraphTask) -> Probabilities:
    """Labels as distributions; unknown ones count as class 0 and must be masked."""
    return one_hot(seen.y.clamp_min(0), seen.classes).to(torch.float32)


def pagerank(seen: GraphTask, start: Probabilities, restart: float, steps: int = 20) -> Probabilities:
    """restart sum_k (1 - restart)^k S^k start, by iteration (Gasteiger et al., ICLR 2019, eq. 4)."""
    out = start
    for _ in range(steps):
        out = (1 - restart) * low_pass(seen, out) + restart * start
    return out


def consistency(draws: list[Probabilities], sharpening: float) -> Float[Tensor, ""]:
    """Mean over draws and nodes of ||p - p'||^2, p' the draws' mean sharpened, without gradient (GRAND, eq. 5 to 7)."""
    mean = torch.stack(draws).mean(dim=0).detach() ** (1 / sharpening)
    sharp = normal(mean)
    return torch.stack([(draw - sharp).square().sum(dim=1).mean() for draw in draws]).mean()


def _member(
    seen: GraphTask, answers: Probabilities, taught: Tensor, seed: int, config: CommitteeConfig, consistent: bool
) -> Probabilities:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RandomPropagation(seen.num_features, config.hidden, seen.classes)
    graph = propagation(seen)
    validate = validation(seen, lambda: model(seen.x, graph)[seen.valid])
    fit(model, _loss(model, seen.x, graph, answers[taught], taught, config, consistent), validate, config.member, seed)
    with torch.no_grad():
        out: Tensor = model(seen.x, graph)
    return out.softmax(dim=1)


def _loss(
    model: RandomPropagation, x: Features, graph: SparseMatrix, wanted: Tensor, taught: Tensor,
    config: CommitteeConfig, consistent: bool,
) -> Callable[[int], Tensor]:  # fmt: skip
    def alone(_: int) -> Tensor:
        return cross_entropy(model(x, graph)[taught], wanted)

    def together(epoch: int) -> Tensor:
        draws: list[Tensor] = [model(x, graph) for _ in range(config.draws)]
        labelled = torch.stack([cross_entropy(draw[taught], wanted) for draw in draws]).mean()
        weight = min(1.0, epoch / 50)  # early answers are noise and must not be held together
        return labelled + weight * consistency([draw.softmax(dim=1) for draw in draws], config.sharpening)

    return together if consistent else alone
