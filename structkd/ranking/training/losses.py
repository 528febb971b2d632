"""Losses on labels: how a cross-encoder teacher is taught from judgements. Lists as in `structkd.objectives`."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, softplus


def ranknet_labels(
    scores: Float[Tensor, "lists items"], labels: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]
) -> Float[Tensor, ""]:
    """Mean over pairs with label_i > label_j of softplus(-(s_i - s_j)); 0 without such a pair.

    The pairwise loss of the teachers in Hofstatter et al. 2020 (section 3.1); Burges et al. 2005, equation 3.
    """
    better = (labels[:, :, None] > labels[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    values = softplus(-(scores[:, :, None] - scores[:, None, :]))
    return torch.where(better, values, 0).sum() / better.sum().clamp(min=1)


def pointwise_labels(
    scores: Float[Tensor, "lists items"], labels: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]
) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of sigmoid(s) with label > 0 over the valid items (Nogueira and Cho 2019, eq. 1)."""
    values = binary_cross_entropy_with_logits(scores, (labels > 0).to(scores.dtype), reduction="none")
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def listwise_labels(
    scores: Float[Tensor, "lists items"], labels: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]
) -> Float[Tensor, ""]:
    """Mean over lists with a positive of -sum_i p_i log softmax(s)_i, p the labels divided by their sum.

    Softmax cross-entropy (Bruch et al. 2019, equation 2); with one positive it is the localised contrastive
    estimation loss of Gao et al. 2021.
    """
    gains = torch.where(mask, labels.clamp(min=0), 0)
    total = gains.sum(-1, keepdim=True)
    filled = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    values = -(gains / total.clamp(min=1e-9) * log_softmax(filled, dim=-1).masked_fill(~mask, 0)).sum(-1)
    counted = total[:, 0] > 0
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "listwise": listwise_labels,
    "pointwise": pointwise_labels,
    "ranknet": ranknet_labels,
}
"Name on the command line -> loss."
