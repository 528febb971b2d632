"""What the default method teaches: the best of several label estimates, chosen on validation nodes.

Candidates are spectral responses g(S) of the teacher's probabilities with the training labels put back in first
(identity is GLNN's target, S is FF-G2M's low band, personalised PageRank is between, 2I - S lifts the high band of a
heterophilous graph), and a committee of small APPNP models that is trained once on the labels and once more on its own
confident answers. Only training labels teach; validation labels choose; nothing else is seen.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from structkd.graph.data import GraphTask
from structkd.graph.evaluate import metric_of
from structkd.graph.models import Appnp
from structkd.graph.spectral import low_pass
from structkd.graph.train import FitConfig, fit

Probabilities = Float[Tensor, "nodes classes"]

RESTARTS = (0.1, 0.2, 0.5)
"Restart probabilities of the PageRank responses."

MEMBERS = 4
"Models of a committee."

TRUSTED = 0.5
"Share of each class's unlabelled nodes, most confident first, whose answers the second round learns from."

_MEMBER = FitConfig(learning_rate=0.01, weight_decay=5e-3, epochs=300, patience=60, select="loss")


@dataclass(frozen=True, eq=False)
class Target:
    """One estimate of every observed node's class, with its validation figures."""

    name: str
    probabilities: Probabilities
    valid: float
    valid_loss: float


def choose_target(seen: GraphTask, teacher_logits: Float[Tensor, "nodes classes"], seed: int) -> Target:
    """The candidate of highest validation metric; a tie goes to the smaller validation cross-entropy."""
    teacher = teacher_logits.softmax(dim=1)
    found = responses(seen, teacher, "teacher")
    first = committee(seen, _one_hot_labels(seen), seen.train, seed)
    found += responses(seen, first, "committee")
    answers, trusted = confident_answers(seen, pagerank(seen, clamped(seen, first), RESTARTS[1]))
    second = committee(seen, answers, trusted, seed + MEMBERS)
    found += responses(seen, second, "self-trained committee")
    found.append(_judged(seen, "both committees", (first + second) / 2))
    return max(found, key=lambda target: (target.valid, -target.valid_loss))


def responses(seen: GraphTask, probabilities: Probabilities, name: str) -> list[Target]:
    """Identity, one smoothing, PageRank by each restart, and the high-band lift, all on clamped training labels."""
    start = clamped(seen, probabilities)
    lifted = (2 * start - low_pass(seen, start)).clamp_min(0)
    signals = {
        name: probabilities,
        f"{name}, smoothed": low_pass(seen, start),
        **{f"{name}, PageRank {restart}": pagerank(seen, start, restart) for restart in RESTARTS},
        f"{name}, high band lifted": lifted,
    }
    return [_judged(seen, key, signal) for key, signal in signals.items()]


def clamped(seen: GraphTask, probabilities: Probabilities) -> Probabilities:
    """The same with the training rows replaced by their labels."""
    return torch.where(seen.train[:, None], _one_hot_labels(seen), probabilities)


def pagerank(seen: GraphTask, start: Probabilities, restart: float, steps: int = 20) -> Probabilities:
    """restart sum_k (1 - restart)^k S^k start, by iteration (Gasteiger et al., ICLR 2019, eq. 4)."""
    out = start
    for _ in range(steps):
        out = (1 - restart) * low_pass(seen, out) + restart * start
    return out


def committee(seen: GraphTask, answers: Probabilities, taught: Bool[Tensor, " nodes"], seed: int) -> Probabilities:
    """Mean probabilities of APPNP models with dropout on their inputs, taught `answers` on the `taught` nodes."""
    return torch.stack([_member(seen, answers, taught, seed * 1000 + k) for k in range(MEMBERS)]).mean(dim=0)


def confident_answers(seen: GraphTask, probabilities: Probabilities) -> tuple[Probabilities, Bool[Tensor, " nodes"]]:
    """Hard answers, and the nodes to trust: training nodes with their labels, and each class's most confident others.

    Validation nodes are never trusted: they must stay able to choose.
    """
    chosen = probabilities.argmax(dim=1)
    confidence = (probabilities / probabilities.sum(dim=1, keepdim=True).clamp_min(1e-12)).max(dim=1).values
    trusted = seen.train.clone()
    for label in range(seen.classes):
        rows = torch.nonzero((chosen == label) & ~seen.valid & ~seen.train).flatten()
        best = rows[confidence[rows].argsort(descending=True, stable=True)]
        trusted[best[: int(TRUSTED * len(rows))]] = True
    return clamped(seen, one_hot(chosen, seen.classes).to(torch.float32)), trusted


def _member(seen: GraphTask, answers: Probabilities, taught: Tensor, seed: int) -> Probabilities:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Appnp(seen.num_features, 64, seen.classes, 2, 0.5, input_dropout=0.5)
    graph, wanted = model.prepare(seen), answers[taught]

    def validate() -> tuple[float, float]:
        out = model(seen.x, graph)
        loss = cross_entropy(out[seen.valid], seen.y[seen.valid])
        return metric_of(out, seen.y, seen.valid, seen.metric), float(loss)

    fit(model, lambda _: cross_entropy(model(seen.x, graph)[taught], wanted), validate, _MEMBER, seed)
    with torch.no_grad():
        out: Tensor = model(seen.x, graph)
    return out.softmax(dim=1)


def _judged(seen: GraphTask, name: str, signal: Probabilities) -> Target:
    normal = signal / signal.sum(dim=1, keepdim=True).clamp_min(1e-12)
    logs = normal.clamp_min(1e-12).log()
    loss = torch.nn.functional.nll_loss(logs[seen.valid], seen.y[seen.valid])
    return Target(name, normal, metric_of(logs, seen.y, seen.valid, seen.metric), float(loss))


def _one_hot_labels(seen: GraphTask) -> Probabilities:
    return one_hot(seen.y.clamp_min(0), seen.classes).to(torch.float32)
