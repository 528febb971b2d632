"""Students beside the plain MLP, and how each kind is described in plain values and made again from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from structkd.errors import DataError
from structkd.graph.data.task import Features
from structkd.graph.models.heads import HeadedMlp
from structkd.graph.models.networks import Linear, Mlp, relu_dropout


class Ensemble(nn.Module):
    """x -> log of the share-weighted mean of the members' probabilities; the shares are kept with the weights."""

    def __init__(self, members: list[Mlp]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.shares: Tensor
        self.register_buffer("shares", torch.full((len(members),), 1.0 / len(members)))

    def forward(self, x: Features) -> Float[Tensor, "nodes classes"]:
        """Log-probabilities, which serve as logits."""
        parts = [member(x).log_softmax(dim=1) for member in self.members]
        return torch.logsumexp(torch.stack(parts) + self.shares.log()[:, None, None], dim=0)


@dataclass(frozen=True)
class Kind:
    """One kind of student; `fields` holds `widths` [inputs, ..., classes] whatever the kind."""

    module: type[nn.Module]
    fields: Callable[[Any], dict[str, Any]]
    build: Callable[[Mapping[str, Any]], nn.Module]


def mlp_fields(student: Mlp) -> dict[str, Any]:
    """Widths and dropout."""
    return {"widths": student.widths, "dropout": student.dropout}


def mlp_of_widths(widths: Sequence[int], dropout: float) -> Mlp:
    """An MLP of any widths [inputs, ..., classes], which need not be one hidden width throughout."""
    student = Mlp(widths[0], 1, widths[-1], 1, dropout)
    student.widths = list(widths)
    student.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))
    return student


def build_mlp(fields: Mapping[str, Any]) -> Mlp:
    """An MLP of those widths."""
    return mlp_of_widths(fields["widths"], fields["dropout"])


def ensemble_fields(student: Ensemble) -> dict[str, Any]:
    """One member's widths and dropout, and how many there are."""
    (first, *_), count = student.members, len(student.members)
    assert isinstance(first, Mlp)
    return {**mlp_fields(first), "members": count}


def build_ensemble(fields: Mapping[str, Any]) -> Ensemble:
    """Members of those widths with equal shares."""
    return Ensemble([build_mlp(fields) for _ in range(fields["members"])])


def headed_fields(student: HeadedMlp) -> dict[str, Any]:
    """As an MLP's, and the rule that folds its outputs."""
    return {**mlp_fields(student), "head": student.head, "per_class": student.per_class}


def build_headed(fields: Mapping[str, Any]) -> HeadedMlp:
    """A headed MLP of that description."""
    inputs, *inner, classes = fields["widths"]
    shape = (inputs, inner[0] if inner else 1, classes, len(inner) + 1, fields["dropout"])
    return HeadedMlp(*shape, head=fields["head"], per_class=fields["per_class"])


STUDENTS: dict[str, Kind] = {
    "headed": Kind(HeadedMlp, headed_fields, build_headed),
    "mlp": Kind(Mlp, mlp_fields, build_mlp),
    "ensemble": Kind(Ensemble, ensemble_fields, build_ensemble),
}
"Name in model.json -> kind."


def describe(student: nn.Module) -> dict[str, Any]:
    """Plain values from which `build` makes an untrained twin.

    Raises:
        DataError: a module of no known kind.
    """
    for name, kind in STUDENTS.items():
        if type(student) is kind.module:
            return {"student": name, **kind.fields(student)}
    raise DataError(f"a student of type {type(student).__name__} cannot be saved; expected {', '.join(STUDENTS)}.")


def build(fields: Mapping[str, Any]) -> nn.Module:
    """An untrained student of that description; one without a kind is an MLP.

    Raises:
        DataError: a kind that does not exist here.
    """
    name = fields.get("student", "mlp")
    if name not in STUDENTS:
        raise DataError(
            f"a saved student of kind {name!r}; expected {', '.join(STUDENTS)}. Was it made by a newer release?"
        )
    return STUDENTS[name].build(fields)


def activations(student: Mlp, x: Features) -> tuple[list[Tensor], list[Features]]:
    """(output of every linear layer, what every linear layer read), from one pass; the last output is the logits."""
    outputs: list[Tensor] = []
    read: list[Features] = [x]
    for layer in student.layers:
        outputs.append(layer(read[-1]))
        if len(outputs) < len(student.layers):
            read.append(relu_dropout(outputs[-1], student.dropout, student.training))
    return outputs, read
