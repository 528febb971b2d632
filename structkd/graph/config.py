"""DistillConfig: a student and what it is taught, as flags, as a file and in Python."""

from dataclasses import dataclass, replace
from typing import Any

from structkd.errors import UsageError
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask
from structkd.graph.published import given
from structkd.graph.published_students import own_options, student_recipe

ON_DENSE_FEATURES: dict[str, Any] = {"learning_rate": 0.005, "weight_decay": 1e-4}
"Of the default method, where features are dense: weight decay takes rare classes away again, dropout alone does not."


@dataclass(frozen=True)
class DistillConfig:
    """A student and what it is taught; what is left open comes from the published table, or a default."""

    method: str = "ff-g2m"
    "A name in structkd.graph.METHODS, as glnn, lfd, ff-g2m, krd, hgmd, nosmog, infgrand, tined, g2mlp or structkd."

    teacher: str = "gcn"
    "Name of the teacher model: picks the row of published hyper-parameters."

    label_weight: float | None = None
    "Weight of the labels' cross-entropy; the teacher's terms get one minus it."

    temperature: float | None = None
    "Temperature of the method's teacher terms (ff-g2m: of its high-frequency term)."

    layers: int | None = None
    "Number of layers."

    hidden: int | None = None
    "Hidden width."

    dropout: float | None = None
    "Dropout between layers."

    learning_rate: float | None = None
    "Adam's learning rate."

    weight_decay: float | None = None
    "Adam's weight decay."

    epochs: int = 500
    "At most so many epochs."

    patience: int = 50
    "Stop after so many epochs without a validation score that reaches the best."

    batch_nodes: int = 0
    "Nodes per optimiser step; 0: the whole graph in each step."

    batch_edges: int = 0
    "Edges drawn per step for the high-frequency term, with batch_nodes; 0: as many as nodes."

    watch_every: int = 0
    "Record agreement with the teacher per band every so many epochs; 0: never."

    options: str = ""
    "The method's own parameters as NAME=NUMBER,...; those left open come from the published table, or a default."

    def resolved(self, task: GraphTask) -> "DistillConfig":
        """The same with every open field filled for this task.

        Raises:
            UsageError: an option that the method does not have or one that is no number, or a label weight that is no
                share.
        """
        if self.label_weight is not None and not 0 <= self.label_weight <= 1:
            raise UsageError(f"label weight {self.label_weight}: expected a share from 0 to 1.")
        row = student_recipe(self.method, task.name, task.split, self.teacher)
        if self.method == "structkd" and not isinstance(task.x, SparseMatrix):
            row = replace(row, **ON_DENSE_FEATURES)
        own = own_options(self.method, task.name, self.teacher)
        mine = _parsed(self.options)
        unknown = sorted(set(mine) - set(own))
        if unknown:
            known = f"expected some of {', '.join(own)}" if own else "it has none"
            raise UsageError(f"option {unknown[0]!r} of method {self.method}: {known}.")
        return replace(
            self,
            label_weight=row.label_weight if self.label_weight is None else self.label_weight,
            temperature=row.temperature if self.temperature is None else self.temperature,
            layers=row.student_layers if self.layers is None else self.layers,
            hidden=row.student_hidden if self.hidden is None else self.hidden,
            dropout=row.student_dropout if self.dropout is None else self.dropout,
            learning_rate=row.learning_rate if self.learning_rate is None else self.learning_rate,
            weight_decay=row.weight_decay if self.weight_decay is None else self.weight_decay,
            options=",".join(f"{name}={value:g}" for name, value in {**own, **mine}.items()),
        )

    def option(self, name: str) -> float:
        """One of the method's own parameters, of a resolved configuration."""
        return given(_parsed(self.options).get(name))


def config_fields(config: DistillConfig) -> dict[str, Any]:
    """The fields as plain values, for fingerprints."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _parsed(options: str) -> dict[str, float]:
    found = {}
    for part in filter(None, (piece.strip() for piece in options.split(","))):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UsageError(f"option {part!r}: expected NAME=NUMBER, as in power=1.") from None
    return found
