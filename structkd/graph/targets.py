"""What the default method teaches: a committee's answers, unless validation clearly prefers a response of the teacher.

Candidates are spectral responses g(S) of the teacher's probabilities with the training labels put back in first
(identity is GLNN's target, S is FF-G2M's low band, personalised PageRank is between, 2I - S lifts the high band of a
heterophilous graph), and the mean of a self-trained committee's last two rounds (`committee`). The committee is taught
unless a response's validation metric is higher by more than one standard error of the difference (the
one-standard-error rule of Breiman et al., 1984, section 3.4.3): a few hundred labels cannot rank many near-equal
candidates, and the best of them would mostly be luck.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from structkd.graph.committee import DEFAULT, CommitteeConfig, Probabilities, clamped, consult, pagerank
from structkd.graph.data import GraphTask
from structkd.graph.evaluate import metric_of
from structkd.graph.spectral import low_pass

RESTARTS = (0.1, 0.2, 0.5)
"Restart probabilities of the PageRank responses."

RESAMPLES = 200
"Bootstrap resamples of the validation nodes behind a standard error."


@dataclass(frozen=True, eq=False)
class Target:
    """One estimate of every observed node's class, with its validation metric."""

    name: str
    probabilities: Probabilities
    valid: float


def choose_target(
    seen: GraphTask, teacher_logits: Float[Tensor, "nodes classes"], seed: int, config: CommitteeConfig = DEFAULT
) -> Target:
    """The committee's answers, or the best response of the teacher where it leads by more than a standard error."""
    rounds = consult(seen, seed, config)
    usual = _judged(seen, "committee", torch.stack(rounds[-2:]).mean(dim=0))
    best = max(responses(seen, teacher_logits.softmax(dim=1), "teacher"), key=lambda target: target.valid)
    return best if best.valid - usual.valid > standard_error(seen, best, usual, seed) else usual


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


def standard_error(seen: GraphTask, one: Target, other: Target, seed: int) -> float:
    """Bootstrap standard error, over validation nodes, of the difference of two targets' metrics."""
    rows = torch.nonzero(seen.valid).flatten()
    generator = np.random.default_rng(seed)
    labels, everyone = seen.y[rows], torch.ones(len(rows), dtype=torch.bool)
    first, second = (_logs(target.probabilities)[rows] for target in (one, other))
    differences = []
    for _ in range(RESAMPLES):
        drawn = torch.from_numpy(generator.integers(0, len(rows), len(rows)))
        if len(set(labels[drawn].tolist())) < 2 <= len(set(labels.tolist())):
            continue  # a ranking metric has no value on one class
        mine, theirs = (metric_of(each[drawn], labels[drawn], everyone, seen.metric) for each in (first, second))
        differences.append(mine - theirs)
    return float(np.std(differences)) if differences else 0.0


def _judged(seen: GraphTask, name: str, signal: Probabilities) -> Target:
    normal = signal / signal.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return Target(name, normal, metric_of(_logs(normal), seen.y, seen.valid, seen.metric))


def _logs(probabilities: Probabilities) -> Tensor:
    return probabilities.clamp_min(1e-12).log()
