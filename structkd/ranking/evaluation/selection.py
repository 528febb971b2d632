"""Which weights to keep: rank correlation with pseudo-labels of held-out pairs, or with gold scores where given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.ranking.data.pair_pool import PairPool

Select = Literal["agreement", "loss"]
Judge = Callable[[NDArray[np.float32], NDArray[np.float32]], float]


@dataclass(frozen=True)
class PhaseRow:
    """One trained model.

    Attributes:
        cycle: from 1.
        phase: `cross` or `bi`.
        model: which of the starting models, from 1.
        dev: what selection saw, higher is better.
        folder: the model.
        steps: optimizer steps.
        pairs_per_second: of training.
        seconds: of the phase, labelling excluded; 0 when it was finished before.
    """

    cycle: int
    phase: str
    model: int
    dev: float
    folder: str
    steps: int
    pairs_per_second: float
    seconds: float


def spearman(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Spearman's rank correlation, ties at their mean rank (Spearman 1904); 0 when one side is constant."""
    ranks = [mean_ranks(np.asarray(values, dtype=np.float64)) for values in (left, right)]
    centred = [values - values.mean() for values in ranks]
    norms = [float(np.sqrt((values**2).sum())) for values in centred]
    return float((centred[0] * centred[1]).sum() / (norms[0] * norms[1])) if min(norms) > 0 else 0.0


def mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values at the mean of their ranks."""
    _, back, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = ends - (counts - 1) / 2
    return means[back]


def held_out_loss(scores: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    """Minus the mean squared difference, both in [0, 1]."""
    return -float(np.mean((scores.astype(np.float64) - labels) ** 2))


JUDGES: dict[Select, Judge] = {"agreement": spearman, "loss": held_out_loss}


def split_pool(pool: PairPool, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, held-out) positions: single pairs of symmetric ones, else whole queries (pairs, of few queries).

    At least three are held out: of fewer no rank correlation says anything.
    """
    groups = np.arange(len(pool)) if pool.symmetric else pool.pairs.query_rows
    if len(np.unique(groups)) < 6:
        groups = np.arange(len(pool))
    distinct = np.unique(groups)
    shuffled = np.random.default_rng(seed).permutation(distinct)
    held = shuffled[: min(len(distinct) - 3, max(3, round(share * len(distinct))))]
    chosen = np.isin(groups, held)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def best_row(rows: Sequence[PhaseRow], phase: str) -> PhaseRow:
    """The kept model of a kind: the highest `dev`, the latest of equals."""
    return max((row for row in rows if row.phase == phase), key=lambda row: (row.dev, row.cycle))
