"""What is reported: accuracy or ROC AUC on a mask, and agreement with the teacher per band."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.errors import DataError
from structkd.graph.data.task import UNKNOWN, GraphTask, Metric

RESAMPLES = 200
"Bootstrap resamples of the validation nodes behind a standard error."

CLEARLY = 2.0
"Standard errors by which one answer must lead another on validation before it is preferred to it."


def accuracy(
    logits: Float[Tensor, "nodes classes"], labels: Int[Tensor, " nodes"], mask: Bool[Tensor, " nodes"]
) -> float:
    """Share of masked nodes whose largest logit is the label's."""
    if not bool(mask.any()):
        raise DataError("accuracy of no node: the mask is empty.")
    return float((logits[mask].argmax(dim=1) == labels[mask]).to(torch.float64).mean())


def roc_auc(
    logits: Float[Tensor, "nodes classes"], labels: Int[Tensor, " nodes"], mask: Bool[Tensor, " nodes"]
) -> float:
    """Chance that a positive (class 1) outranks a negative by logit_1 - logit_0; ties count half.

    Raises:
        DataError: not two classes, or only one of them among the masked nodes.
    """
    if logits.shape[1] != 2:
        raise DataError(f"ROC AUC needs 2 classes; found {logits.shape[1]}. Use accuracy.")
    positive = (labels[mask] == 1).numpy()
    if positive.all() or not positive.any():
        raise DataError(f"ROC AUC of {len(positive)} nodes of one class; both must occur.")
    ranks = rankdata((logits[mask, 1] - logits[mask, 0]).to(torch.float64).numpy())
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def metric_of(
    logits: Float[Tensor, "nodes classes"],
    labels: Int[Tensor, " nodes"],
    mask: Bool[Tensor, " nodes"],
    metric: Metric = "accuracy",
) -> float:
    """The task's metric on a mask."""
    if bool((labels[mask] == UNKNOWN).any()):
        raise DataError("some nodes to evaluate have no label here; test labels are blank in a task's observed view.")
    return roc_auc(logits, labels, mask) if metric == "roc_auc" else accuracy(logits, labels, mask)


def validation(
    seen: GraphTask, answers: Callable[[], Tensor], wanted: Tensor | None = None
) -> Callable[[], tuple[float, float]]:
    """What `train.fit` looks at: the metric of the validation nodes' answers, and their cross-entropy.

    Args:
        answers: the model's logits [validation nodes, classes] as it is now.
        wanted: classes or distributions of these nodes that the cross-entropy is towards; their labels by default.
    """
    labels = seen.y[seen.valid]
    everyone = torch.ones(len(labels), dtype=torch.bool)

    def validate() -> tuple[float, float]:
        out = answers()
        loss = cross_entropy(out, labels if wanted is None else wanted)
        return metric_of(out, labels, everyone, seen.metric), float(loss)

    return validate


def standard_error(
    seen: GraphTask, one: Float[Tensor, "nodes classes"], other: Float[Tensor, "nodes classes"], seed: int
) -> float:
    """Bootstrap standard error, over validation nodes, of the difference of two answers' metrics."""
    rows = torch.nonzero(seen.valid).flatten()
    generator = np.random.default_rng(seed)
    labels, everyone = seen.y[rows], torch.ones(len(rows), dtype=torch.bool)
    first, second = one[rows], other[rows]
    differences = []
    for _ in range(RESAMPLES):
        drawn = torch.from_numpy(generator.integers(0, len(rows), len(rows)))
        if len(set(labels[drawn].tolist())) < 2 <= len(set(labels.tolist())):
            continue  # a ranking metric has no value on one class
        mine, theirs = (metric_of(each[drawn], labels[drawn], everyone, seen.metric) for each in (first, second))
        differences.append(mine - theirs)
    return float(np.std(differences)) if differences else 0.0


def report(task: GraphTask, logits: Float[Tensor, "nodes classes"]) -> dict[str, float]:
    """test, and in the inductive and production settings ind, tran, prod = 0.2 ind + 0.8 tran.

    `logits` are those of the weights of best validation: the caller has no other.
    """
    out = {"test": metric_of(logits, task.y, task.test, task.metric)}
    if bool(task.hidden.any()):
        out["ind"] = metric_of(logits, task.y, task.hidden, task.metric)
    if task.setting == "production":
        out["tran"] = metric_of(logits, task.y, task.test & ~task.hidden, task.metric)
        out["prod"] = 0.2 * out["ind"] + 0.8 * out["tran"]
    return out


def confidence(logits: Float[np.ndarray, "nodes classes"]) -> Float[np.ndarray, " nodes"]:
    """Largest probability of each node."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(1.0 / np.exp(shifted).sum(axis=1))
