"""KRD: neighbours teach in proportion to how little noise on the features moves the teacher's certainty about them.

Wu et al., "Quantifying the Knowledge in GNNs for Reliable Distillation into MLPs", ICML 2023.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask
from structkd.graph.losses import neighbour_weights
from structkd.graph.methods.lesson import Lesson, Teaching, Weights, answers, edge_divergence, taught_by
from structkd.graph.models.teacher import Teacher
from structkd.graph.published import given

BINS = 50
"Bins of the histogram that the power is fitted to."


def reliable_neighbours(lesson: Lesson) -> Teaching:
    """Mean over kept edges and all self-loops of KL_tau(t_j || s_i); which edges are kept is drawn every epoch."""
    student, x = lesson.student(), lesson.seen.x
    sensitivity = noise_sensitivity(given(lesson.teacher), lesson.seen, lesson.generator(1))
    rule = KeepRule(sensitivity, lesson.config.option("power"), lesson.config.option("momentum"))
    weights = kept_weights(lesson, rule, lambda: answers(student, x))
    term = edge_divergence(given(lesson.logits), weights, given(lesson.config.temperature))
    return Teaching(student, taught_by(lesson, student, x, [term]))


@torch.no_grad()
def noise_sensitivity(teacher: Teacher, seen: GraphTask, generator: torch.Generator) -> Float[Tensor, " nodes"]:
    """rho_j = |H(f(A, X + n)_j) - H(f(A, X)_j)| over its maximum, one draw of n ~ N(0, 1) (eq. 4)."""
    plain = seen.x.dense() if isinstance(seen.x, SparseMatrix) else seen.x
    noisy = plain + torch.randn(plain.shape, generator=generator)
    graph = teacher.model.prepare(seen)  # type: ignore[operator]
    teacher.model.eval()
    change = (entropy(teacher.model(noisy, graph)) - entropy(teacher.model(seen.x, graph))).abs()
    return change / change.max().clamp_min(torch.finfo(change.dtype).tiny)


def entropy(logits: Float[Tensor, "nodes classes"]) -> Float[Tensor, " nodes"]:
    """Entropy of softmax(logits) in nats."""
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)


class KeepRule:
    """p_j = 1 - rho_j^alpha, its power alpha fitted to how often student and teacher agree (eq. 6, 7)."""

    def __init__(self, sensitivity: Float[Tensor, " nodes"], power: float, momentum: float) -> None:
        self.sensitivity, self.power, self.momentum = sensitivity, power, momentum

    def probability(self) -> Float[Tensor, " nodes"]:
        """Chance that a node teaches its neighbours."""
        return (1 - self.sensitivity**self.power).clamp(0, 1)

    def update(self, agrees: Bool[Tensor, " nodes"]) -> None:
        """Move the power towards the least-squares fit of 1 - x^alpha to this epoch's histogram.

        The abscissa of a bin is its middle; the released code adds .05 where half a bin is .01.
        """
        share = agreement_histogram(self.sensitivity, agrees)
        if share is None:
            return
        middles = (np.arange(BINS) + 0.5) / BINS

        def residuals(power: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.asarray(1 - middles ** power[0] - share)

        found = least_squares(residuals, [self.power], method="lm").x[0]
        self.power = self.momentum * self.power + (1 - self.momentum) * float(found)


def agreement_histogram(
    sensitivity: Float[Tensor, " nodes"], agrees: Bool[Tensor, " nodes"]
) -> NDArray[np.float64] | None:
    """Share of agreeing nodes per bin of sensitivity, scaled to [0, 1]; None when every bin is alike."""
    values = sensitivity.numpy().astype(np.float64)
    both, _ = np.histogram(values, bins=BINS, range=(0, 1))
    agreeing, _ = np.histogram(values[agrees.numpy()], bins=BINS, range=(0, 1))
    share = agreeing / (both + 1e-6)
    spread = share.max() - share.min()
    return (share - share.min()) / spread if spread > 0 else None


def kept_weights(lesson: Lesson, rule: KeepRule, answer: Callable[[], Tensor]) -> Weights:
    """epoch -> (A masked by a draw per edge + I) over its number of entries; all edges in the first epochs."""
    seen, warmup = lesson.seen, int(lesson.config.option("warmup"))
    everyone, generator = neighbour_weights(seen), lesson.generator(2)
    wanted = given(lesson.logits).argmax(dim=1)

    def weights(epoch: int) -> SparseMatrix:
        if epoch <= warmup:
            return everyone
        rule.update(answer().argmax(dim=1) == wanted)
        return neighbour_weights(seen, torch.bernoulli(rule.probability()[seen.edge_index[1]], generator=generator) > 0)

    return weights
