"""Train a graph teacher, and write what it says about every node into a score cache."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from structkd import scores
from structkd.errors import DataError, MissingScoreError, TeacherMismatchError, UsageError
from structkd.graph.data.task import GraphTask
from structkd.graph.evaluate import report, validation
from structkd.graph.models.networks import build_teacher
from structkd.graph.models.sampled import SampledTraining, layerwise_logits, parsed_fan_outs, restricted
from structkd.graph.models.train import Fit, FitConfig, Selection, at_least_one, fit
from structkd.graph.published import given, recipe
from structkd.ids import fingerprint_arrays
from structkd.progress import note
from structkd.scores.formats.node_files import read_node_file
from structkd.scores.manifest import Header


@dataclass(frozen=True)
class TeacherConfig:
    """A graph teacher; what is left open comes from the published table of the dataset, or a default."""

    model: str = "gcn"
    "gcn, sage, gat, appnp or gcnii."

    layers: int | None = None
    "Number of layers."

    hidden: int | None = None
    "Hidden width."

    dropout: float | None = None
    "Dropout between layers."

    heads: int = 4
    "Attention heads (gat)."

    learning_rate: float | None = None
    "Adam's learning rate."

    weight_decay: float | None = None
    "Adam's weight decay."

    epochs: int = 500
    "At most so many epochs."

    patience: int = 50
    "Stop after so many epochs without a validation score that reaches the best."

    fan_out: str = ""
    "Train on sampled neighbourhoods: neighbours drawn per layer, input side first, as 5,5; empty: the whole graph."

    batch_nodes: int = 512
    "Nodes per optimiser step, with fan_out."

    select: Selection = "loss"
    "What validation decides by: its metric, as the papers' code, or its cross-entropy, which has no ties."

    def resolved(self, task: GraphTask) -> "TeacherConfig":
        """The same with every open field filled for this task; UsageError on a count below 1."""
        row = recipe(task.name, task.split, self.model)
        at_least_one(heads=self.heads, batch_nodes=self.batch_nodes)
        return replace(
            self,
            layers=row.layers if self.layers is None else self.layers,
            hidden=row.hidden if self.hidden is None else self.hidden,
            dropout=row.teacher_dropout if self.dropout is None else self.dropout,
            learning_rate=row.teacher_learning_rate if self.learning_rate is None else self.learning_rate,
            weight_decay=row.teacher_weight_decay if self.weight_decay is None else self.weight_decay,
        )

    def build(self, inputs: int, classes: int) -> nn.Module:
        """A new model of a resolved configuration."""
        return build_teacher(
            self.model, inputs, given(self.hidden), classes, given(self.layers), given(self.dropout), self.heads
        )

    def identity(self) -> dict[str, Any]:
        """The fields as plain values, for fingerprints."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained teacher with its weights of best validation.

    Attributes:
        metrics: valid, test (hidden nodes are judged with the full graph) and cpu_seconds; ind, tran, prod as set.
        fit: curves and epochs.
    """

    model: nn.Module
    config: TeacherConfig
    seed: int
    split_fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)
    fit: Fit | None = None

    @torch.no_grad()
    def logits(self, task: GraphTask) -> Float[Tensor, "nodes classes"]:
        """Logits of every node of a task, in eval mode; a teacher of samples answers in blocks of nodes."""
        if self.config.fan_out:
            return layerwise_logits(self.model, task)
        self.model.eval()
        prepared = self.model.prepare(task)  # type: ignore[operator]
        out: Tensor = self.model(task.x, prepared)
        return out


def train_teacher(task: GraphTask, config: TeacherConfig | None = None, seed: int | None = None) -> Teacher:
    """A teacher trained on what the task lets training see, with its test figure at best validation.

    Raises:
        UsageError: an unknown model, or a fan-out that does not fit its layers.
        DataError: training diverged.
    """
    config = (config or TeacherConfig()).resolved(task)
    seed = task.seed if seed is None else seed
    seen = task.observed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = config.build(seen.num_features, seen.classes)
    if config.fan_out:
        fan_outs = parsed_fan_outs(config.fan_out, given(config.layers))
        part = SampledTraining(model, seen, fan_outs, config.batch_nodes, seed)
        result = fit(model, part.loss_of(), part.validate(), _fit_config(config), seed, steps=part.steps)
    else:
        result = fit(model, *_whole_graph(model, seen), _fit_config(config), seed)
    teacher = Teacher(model, config, seed, task.split_fingerprint, fit=result)
    metrics = {"valid": result.valid, **report(task, teacher.logits(task)), "cpu_seconds": result.cpu_seconds}
    return replace(teacher, metrics=metrics)


def _whole_graph(
    model: nn.Module, seen: GraphTask
) -> tuple[Callable[[int], Tensor], Callable[[], tuple[float, float]]]:
    """Loss and validation from full neighbourhoods; rows out of reach of the nodes in question are left out."""
    whole = cache(lambda: model.prepare(seen))  # type: ignore[operator]
    trained = restricted(model, seen, torch.nonzero(seen.train).flatten(), whole)
    judged = restricted(model, seen, torch.nonzero(seen.valid).flatten(), whole)
    labels = seen.y[seen.train]
    return lambda _: cross_entropy(trained(), labels), validation(seen, judged)


def teacher_spec(task: GraphTask, config: TeacherConfig, seed: int) -> scores.TeacherSpec:
    """What identifies a teacher's scores: model, hyper-parameters, seed, and the split that it learnt from."""
    extra = {
        "config": config.resolved(task).identity(),
        "seed": seed,
        "split": task.split_fingerprint,
        "graph": task.observed.fingerprint,
        "setting": task.setting,
    }
    return scores.TeacherSpec(model=f"graph:{config.model}", kind="rows", extra=extra)


