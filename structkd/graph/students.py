"""Kinds of students that can be saved: how each is described in plain values, and made again from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from structkd.errors import DataError
from structkd.graph.models import Mlp


@dataclass(frozen=True)
class Kind:
    """One kind of student; `fields` holds `widths` [inputs, ..., classes] whatever the kind."""

    module: type[nn.Module]
    fields: Callable[[Any], dict[str, Any]]
    build: Callable[[Mapping[str, Any]], nn.Module]


def mlp_fields(student: Mlp) -> dict[str, Any]:
    """Widths and dropout."""
    return {"widths": student.widths, "dropout": student.dropout}


def build_mlp(fields: Mapping[str, Any]) -> Mlp:
    """An MLP of those widths."""
    inputs, *inner, classes = fields["widths"]
    return Mlp(inputs, inner[0] if inner else 1, classes, len(inner) + 1, fields["dropout"])


STUDENTS: dict[str, Kind] = {"mlp": Kind(Mlp, mlp_fields, build_mlp)}
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
