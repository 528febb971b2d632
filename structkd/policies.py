"""What lets one flag switch a piece on: the tables of names that both halves read, and weighted sums of objectives.

Each half has a frozen `Policies` of its own (`graph.policies.flags`, `ranking.training.policies`), empty by default:
nothing is switched on that was not asked for. A flag is a name, or NAME:NUMBER where the piece has one number to set.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from structkd.errors import UsageError, did_you_mean
from structkd.objectives import OBJECTIVES, REPRESENTATIONS, representation, weights

SOFTMAX_OBJECTIVES = frozenset(
    {"balanced-kl", "jeffreys", "jensen-shannon", "kl", "listnet", "plackett-luce", "reverse-kl"}
)
"Objectives that turn teacher scores into probabilities: their scale is a temperature, and TAID may move their target."

SAMPLE_WEIGHTS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"certainty": weights.certainty, "confidence": weights.confidence, "margin": weights.margin}
)
"Name on the command line -> weight of a list by its teacher. `bd-kd` and `tgeo` stand beside these: see `Policies`."

REPRESENTATION_NAMES = ("mi-alpha", *REPRESENTATIONS)
"Names on the command line of what compares embeddings."

Margins = Literal["all", "first", "centred"]
_CRITIC_TEMPERATURE = 0.1  # of the cosines that mi-alpha reads; ours
_TEMPERED = ("jeffreys", "jensen-shannon", "kl", "reverse-kl")


def parse_objective(text: str) -> dict[str, float]:
    """`a` or `a:1.0,b:0.5` -> name: weight.

    Raises:
        UsageError: an unknown name, a weight that is no positive number, a name twice.
    """
    parts: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in OBJECTIVES or name in parts:
            known = ", ".join(sorted(OBJECTIVES))
            near = did_you_mean(name, OBJECTIVES) if name not in OBJECTIVES else ""
            raise UsageError(
                f"objective {name!r} in {text!r} is unknown or named twice; expected one of {known}.{near}"
            )
        try:
            parts[name] = float(number) if number else 1.0
        except ValueError:
            parts[name] = 0.0
        if not 0 < parts[name] < float("inf"):
            raise UsageError(f"objective {name!r}: weight {number!r} must be a positive number.")
    return parts


@dataclass(frozen=True)
class Number:
    """The number that a flag's NAME:NUMBER takes: its default and its range."""

    default: float
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and abs(value) < math.inf and not (self.whole and value % 1)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.low == -math.inf:
            return kind
        return f"{kind} from {self.low:g}" + ("" if self.high == math.inf else f" to {self.high:g}")


def choice(flag: str, text: str, known: Mapping[str, Number | None]) -> tuple[str, float]:
    """NAME or NAME:NUMBER -> (name, number), the default of `known` where none is given; ("", 0) for an empty text.

    `known` names what the flag takes, each with its number, None where it takes none.

    Raises:
        UsageError: an unknown name, a number where none belongs, one that is none or out of range.
    """
    if not text:
        return "", 0.0
    name, colon, written = text.partition(":")
    if name not in known:
        raise UsageError(f"{flag} {text!r} is unknown; expected one of {', '.join(known)}.{did_you_mean(name, known)}")
    number = known[name]
    if not colon:
        return name, 0.0 if number is None else number.default
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if number is None or value not in number:
        expected = f"{name} alone" if number is None else f"{name}:NUMBER, {number}"
        raise UsageError(f"{flag} {text!r}: expected {expected}.")
    return name, value


def list_weight(
    name: str, teacher: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"] | None
) -> Float[Tensor, " lists"] | None:
    """The weight of each list under `--sample-weight NAME`, mean 1 over the lists; None where the name sets none.

    The mean is 1 so that the flag changes which lists count, not how much the objective counts beside other terms.
    """
    if name not in SAMPLE_WEIGHTS:
        return None
    raw = SAMPLE_WEIGHTS[name](teacher, mask=mask)
    return raw / raw.mean().clamp(min=torch.finfo(raw.dtype).tiny)


def weighted_sum(
    parts: Mapping[str, float],
    student: Float[Tensor, "lists items"],
    teacher: Float[Tensor, "lists items"],
    *,
    mask: Bool[Tensor, "lists items"] | None = None,
    weight: Float[Tensor, " lists"] | None = None,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    margins: Margins = "all",
    order_only: bool = False,
    balanced: bool = False,
) -> Float[Tensor, ""]:
    """sum of weight x objective over `parts`.

    `balanced` puts BD-KD's two weights on kl (it becomes `balanced_kl`); `order_only` reads no teacher score
    (`plackett-luce` by rank weights).
    """
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for name, factor in parts.items():
        own: dict[str, Any] = {}
        if name == "margin-mse":
            own = {"pairs": margins}
        elif name == "plackett-luce":
            own = {"temperature": temperature} | ({"steps": "log"} if order_only else {})
        elif name == "kl" and balanced:
            name = "balanced-kl"
        elif name in _TEMPERED:
            own = {"temperature": temperature, "student_temperature": student_temperature}
        total = total + factor * OBJECTIVES[name](student, teacher, mask=mask, weight=weight, **own)
    return total


def check_sample_weight(name: str, parts: Mapping[str, float], others: tuple[str, ...]) -> None:
    """UsageError unless the sample weight is known and fits the objectives."""
    if name and name not in (*SAMPLE_WEIGHTS, *others):
        raise UsageError(f"--sample-weight {name!r}: expected one of {', '.join((*SAMPLE_WEIGHTS, *others))}.")
    if name == "bd-kd" and "kl" not in parts:
        raise UsageError("--sample-weight bd-kd weighs the two directions of kl; add --objective kl.")


def representation_loss(
    name: str,
    student: Float[Tensor, "rows student_dims"],
    teacher: Float[Tensor, "rows teacher_dims"],
    *,
    alpha: float = 1.0,
    neighbours: Int[Tensor, "rows neighbours"] | None = None,
) -> Float[Tensor, ""]:
    """One of `REPRESENTATION_NAMES` between embeddings of the same rows.

    mi-alpha reads cosines / 0.1 (ours) and, below alpha 1, NWJ's baseline 1. affinity-kl takes unit rows (ours), so
    that one width serves student and teacher. Widths must agree except for similarity-preserving and affinity-kl.

    Raises:
        UsageError: affinity-kl without neighbours; as the objectives.
    """
    if name == "mi-alpha":
        critic = _unit(student) @ _unit(teacher.detach()).T / _CRITIC_TEMPERATURE
        return representation.mutual_information(critic, alpha=alpha, baseline=torch.ones_like(critic[:, 0]))
    if name == "affinity-kl":
        if neighbours is None:
            raise UsageError("affinity-kl needs the neighbours of each row.")
        return representation.affinity_kl(_unit(student), _unit(teacher.detach()), neighbours=neighbours)
    found: Tensor = REPRESENTATIONS[name](student, teacher)
    return found


REPRESENTATION_FLAG: Mapping[str, Number | None] = MappingProxyType(
    {name: Number(1.0, 0, 1) if name == "mi-alpha" else None for name in REPRESENTATION_NAMES}
)
"What `--representation` takes: alpha for mi-alpha."

SAME_WIDTH = frozenset({"cosine", "feature-mse", "infonce", "mi-alpha"})
"Representation objectives whose student and teacher rows are of one width: the student's pass a learned linear map."


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)
