"""What a student reads of a task: its features as they are, or features prepared from the graph."""

from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask


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


def of_one_scale(task: GraphTask) -> GraphTask:
    """The task with its features divided by their median magnitude, zeros left out.

    Networks of a fixed step size and weight decay learn nothing from words that are written 1/n instead of 1. The
    median, since counts have long tails.
    """
    return divided(task, median_magnitude(task.x))


def divided(task: GraphTask, unit: float) -> GraphTask:
    """The task with x / unit in place of x."""
    x = task.x
    if unit == 1.0:
        return task
    return replace(task, x=x.with_values(x.values / unit) if isinstance(x, SparseMatrix) else x / unit)


def median_magnitude(x: Features) -> float:
    """Median of |x| over entries that are not zero; 1 where all are."""
    values = x.values if isinstance(x, SparseMatrix) else x
    magnitudes = values[values != 0].abs()
    return float(magnitudes.median()) if len(magnitudes) else 1.0
