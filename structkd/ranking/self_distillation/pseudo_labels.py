"""Pseudo-labels: what models said of pairs becomes targets in [0, 1] for the other kind of model."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from structkd.errors import DataError, UsageError
from structkd.ids import Pairs
from structkd.ranking.data.pair_pool import swapped
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.scores.cache import Scorer
from structkd.scores.manifest import TeacherSpec

TargetMap = Literal["clamp", "shift", "stretch"]
Calibration = Literal["moments", "none"]
FloatArray = NDArray[np.float32]


class SentenceScorer(BiScorer):
    """A bi-encoder for symmetric pairs: one table, one prompt, and a sentence on both sides is encoded once."""

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient; each distinct sentence is encoded once."""
        rows, back = np.unique(np.concatenate([pairs.query_rows, pairs.document_rows]), return_inverse=True)
        vectors = self.encode_rows(pairs.documents, rows, "document")
        left, right = torch.as_tensor(back, device=vectors.device).reshape(2, -1)
        return (vectors[left] * vectors[right]).sum(-1)

    @property
    def spec(self) -> TeacherSpec:
        """Identity of the scores: as the bi-encoder's, with the document's prompt on both sides."""
        spec = super().spec
        extra = {**spec.extra, "sides": "one"}
        return TeacherSpec(**{**spec.fields(), "extra": extra, "prompt": self._document_prompt})


def unit_targets(scores: FloatArray, how: TargetMap, bounded: bool) -> FloatArray:
    """Scores of a bi-encoder as targets in [0, 1].

    clamp: max(0, s). shift: (s + 1) / 2. stretch: the straight line that takes the first percentile to .02 and the
    last to .98, cut at 0 and 1. Soft binary cross-entropy is unbounded below for a target under 0: Trans-Encoder (Liu
    et al. 2022, arXiv 2109.13059, equation 1) trains on raw cosines.

    Raises:
        UsageError: clamp or shift on scores that are no cosines.
    """
    if how == "stretch":
        low, high = np.quantile(scores, [0.01, 0.99])
        spread = max(float(high - low), 1e-9)
        return _float32(np.clip(0.02 + 0.96 * (scores - low) / spread, 0, 1))
    if not bounded:
        raise UsageError(f"target map {how!r} needs cosines; this model's scores have no bounds. Use stretch.")
    mapped = scores if how == "clamp" else (scores + 1) / 2
    return _float32(np.clip(mapped, 0, 1))


def logit_targets(logits: Sequence[FloatArray]) -> FloatArray:
    """Scores of a cross-encoder as targets in [0, 1]: the mean over orders of sigmoid(logit)."""
    return _float32(np.mean([1 / (1 + np.exp(-values.astype(np.float64))) for values in logits], axis=0))


def averaged(members: Sequence[FloatArray]) -> FloatArray:
    """The arithmetic mean of several models' targets (Trans-Encoder, section 3.3: mutual distillation)."""
    return _float32(np.mean(np.stack(members), axis=0, dtype=np.float64))


def blended(targets: FloatArray, labels: FloatArray, agreement: float) -> FloatArray:
    """(targets + a labels) / (1 + a): two teachers' mean, the second one's weight a its agreement with the first.

    A cross-encoder of few pairs or steps has not learned its targets yet, and its labels alone would undo the
    bi-encoder; one that has learned them counts as much as they do. An agreement under 0 weighs nothing.
    """
    weight = max(0.0, agreement)
    return _float32((targets.astype(np.float64) + weight * labels.astype(np.float64)) / (1 + weight))


def calibrated(labels: FloatArray, own: FloatArray, how: Calibration) -> FloatArray:
    """Labels on the scale of the student that learns them.

    moments: moved and stretched to the mean and deviation of the student's own scores of these pairs, so that the
    loss asks for another order, not for another scale. none: as they are.
    """
    if how == "none":
        return labels
    deviation = float(labels.std(dtype=np.float64))
    if deviation == 0:
        raise DataError("all pseudo-labels are equal: the cross-encoder has collapsed. Lower --cross-learning-rate.")
    centred = (labels.astype(np.float64) - labels.mean(dtype=np.float64)) / deviation
    return _float32(own.mean(dtype=np.float64) + own.std(dtype=np.float64) * centred)


def orders(scorer: Scorer, pairs: Pairs, symmetric: bool) -> list[FloatArray]:
    """Raw scores of the pairs, and of the same pairs in the other order when they are symmetric."""
    wanted = [pairs, swapped(pairs)] if symmetric else [pairs]
    return [scorer.score(one).detach().cpu().float().numpy() for one in wanted]


def fit_head(scorer: CrossScorer, pairs: Pairs, targets: FloatArray, ridge: float = 0.02) -> float:
    """Replace the scorer's last layer (one output) by the ridge regression of logit(target) on its inputs.

    A fresh head is noise that the body must first learn around; the solution in closed form costs one forward pass
    over these pairs (linear probing before fine-tuning, Kumar et al. 2022, arXiv 2202.10054).

    Returns:
        correlation of the new scores with logit(target) on these pairs.

    Raises:
        UsageError: the model has no linear layer of one output.
    """
    head = head_of(scorer)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(given[0].detach().double().cpu())
        outputs.append(output.detach().reshape(-1).float().cpu())

    hook = head.register_forward_hook(keep)
    try:
        scores = scorer.score(pairs)
    finally:
        hook.remove()
    features = torch.empty_like(torch.cat(inputs))
    # batches come by length; equal outputs (a pair that is there twice) belong to equal inputs
    features[torch.argsort(scores, stable=True)] = torch.cat(inputs)[torch.argsort(torch.cat(outputs), stable=True)]
    wanted = torch.logit(torch.as_tensor(targets, dtype=torch.float64).clamp(0.02, 0.98))
    centre, mean = features.mean(0), wanted.mean()
    centred = features - centre
    penalty = ridge * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (wanted - mean))
    with torch.no_grad():
        head.weight.copy_(weights[None])
        if head.bias is not None:
            head.bias.copy_((mean - centre @ weights)[None])
    fitted = torch.stack([centred @ weights, wanted - mean])
    return float(torch.corrcoef(fitted)[0, 1])


def head_of(scorer: CrossScorer) -> nn.Linear:
    """The cross-encoder's last linear layer of one output.

    Raises:
        UsageError: there is none.
    """
    heads = [module for module in scorer.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not heads:
        raise UsageError("the cross-encoder has no linear head of one output to fit; use --head fresh.")
    return heads[-1]


def _float32(values: Any) -> FloatArray:
    return np.asarray(values, dtype=np.float32)
