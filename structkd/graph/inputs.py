"""What a student reads of a task: its features as they are, or features prepared from the graph."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from structkd.errors import DataError
from structkd.graph.data import Features, GraphTask


@runtime_checkable
class Inputs(Protocol):
    """Prepares a student's input. `seen` is given the observed view alone; `whole` adds hidden nodes at the end.

    `arrays` and `fields` are what is needed to make it again from a saved student.
    """

    kind: ClassVar[str]

    def seen(self, observed: GraphTask) -> Features:
        """Input of every observed node, for training and validation."""

    def whole(self, task: GraphTask) -> Features:
        """Input of every node of a task, hidden ones included, for judging a finished student."""

    def fields(self) -> dict[str, Any]:
        """Plain values for its description."""

    def arrays(self) -> dict[str, Tensor]:
        """Tensors by name."""


class Raw:
    """The features themselves: the student needs no graph."""

    kind: ClassVar[str] = "raw"

    def seen(self, observed: GraphTask) -> Features:
        """x."""
        return observed.x

    def whole(self, task: GraphTask) -> Features:
        """x."""
        return task.x

    def fields(self) -> dict[str, Any]:
        """None."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """None."""
        return {}


RAW = Raw()


def build_inputs(kind: str, fields: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Inputs:
    """Inputs of a saved student; DataError when there is no such kind."""
    if kind != RAW.kind:
        raise DataError(f"a saved student that reads {kind!r} inputs; expected raw. Was it made by a newer release?")
    return RAW
