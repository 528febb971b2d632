"""Saved teachers and students: a folder with model.json and weights.npz, read without running any code of it."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from structkd.errors import CorruptFileError, DataError
from structkd.files import atomic_path, read_json, write_json
from structkd.graph.data.inputs import RAW, Inputs
from structkd.graph.data.task import GraphTask
from structkd.graph.distillation import DistillConfig, config_fields, predict
from structkd.graph.evaluate import report
from structkd.graph.methods.influence import Propagated
from structkd.graph.methods.positions import Positioned
from structkd.graph.models.students import build, describe
from structkd.graph.models.teacher import Teacher, TeacherConfig

_DESCRIPTION, _WEIGHTS = "model.json", "weights.npz"
_INPUTS = "inputs/"
_NONE: Mapping[str, torch.Tensor] = {}


def save_teacher(teacher: Teacher, folder: str | Path) -> None:
    """Write a teacher with what is needed to judge whether it fits a task."""
    _save(Path(folder), teacher.model, {
        "kind": "teacher", "config": teacher.config.identity(), "seed": teacher.seed,
        "split_fingerprint": teacher.split_fingerprint, "metrics": teacher.metrics,
    })  # fmt: skip


def load_teacher(folder: str | Path, task: GraphTask) -> Teacher:
    """A saved teacher for a task.

    Raises:
        DataError: no teacher there, or one of other feature or class counts.
    """
    value, weights = _load(Path(folder), "teacher")
    config = TeacherConfig(**value["config"])
    model = config.build(task.num_features, task.classes)
    _fill(model, weights, folder, f"{task.name} ({task.num_features} features, {task.classes} classes)")
    return Teacher(model, config, value["seed"], value["split_fingerprint"], value["metrics"])


def save_student(student: nn.Module, config: DistillConfig, folder: str | Path, inputs: Inputs = RAW) -> None:
    """Write a student, and what it reads of a task.

    Raises:
        DataError: a module of a kind that could not be read back.
    """
    value = {"kind": "student", "config": config_fields(config), **describe(student)}
    extra = {f"{_INPUTS}{name}": array for name, array in inputs.arrays().items()}
    _save(Path(folder), student, value | {"inputs": inputs.kind, "inputs_fields": inputs.fields()}, extra)


def load_student(folder: str | Path) -> nn.Module:
    """A saved student; DataError when the folder holds none."""
    return load_student_and_inputs(folder)[0]


def load_student_and_inputs(folder: str | Path) -> tuple[nn.Module, Inputs]:
    """A saved student and what it reads of a task; DataError when the folder holds none."""
    value, arrays = _load(Path(folder), "student")
    student = build(value)
    weights = {name: array for name, array in arrays.items() if not name.startswith(_INPUTS)}
    extra = {name.removeprefix(_INPUTS): array for name, array in arrays.items() if name.startswith(_INPUTS)}
    _fill(student, weights, folder, f"its own description {value['widths']}")
    return student.eval(), _inputs(value.get("inputs", RAW.kind), value.get("inputs_fields", {}), extra)


def evaluate_saved(folder: str | Path, task: GraphTask) -> dict[str, float]:
    """Test figures of a saved model (its weights are those of best validation).

    Raises:
        DataError: no model there, or it does not fit the task.
    """
    value = _description(Path(folder))
    if value.get("kind") == "teacher":
        return report(task, load_teacher(folder, task).logits(task))
    student, inputs = load_student_and_inputs(folder)
    x = inputs.whole(task)
    found = value["widths"][0], value["widths"][-1]
    if found != (x.shape[1], task.classes):
        raise DataError(
            f"{folder}: a student of {found[0]} features and {found[1]} classes; {task.name} has "
            f"{x.shape[1]} and {task.classes}. Was it distilled on another dataset?"
        )
    return report(task, predict(student, x))


def _save(folder: Path, model: nn.Module, value: dict[str, Any], extra: Mapping[str, torch.Tensor] = _NONE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {**model.state_dict(), **extra}
    with atomic_path(folder / _WEIGHTS) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **{name: array.numpy() for name, array in arrays.items()})
    write_json(folder / _DESCRIPTION, value)


def _description(folder: Path) -> dict[str, Any]:
    if not (folder / _DESCRIPTION).is_file():
        raise DataError(
            f"{folder}: no {_DESCRIPTION} there; expected a folder that `structkd graph teach` or `distill` wrote."
        )
    found: dict[str, Any] = read_json(folder / _DESCRIPTION)
    return found


def _load(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    value = _description(folder)
    if value.get("kind") != kind:
        raise DataError(f"{folder}: holds a {value.get('kind')}; expected a {kind}.")
    try:
        with open(folder / _WEIGHTS, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return value, {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CorruptFileError(f"{folder / _WEIGHTS}: not whole weights ({error}). Train the model again.") from None


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], folder: str | Path, expected: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"{folder}: the weights do not fit {expected}. Was it trained on another dataset?") from None


def _inputs(kind: str, fields: Mapping[str, Any], arrays: Mapping[str, torch.Tensor]) -> Inputs:
    """Inputs of a saved student; DataError when there is no such kind."""
    known: dict[str, Callable[[], Inputs]] = {
        RAW.kind: lambda: RAW,
        Propagated.kind: lambda: Propagated(fields["hops"]),
        Positioned.kind: lambda: Positioned(arrays["table"]),
    }
    if kind not in known:
        raise DataError(
            f"a saved student that reads {kind!r} inputs; expected {', '.join(known)}. Is it of a newer release?"
        )
    return known[kind]()
