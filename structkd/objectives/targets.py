"""Transforms of teacher scores [lists, items]: an explicit step, seen in the configuration. Masked items become 0."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from structkd.errors import UsageError
from structkd.objectives._masks import (
    check_temperature,
    descending,
    lists_of,
    mean_ranks,
    standardised,
    valid_of,
    zeroed,
)


def temperature(
    teacher: Float[Tensor, "lists items"], value: float, *, mask: Bool[Tensor, "lists items"] | None = None
) -> Float[Tensor, "lists items"]:
    """t / value.

    Raises:
        UsageError: the value is not positive.
    """
    check_temperature(value)
    scores, _ = _target(teacher, mask)
    return scores / value


def standardise(
    teacher: Float[Tensor, "lists items"], *, mask: Bool[Tensor, "lists items"] | None = None, ddof: int = 0
) -> Float[Tensor, "lists items"]:
    """(t - mean) / standard deviation over the valid items of each list; a constant list becomes 0.

    ddof=0 divides by n (population), ddof=1 by n - 1.
    """
    scores, valid = _target(teacher, mask)
    return standardised(scores, valid, ddof)


def rank(
    teacher: Float[Tensor, "lists items"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    form: Literal["linear", "reciprocal"] = "linear",
    offset: float = 60.0,
) -> Float[Tensor, "lists items"]:
    """Ranks in place of scores; equal scores share the mean of their ranks r = 1 (best) ... n.

    "linear": (n - r) / (n - 1), from 1 down to 0 (a single item: 0). "reciprocal": 1 / (offset + r).

    Raises:
        UsageError: an unknown form.
    """
    scores, valid = _target(teacher, mask)
    ranks = mean_ranks(scores, valid)
    if form == "reciprocal":
        return zeroed(1 / (offset + ranks), valid)
    if form != "linear":
        raise UsageError(f"rank form {form!r} is unknown; expected 'linear' or 'reciprocal'.")
    count = valid.sum(-1, keepdim=True)
    return zeroed((count - ranks) / (count - 1).clamp(min=1), valid)


def truncate(
    teacher: Float[Tensor, "lists items"], keep: int, *, mask: Bool[Tensor, "lists items"] | None = None
) -> Bool[Tensor, "lists items"]:
    """The mask of the `keep` best items of each list by the teacher; equal scores: what stands first is kept.

    Raises:
        UsageError: `keep` is below 1.
    """
    if keep < 1:
        raise UsageError(f"keep {keep}: expected at least 1.")
    scores, valid = _target(teacher, mask)
    best = descending(scores, valid)[:, :keep]
    return torch.zeros_like(valid).scatter(-1, best, True) & valid


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Which row is mixed with which, and by how much: `partner` is a permutation, a row that is its own stays."""

    share: float
    "Weight l of the row itself."

    partner: Int[Tensor, " rows"]
    "The row that gives the rest, 1 - l."

    def mix(self, values: Float[Tensor, "rows dims"]) -> Float[Tensor, "rows dims"]:
        """l x_i + (1 - l) x_partner(i), of features, embeddings, or probabilities.

        Raises:
            UsageError: another number of rows.
        """
        if len(values) != len(self.partner):
            raise UsageError(f"interpolation of {len(self.partner)} rows got {len(values)} rows.")
        partner = self.partner.to(values.device)
        mixed = self.share * values + (1 - self.share) * values[partner]
        own = partner == torch.arange(len(partner), device=values.device)
        return torch.where(own[:, None], values, mixed)  # l x + (1 - l) x is not x to the last bit

    def mix_targets(self, teacher: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows classes"]:
        """Scores whose soft-max is the mixture of the soft-maxes: log(l p_i + (1 - l) p_partner(i)), detached."""
        log_p = torch.log_softmax(_target(teacher, None)[0], dim=-1)
        other = log_p[self.partner.to(log_p.device)]
        # shares of exactly 0 are -inf here, and logaddexp leaves that side out
        shares = log_p.new_tensor([self.share, 1 - self.share]).log()
        return torch.logaddexp(log_p + shares[0], other + shares[1])


def interpolation(
    rows: int, *, generator: np.random.Generator, alpha: float = 1.0, mixed: float = 1.0
) -> Interpolation:
    """Target interpolation: one share l from Beta(alpha, alpha) and partners for round(mixed x rows) rows.

    What remains of mixup in distillation (Choi et al., arXiv 2211.03946) when the teacher's scores are cached: the
    student sees mixed inputs, and the target is the mixture of two stored answers, not the teacher's own answer to
    the mixed input, which only a live teacher can give. So it is another method under its own
    name. Mixed rows change places along one random cycle, so each of them serves exactly once (the authors' code
    draws with replacement, so that "10 %" mixes some 40 %) and none is its own partner. For rows of features: nodes
    or embeddings; mixing texts has no meaning.

    Raises:
        UsageError: alpha is not positive, `mixed` outside [0, 1].
    """
    if not alpha > 0 or not 0 <= mixed <= 1:
        raise UsageError(f"alpha {alpha}, mixed {mixed}: expected alpha above 0 and a share in [0, 1].")
    partner = np.arange(rows)
    cycle = generator.permutation(rows)[: round(mixed * rows)]
    partner[cycle] = np.roll(cycle, 1)
    return Interpolation(float(generator.beta(alpha, alpha)), torch.from_numpy(partner))


@dataclass(frozen=True)
class TaidConfig:
    """How fast TAID moves from the student's own distribution to the teacher's."""

    steps: int = 1000
    "Updates until the ramp reaches its end."

    start: float = 0.4
    "First share of the teacher."

    end: float = 1.0
    "Last share of the teacher."

    alpha: float = 5e-4
    "Size of the adaptive part; below some 4,000 steps it moves nothing: use 3/steps to 5/steps."

    beta: float = 0.99
    "Momentum of the relative loss change."

    adaptive: bool = True
    "False leaves the linear ramp alone."


class Taid:
    """TAID, time-adaptive interpolated targets (arXiv 2501.16937, algorithm 1): the target starts near the student.

    `target` mixes the scores, softmax((1 - l) student + l teacher) being the intermediate teacher; the objective
    must be a soft-max one (on squares TAID is only a warm-up). `update` after each loss moves l up, never down:
    with d = (J_prev - J) / (J_prev + 1e-15) and m = beta m + (1 - beta) d,
    l = min(end, max(start + (end - start) step / steps, l + alpha sigmoid(m) (1 - l))).
    Feed it the value of KL, as the paper does; the reference code feeds cross-entropy. Student and teacher scores
    should share a scale: standardise first if they do not.
    """

    def __init__(self, config: TaidConfig = TaidConfig()) -> None:
        if config.steps < 1 or not 0 <= config.start <= config.end <= 1:
            raise UsageError(
                f"TAID: steps {config.steps}, start {config.start}, end {config.end}; expected steps >= 1 and "
                "0 <= start <= end <= 1."
            )
        self.config = config
        self.share = config.start
        self._momentum = 0.0
        self._previous: float | None = None

    def target(
        self,
        student: Float[Tensor, "lists items"],
        teacher: Float[Tensor, "lists items"],
        *,
        mask: Bool[Tensor, "lists items"] | None = None,
    ) -> Float[Tensor, "lists items"]:
        """(1 - l) student + l teacher, detached."""
        lists = lists_of(student.detach(), teacher, mask)
        return (1 - self.share) * lists.student + self.share * lists.teacher

    def update(self, loss: float | Tensor, step: int) -> None:
        """Take the loss of step `step` (from 0); the first call only stores it."""
        value, config = float(loss), self.config
        if self._previous is not None:
            change = (self._previous - value) / (self._previous + 1e-15)
            self._momentum = config.beta * self._momentum + (1 - config.beta) * change
            push = config.alpha * float(torch.sigmoid(torch.tensor(self._momentum, dtype=torch.float64)))
            ramp = config.start + (config.end - config.start) * step / config.steps
            adapted = self.share + push * (1 - self.share) if config.adaptive else self.share
            self.share = min(config.end, max(ramp, adapted))
        self._previous = value

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint must hold."""
        return {"share": self.share, "momentum": self._momentum, "previous": self._previous}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: the state is not TAID's.
        """
        share, momentum = state.get("share"), state.get("momentum")
        if share is None or momentum is None or "previous" not in state:
            raise UsageError(f"TAID state has the keys {sorted(state)}; expected share, momentum and previous.")
        self.share, self._momentum, self._previous = share, momentum, state["previous"]


def _target(teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Detached scores in float32 or float64, masked ones 0, and the mask."""
    valid = valid_of(teacher, mask)
    return zeroed(teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32)), valid), valid
