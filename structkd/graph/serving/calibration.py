"""When to believe a student: its temperature, its calibration error, and which nodes should still go to the teacher."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.errors import DataError, UsageError

Logits = Float[Tensor, "nodes classes"]
Labels = Int[Tensor, " nodes"]


def best_temperature(logits: Logits, labels: Labels) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T), in [0.01, 100] (Guo et al., ICML 2017, sec. 4.2).

    Raises:
        DataError: no labelled node to fit on.
    """
    if not len(labels):
        raise DataError("temperature of no node: calibration needs validation nodes.")
    wide = logits.to(torch.float64)

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(wide / 10.0**log_temperature, labels))

    found = minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded", options={"xatol": 1e-6})
    return float(10.0**found.x)


def calibration_error(logits: Logits, labels: Labels, temperature: float = 1.0, bins: int = 15) -> float:
    """Expected calibration error: sum over equal bins of confidence of (share of nodes) |accuracy - mean confidence|.

    Guo et al., ICML 2017, eq. 3; bins are ((b - 1)/B, b/B].
    """
    if not len(labels):
        raise DataError("calibration error of no node.")
    confidence, answer = (logits.to(torch.float64) / temperature).softmax(dim=1).max(dim=1)
    right = (answer == labels).to(torch.float64)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(labels))


@dataclass(frozen=True, eq=False)
class Fallback:
    """Nodes whose student is not sure enough.

    Attributes:
        rows: rows of the graph that should go to the teacher, least confident first.
        threshold: calibrated confidence below which a node is among them.
        share: how many they are of all nodes.
        metrics: on validation nodes, `share_valid` and the accuracies `student`, and with a teacher `teacher`, `mix`.
    """

    rows: Int[Tensor, " rows"]
    threshold: float
    share: float
    metrics: dict[str, float]


def fallback(
    logits: Logits,
    labels: Labels,
    valid: Bool[Tensor, " nodes"],
    temperature: float,
    *,
    share: float | None = None,
    threshold: float | None = None,
    teacher: Logits | None = None,
) -> Fallback:
    """The nodes of lowest calibrated confidence: a share of all nodes, or those below a threshold.

    Raises:
        UsageError: both or neither of share and threshold, or one outside [0, 1].
    """
    if (share is None) == (threshold is None):
        raise UsageError("fallback: give either a share of nodes or a confidence threshold.")
    value = share if share is not None else threshold
    if value is None or not 0 <= value <= 1:
        raise UsageError(f"fallback {value}: expected a number from 0 to 1.")
    confidence = (logits.to(torch.float64) / temperature).softmax(dim=1).max(dim=1).values
    order = confidence.argsort(stable=True)
    count = round(value * len(order)) if share is not None else int((confidence < value).sum())
    rows = order[:count]
    sent = torch.zeros(len(order), dtype=torch.bool)
    sent[rows] = True
    limit = value if share is None else float(confidence[order[count]]) if count < len(order) else 1.0
    metrics = {"share_valid": float(sent[valid].double().mean()), "student": _right(logits, labels, valid)}
    if teacher is not None:
        metrics["teacher"] = _right(teacher, labels, valid)
        answers = torch.where(sent, teacher.argmax(dim=1), logits.argmax(dim=1))
        metrics["mix"] = float((answers == labels)[valid].double().mean())
    return Fallback(rows, limit, count / max(1, len(order)), metrics)


def _right(logits: Logits, labels: Labels, mask: Bool[Tensor, " nodes"]) -> float:
    return float((logits.argmax(dim=1) == labels)[mask].double().mean())