def score_nodes(teacher: Teacher, task: GraphTask, store: str | Path) -> scores.NodeScores:
    """The teacher's logits of every observed node, in a score cache; an existing cache of this teacher is read back.

    One that an interruption left half written is completed.

    Raises:
        TeacherMismatchError: `store` belongs to another teacher, or the teacher learnt from another split.
    """
    check_split(teacher, task)
    spec = teacher_spec(task, teacher.config, teacher.seed)
    if Path(store).exists() and any(Path(store).iterdir()):
        with contextlib.suppress(MissingScoreError):
            return read_scores(store, task, spec)
    logits = teacher.logits(task.observed).numpy()
    return scores.write_nodes(store, spec, logits, task.observed.fingerprint)


def read_scores(store: str | Path, task: GraphTask, spec: scores.TeacherSpec | None = None) -> scores.NodeScores:
    """Node scores of a cache folder or of an npz, safetensors or parquet file, refused when they are of another graph,
    node order or teacher.

    Raises:
        TeacherMismatchError: another teacher than `spec`.
        DataError: another graph, pairs instead of nodes, or a wrong number of nodes or classes.
    """
    found = open_scores(store, spec)
    check_scores(found, task)
    return found


def open_scores(store: str | Path, spec: scores.TeacherSpec | None = None) -> scores.NodeScores:
    """Node scores of a cache folder or of a file, of any graph; DataError when they are of pairs."""
    if Path(store).suffix in (".npz", ".safetensors", ".parquet"):
        table = read_node_file(store)
        for line in table.notes:
            note(line)
        nodes, classes = table.logits.shape
        found = scores.TeacherSpec(
            f"file:{Path(store).name}", "rows", extra={"logits": fingerprint_arrays(x=table.logits)}
        )
        return scores.NodeScores(
            Path(store), Header(found, table.graph_fingerprint, nodes, classes), None, [table.logits]
        )
    if Path(store).is_file():
        raise UsageError(f"{store}: expected a folder of teacher scores, or a .npz, .safetensors or .parquet file.")
    opened = scores.open(store, expect=spec)
    if not isinstance(opened, scores.NodeScores):
        raise DataError(f"{store}: holds scores of pairs; expected node logits, as `structkd graph score` writes.")
    return opened


def check_split(teacher: Teacher, task: GraphTask) -> None:
    """TeacherMismatchError unless the teacher learnt from this task's training and validation nodes."""
    if teacher.split_fingerprint != task.split_fingerprint:
        raise TeacherMismatchError(
            "the teacher given", {"split": (teacher.split_fingerprint[:12], task.split_fingerprint[:12])}
        )


def check_scores(found: scores.NodeScores, task: GraphTask) -> None:
    """DataError unless the logits are of exactly this graph as training sees it."""
    seen = task.observed
    shape = tuple(np.shape(found.logits))
    if shape != (seen.num_nodes, seen.classes):
        raise DataError(
            f"cached logits have shape {shape}; {task.name} ({task.setting}) has {seen.num_nodes} observed nodes and "
            f"{seen.classes} classes. Score this graph again."
        )
    if found.graph_fingerprint and found.graph_fingerprint != seen.fingerprint:
        raise DataError(
            f"cached logits are of graph {found.graph_fingerprint[:12]}, this one is {seen.fingerprint[:12]}: other "
            "edges, features or node order. Score this graph again."
        )


def _fit_config(config: TeacherConfig) -> FitConfig:
    return FitConfig(
        given(config.learning_rate), given(config.weight_decay), config.epochs, config.patience, config.select
    )
