"""Dual heads (DHO): one body, one head that learns the labels and one that learns the teacher, mixed only when asked.

DHO (arXiv 2505.07675): labels and teacher pull a single head in different directions where they disagree; two heads on
one body keep both, and their share is chosen after training, on validation data. Few labels and many teacher scores is
the case it was made for, as on graphs with 20 labels per class.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from structkd.errors import UsageError
from structkd.objectives.listwise import kl

SHARES = tuple(step / 20 for step in range(21))
"Shares of the label head that `choose_mix` tries."

TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"Temperatures of the teacher head that `choose_mix` tries."


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What the two heads say: `label` learns the labels, `teacher` the teacher."""

    label: Float[Tensor, "rows classes"]
    teacher: Float[Tensor, "rows classes"]


class DualHead(nn.Module):
    """Two linear heads on one body: any module that turns inputs into [rows, dims]."""

    def __init__(self, body: nn.Module, num_dims: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.label_head = nn.Linear(num_dims, num_classes)
        self.teacher_head = nn.Linear(num_dims, num_classes)

    def forward(self, x: Tensor) -> HeadScores:
        """Scores of both heads."""
        hidden = self.body(x)
        return HeadScores(self.label_head(hidden), self.teacher_head(hidden))


def dual_loss(
    heads: HeadScores,
    teacher: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    labelled: Bool[Tensor, " rows"],
    *,
    label_share: float = 0.5,
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """label_share CE(label head, labels) + (1 - label_share) T^2 [KL_labelled + KL_unlabelled](teacher, teacher head).

    Each term is the mean over its own rows, and 0 where it has none. `labels` of unlabelled
    rows are never read.

    Raises:
        UsageError: shapes do not fit, the share is outside [0, 1].
    """
    if not 0 <= label_share <= 1:
        raise UsageError(f"label_share {label_share}: expected a number in [0, 1].")
    if labels.shape != labelled.shape or labels.shape != heads.label.shape[:1]:
        raise UsageError(f"{len(labels)} labels, {len(labelled)} flags for {len(heads.label)} rows; expected one each.")
    rows = labelled.nonzero()[:, 0]
    supervised = cross_entropy(heads.label[rows], labels[rows], reduction="sum") / max(1, len(rows))
    divergence = kl(heads.teacher, teacher, temperature=temperature, rescale=True, reduction="none")
    parts = [divergence[part].sum() / part.sum().clamp(min=1) for part in (labelled, ~labelled)]
    return label_share * supervised + (1 - label_share) * (parts[0] + parts[1])


def mixed_probabilities(
    heads: HeadScores, *, share: float = 0.5, temperature: float = 1.0
) -> Float[Tensor, "rows classes"]:
    """share x softmax(label head) + (1 - share) x softmax(teacher head / temperature).

    Raises:
        UsageError: the share is outside [0, 1], the temperature not positive.
    """
    if not 0 <= share <= 1 or not temperature > 0:
        raise UsageError(f"share {share}, temperature {temperature}: expected a share in [0, 1] and a number above 0.")
    return share * heads.label.softmax(-1) + (1 - share) * (heads.teacher / temperature).softmax(-1)


def choose_mix(heads: HeadScores, labels: Int[Tensor, " rows"]) -> tuple[float, float]:
    """(share, temperature) of highest accuracy on validation rows, over SHARES x TEMPERATURES.

    A tie goes to the smaller cross-entropy, so that equal accuracies do not settle on a corner of the grid.

    Raises:
        UsageError: no validation row, or not one label per row.
    """
    if not len(labels) or labels.shape != heads.label.shape[:1]:
        raise UsageError(f"{len(labels)} labels for {len(heads.label)} validation rows; expected one each, and some.")
    best = (-1.0, -float("inf"), 0.0, 0.0)
    for share in SHARES:
        for temperature in TEMPERATURES:
            p = mixed_probabilities(heads, share=share, temperature=temperature)
            own = p.gather(1, labels[:, None]).clamp(min=torch.finfo(p.dtype).tiny)
            accuracy = float((p.argmax(1) == labels).double().mean())
            best = max(best, (accuracy, float(own.log().mean()), share, temperature))
    return best[2], best[3]


def joined_queries(
    label: Float[Tensor, "queries label_dims"], teacher: Float[Tensor, "queries teacher_dims"], *, share: float = 0.5
) -> Float[Tensor, "queries dims"]:
    """[share q_1; (1 - share) q_2]: against `joined_documents` its inner product is the mix of both heads' scores.

    share <q_1, d_1> + (1 - share) <q_2, d_2> = <[share q_1; (1 - share) q_2], [d_1; d_2]>: ranking mixes scores, not
    probabilities, so one index of inner products serves both heads, and the share is chosen at query time. Do not
    normalise what comes out: that would change the share from query to query.

    Raises:
        UsageError: the share is outside [0, 1], or the numbers of rows differ.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"share {share}: expected a number in [0, 1].")
    return _joined(share * label, (1 - share) * teacher)


def joined_documents(
    label: Float[Tensor, "documents label_dims"], teacher: Float[Tensor, "documents teacher_dims"]
) -> Float[Tensor, "documents dims"]:
    """[d_1; d_2], the other side of `joined_queries`: index it with metric "ip", unnormalised.

    Raises:
        UsageError: the numbers of rows differ.
    """
    return _joined(label, teacher)


def _joined(first: Tensor, second: Tensor) -> Float[Tensor, "rows dims"]:
    if len(first) != len(second):
        raise UsageError(
            f"{len(first)} rows of the label head and {len(second)} of the teacher head; expected as many."
        )
    return torch.cat([first, second], dim=1)
