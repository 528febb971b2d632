"""Several teachers -> one target: [teachers, lists, items] -> [lists, items]; masked items become 0.

Teachers differ in scale: standardise (`standardised_mean`) or use ranks, unless they are runs of one model. `Router`
(which teacher for which list) and `SetAttention` (teacher embeddings) learn weights of their own from held-out labels.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.objectives._masks import check_temperature, log_softmax, mean_ranks, standardised, valid_of, zeroed


def mean(
    teachers: Float[Tensor, "teachers lists items"], *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """Mean of the raw scores (Hofstaetter et al. 2020: T2, three models of one kind).

    Raises:
        UsageError: the stack is not [teachers, lists, items], or holds no teacher.
    """
    scores, valid = _stack(teachers, mask)
    return zeroed((scores / len(scores)).sum(0), valid)


def weighted_mean(
    teachers: Float[Tensor, "teachers lists items"],
    weights: Float[Tensor, " teachers"] | Float[Tensor, "teachers lists"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
) -> Float[Tensor, "lists items"]:
    """Mean with one weight per teacher, or per teacher and list (`confidence_weights`); normalised to sum 1.

    Raises:
        UsageError: the shapes do not fit, a weight is negative, weights of a list sum to 0.
    """
    scores, valid = _stack(teachers, mask)
    shares = weights.detach().to(scores.dtype)
    if shares.shape not in (scores.shape[:1], scores.shape[:2]):
        raise UsageError(
            f"weights have shape {list(shares.shape)}; expected [{len(scores)}] or {list(scores.shape[:2])}."
        )
    if bool((shares < 0).any()) or bool((shares.sum(0) <= 0).any()):
        raise UsageError("weights must be at least 0, and above 0 for one teacher of each list.")
    shares = (shares / shares.sum(0)).reshape(*shares.shape, *[1] * (3 - shares.ndim))
    return zeroed((shares * scores).sum(0), valid)


def median(
    teachers: Float[Tensor, "teachers lists items"], *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """Median of the raw scores, the mean of the middle two for an even number: one wild teacher cannot move it."""
    scores, valid = _stack(teachers, mask)
    ordered = scores.sort(dim=0).values
    low, high = ordered[(len(scores) - 1) // 2], ordered[len(scores) // 2]
    return zeroed(low / 2 + high / 2, valid)


def standardised_mean(
    teachers: Float[Tensor, "teachers lists items"], *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """Mean of the z-scores: every teacher's list to mean 0 and population deviation 1; a constant list becomes 0."""
    scores, valid = _stack(teachers, mask)
    return torch.stack([standardised(teacher, valid, 0) for teacher in scores]).mean(0)


