"""Objectives and policies on node logits, each switched on by one flag beside a method's own terms.

A node's logits are a list of classes, so every objective of `structkd.objectives` and every policy around one serves
here. A method (`distillation`) brings its edge terms; `Policies` adds a term on node logits (`--objective`, kl where
another flag needs one), changes its target or its weights, adds a term on hidden activations, gives the student a
second head, chooses which nodes the teacher is asked about. `--method mlp` has no term of its own: with it an
objective stands alone.
"""

from dataclasses import dataclass
from typing import Literal

from structkd.errors import UsageError
from structkd.policies import (
    REPRESENTATION_FLAG,
    SOFTMAX_OBJECTIVES,
    Number,
    check_sample_weight,
    choice,
    parse_objective,
)

TARGETS = {
    "lelp": Number(2, 1, whole=True), "mixup": Number(1, 0, 1), "rank": None, "standardise": None,
    "taid": Number(0.4, 0, 1), "truncate": Number(3, 2, whole=True),
}  # fmt: skip
ACQUIRE = {"margin": None, "rad": Number(1, 0), "random": None}
KEEP = {"agreement": Number(0.5, 0, 1)}
DOMAINS = {"class": None, "degree": Number(4, 2, whole=True)}


@dataclass(frozen=True)
class Policies:
    """What is switched on beside the method's own terms; nothing by default."""

    objective: str = ""
    "Term on node logits: a name in structkd.objectives.OBJECTIVES, or a weighted sum such as kl:1.0,margin-mse:0.5."

    objective_temperature: float = 1.0
    "Temperature of soft-max objectives, student and teacher."

    target: str = ""
    """Target of that term: taid[:START], truncate[:CLASSES], lelp[:SUBCLASSES], mixup[:SHARE OF NODES], standardise,
    rank."""

    sample_weight: str = ""
    "Weight of each node in that term: certainty, confidence, margin, bd-kd, or tgeo (experimental)."

    representation: str = ""
    "Term on hidden activations: mi-alpha[:ALPHA], infonce, similarity-preserving, affinity-kl, cosine, feature-mse."

    representation_weight: float = 0.1
    "Weight of the term on hidden activations."

    head: Literal["single", "dual"] = "single"
    "dual: one head for the labels, one for the teacher, mixed by shares chosen on validation."

    acquire: str = ""
    "Which nodes the teacher is asked about: random, margin or rad[:PENALTY]; see budget."

    budget: float = 1.0
    "Share of the nodes that the teacher is asked about."

    keep: str = ""
    "Answers to keep: agreement[:CONFIDENCE] of the teacher with a student of the labels alone."

    domains: str = ""
    "Parts of the graph weighed by how far the student lags behind (DDK): degree[:PARTS] or class."

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return self != Policies(objective_temperature=self.objective_temperature)

    def check(self) -> None:
        """UsageError for an unknown name, or flags that exclude each other."""
        parts = self.parts()
        target, _ = choice("--target", self.target, TARGETS)
        for flag, text, known in (("--acquire", self.acquire, ACQUIRE), ("--keep", self.keep, KEEP)):
            choice(flag, text, known)
        choice("--domains", self.domains, DOMAINS)
        choice("--representation", self.representation, REPRESENTATION_FLAG)
        check_sample_weight(self.sample_weight, parts, ("bd-kd", "tgeo"))
        if self.head not in ("single", "dual"):
            raise UsageError(f"--head {self.head!r}: expected single or dual.")
        if target in ("taid", "lelp", "mixup") and not set(parts) <= SOFTMAX_OBJECTIVES:
            raise UsageError(f"--target {target} needs soft-max objectives; {', '.join(parts)} is none.")
        if self.head == "dual" and target in ("lelp", "mixup"):
            raise UsageError(f"--head dual and --target {target} both change the student's outputs; choose one.")
        if not 0 < self.budget <= 1:
            raise UsageError(f"--budget {self.budget}: expected a share of the nodes, above 0 and up to 1.")
        if self.budget < 1 and not self.acquire:
            raise UsageError("--budget needs --acquire random, margin or rad: which nodes to ask about.")
        if self.sample_weight == "tgeo" and (self.head == "dual" or target == "lelp"):
            raise UsageError("--sample-weight tgeo weighs labels against the teacher on one head of class scores.")

    def parts(self) -> dict[str, float]:
        """Objectives on node logits and their weights; kl where another flag needs one, empty where none does."""
        if self.objective:
            return parse_objective(self.objective)
        weighed = self.sample_weight or self.target or self.domains
        return {"kl": 1.0} if weighed and self.head == "single" else {}


NO_POLICIES = Policies()
"Nothing switched on."
