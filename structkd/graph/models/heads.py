"""Students of several outputs per class, two heads (DHO) or pseudo-subclasses (LELP), folded into one score each."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from structkd.errors import UsageError
from structkd.graph.data.task import Features
from structkd.graph.models.networks import Mlp
from structkd.objectives.dual_head import HeadScores, mixed_probabilities
from structkd.objectives.subclasses import class_scores

Head = Literal["dual", "subclasses"]


class HeadedMlp(Mlp):
    """An MLP of `per_class` outputs for each class, and the rule that makes one score per class of them.

    "dual": the first outputs are the label head, the others the teacher head; the score is the log of
    `mixed_probabilities`, its share and temperature kept in `mix`. "subclasses": columns class x per_class + s, and
    the score is `class_scores`.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        classes: int,
        layers: int = 2,
        dropout: float = 0.5,
        *,
        head: Head = "dual",
        per_class: int = 2,
    ) -> None:
        if head == "dual" and per_class != 2:
            raise UsageError(f"a dual head has two outputs per class, found {per_class}.")
        super().__init__(inputs, hidden, classes * per_class, layers, dropout)
        self.widths = [*self.widths[:-1], classes]
        self.head: Head = head
        self.per_class = per_class
        self.mix: Tensor
        self.register_buffer("mix", torch.tensor([0.5, 1.0]))

    def forward(self, x: Features) -> Float[Tensor, "nodes classes"]:
        """One score per class and row."""
        return self.fold(super().forward(x))

    def heads(self, raw: Float[Tensor, "nodes outputs"]) -> HeadScores:
        """The outputs of a dual head, apart."""
        classes = self.widths[-1]
        return HeadScores(raw[:, :classes], raw[:, classes:])

    def fold(self, raw: Float[Tensor, "nodes outputs"]) -> Float[Tensor, "nodes classes"]:
        """One score per class from all outputs."""
        if self.head == "subclasses":
            return class_scores(raw, self.widths[-1])
        share, temperature = self.mix.tolist()
        mixed = mixed_probabilities(self.heads(raw), share=share, temperature=temperature)
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()