def reciprocal_rank(
    teachers: Float[Tensor, "teachers lists items"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    known: Bool[Tensor, "teachers lists items"] | None = None,
    offset: float = 60.0,
) -> Float[Tensor, "lists items"]:
    """Reciprocal-rank fusion (Cormack et al. 2009): sum over teachers of 1 / (offset + rank); tied scores share
    the mean of their ranks. An item that a teacher does not know (`known` False) gets 0 from it.

    Raises:
        UsageError: the shapes do not fit.
    """
    scores, valid = _stack(teachers, mask)
    if known is not None and known.shape != scores.shape:
        raise UsageError(f"known has shape {list(known.shape)}; expected that of the teachers, {list(scores.shape)}.")
    total = torch.zeros_like(scores[0])
    for position, teacher in enumerate(scores):
        listed = valid if known is None else valid & known[position]
        total = total + zeroed(1 / (offset + mean_ranks(zeroed(teacher, listed), listed)), listed)
    return total


def confidence_weights(
    teachers: Float[Tensor, "teachers lists items"],
    *,
    positive: Bool[Tensor, "lists items"] | None = None,
    mask: Bool[Tensor, "lists items"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "teachers lists"]:
    """Weights that sum to 1 over the teachers: softmax(-CE(label, p_k) / temperature), for `weighted_mean`.

    CE is -log of the probability that a teacher gives to the positives together; a list without one (or no
    `positive` at all) uses the teacher's entropy in place of it.

    Raises:
        UsageError: the shapes do not fit, the temperature is not positive.
    """
    check_temperature(temperature)
    scores, valid = _stack(teachers, mask)
    costs = torch.stack([_cost(teacher, valid, positive) for teacher in scores])
    return torch.softmax(-costs / temperature, dim=0)


class Router(nn.Module):
    """Which teacher for which list: shares from a gate on a fixed number of features (MST-Distill, arXiv 2507.07015).

    c = softmax(gate(features)), gate: features -> 2 x features -> teachers; for nodes the features are the student's
    scores, as in the paper; ranking lists vary in length and take fixed figures such as `weights.confidence`,
    `weights.certainty`, `weights.margin` of the student. The last layer starts at zero: a new router is the mean.

    Where we differ: the authors' code uses the gate's choice as an index only, so distillation never reaches the gate.
    Here the shares stay soft and `gate_loss` trains them; their masks and live co-training need running teachers and
    are left out.

    Raises:
        UsageError: fewer than one feature or two teachers.
    """

    def __init__(self, num_features: int, num_teachers: int) -> None:
        super().__init__()
        if num_features < 1 or num_teachers < 2:
            raise UsageError(f"{num_features} features, {num_teachers} teachers; expected at least 1 and 2.")
        last = nn.Linear(2 * num_features, num_teachers)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(nn.Linear(num_features, 2 * num_features), nn.ReLU(), last)

    def forward(self, features: Float[Tensor, "lists features"]) -> Float[Tensor, "teachers lists"]:
        """Shares that sum to 1 over the teachers, with gradients; the features are detached."""
        return torch.softmax(self.gate(features.detach()), dim=-1).T


def routed(
    teachers: Float[Tensor, "teachers lists items"],
    shares: Float[Tensor, "teachers lists"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    top: int | None = None,
) -> Float[Tensor, "lists items"]:
    """sum_k c_k t_k, as `weighted_mean`, but gradients reach the shares; equal shares give `mean`.

    `top` keeps the largest shares of each list and lets them sum to 1 again; top = teachers is the full mixture.

    Raises:
        UsageError: the shapes do not fit, `top` outside 1 ... teachers.
    """
    scores, valid = _stack(teachers, mask)
    if shares.shape != scores.shape[:2]:
        raise UsageError(f"shares have shape {list(shares.shape)}; expected {list(scores.shape[:2])}.")
    if top is not None and not 1 <= top <= len(scores):
        raise UsageError(f"top {top}: expected 1 to {len(scores)}, the number of teachers.")
    kept = shares.to(scores.dtype)
    if top is not None:
        best = kept.topk(top, dim=0)
        kept = torch.zeros_like(kept).scatter(0, best.indices, best.values / best.values.sum(0))
    return zeroed((kept[:, :, None] * scores).sum(0), valid)


def gate_loss(
    teachers: Float[Tensor, "teachers lists items"],
    shares: Float[Tensor, "teachers lists"],
    positive: Bool[Tensor, "lists items"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    balance: float = 0.0,
) -> Float[Tensor, ""]:
    """What a gate learns from: cross-entropy of the mixed teacher on held-out labels + balance KL(uniform, mean share).

    `positive` marks a node's class or a query's relevant items, their probabilities added; lists without one do not
    count. The second term is the paper's: it keeps every teacher in use over the batch, not within a list.

    Raises:
        UsageError: the shapes do not fit, `balance` is negative.
    """
    if balance < 0:
        raise UsageError(f"balance {balance}: expected a number of at least 0.")
    mixed, valid = routed(teachers, shares, mask=mask), valid_of(teachers[0], mask)
    labelled = valid_of(teachers[0], positive) & valid
    own = torch.logsumexp(log_softmax(mixed, valid).masked_fill(~labelled, -1e30), dim=-1)
    counted = labelled.any(-1)
    cross = -zeroed(own, counted).sum() / counted.sum().clamp(min=1)
    mean_share = shares.to(mixed.dtype).mean(1).clamp(min=torch.finfo(mixed.dtype).tiny)
    return cross - balance * (len(shares) * mean_share).log().mean()


class SetAttention(nn.Module):
    """One embedding from those of several teachers, whatever their order and number (Meta-DMoE, arXiv 2210.03885).

    Teachers are tokens without positions: one pre-norm transformer layer (16 heads, dropout 0.1 in the paper), then
    the mean over the teachers present. Train it and a classifier on it with held-out labels; teach the student with
    `representation.feature_mse`. Their rule for training: hide the teacher of a row's own domain (`known` False), so
    that it learns to join the others. Their meta-learning loop is left out.

    Raises:
        UsageError: the heads do not divide the width.
    """

    def __init__(self, num_dims: int, num_heads: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        if num_heads < 1 or num_dims % num_heads:
            raise UsageError(f"{num_heads} heads do not divide {num_dims} dimensions; choose another number of heads.")
        self.layer = nn.TransformerEncoderLayer(
            num_dims, num_heads, 4 * num_dims, dropout, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(
        self, embeddings: Float[Tensor, "teachers rows dims"], known: Bool[Tensor, "teachers rows"] | None = None
    ) -> Float[Tensor, "rows dims"]:
        """The pooled embedding; 0 for a row that no teacher knows.

        Raises:
            UsageError: `known` does not fit.
        """
        if known is None:
            known = torch.ones_like(embeddings[:, :, 0], dtype=torch.bool)
        if known.shape != embeddings.shape[:2]:
            raise UsageError(f"known has shape {list(known.shape)}; expected {list(embeddings.shape[:2])}.")
        here = known.T[:, :, None]
        tokens = zeroed(embeddings.detach().transpose(0, 1), here)
        # a row that no teacher knows attends to its zeros: not every attention kernel has a value for no token at all
        hidden = ~known.T & known.any(0)[:, None]
        joined = self.layer(tokens, src_key_padding_mask=hidden)
        return zeroed(joined, here).sum(1) / here.sum(1).clamp(min=1)


def _cost(teacher: Tensor, valid: Tensor, positive: Tensor | None) -> Float[Tensor, " lists"]:
    """Cross-entropy of the positives, entropy where there is none."""
    log_p = log_softmax(teacher, valid)
    surprise = -(zeroed(log_p.exp(), valid) * log_p).sum(-1)
    if positive is None:
        return surprise
    labelled = positive & valid
    own = torch.logsumexp(log_p.masked_fill(~labelled, -1e30), dim=-1)
    return torch.where(labelled.any(-1), -own, surprise)


def _stack(teachers: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Detached scores in float32 or float64 with masked items 0, and the mask."""
    if teachers.ndim != 3 or len(teachers) == 0:
        raise UsageError(f"teachers have shape {list(teachers.shape)}; expected [teachers, lists, items], one or more.")
    valid = valid_of(teachers[0], mask)
    return zeroed(teachers.detach().to(torch.promote_types(teachers.dtype, torch.float32)), valid), valid
