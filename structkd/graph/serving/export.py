"""Students for serving: ONNX, eight-bit ONNX, and plain numpy; each must answer as the trained student, or it fails."""

import importlib.util
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from structkd import __version__
from structkd.errors import DataError, MissingExtraError, UsageError
from structkd.files import atomic_path, write_text
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features
from structkd.graph.distillation import predict
from structkd.graph.models.networks import Mlp

Array = Float[np.ndarray, "..."]

FORMATS = ("numpy", "onnx", "int8")

EXACT_ERROR, EXACT_AGREEMENT = 1e-4, 0.999
"Float formats: largest error relative to the largest logit, and share of equal answers, that still count as parity."

EIGHT_BIT_AGREEMENT = 0.97
"Eight bits: share of equal answers that still counts as parity."

PREDICT = '''"""Answers of an exported student, with numpy alone: python predict.py features.npy > classes.txt"""

import sys
from pathlib import Path

import numpy as np


def load(path=Path(__file__).with_name("student.npz")):
    """(weight, bias) of each layer, and the calibrated temperature."""
    with np.load(path, allow_pickle=False) as file:
        return [(file[f"weight{k}"], file[f"bias{k}"]) for k in range(int(file["layers"]))], float(file["temperature"])


def logits(x, layers):
    """[rows, features] -> [rows, classes]."""
    x = np.asarray(x, dtype=np.float32)
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight + bias, 0)
    weight, bias = layers[-1]
    return x @ weight + bias


def probabilities(x, layers, temperature=1.0):
    """Calibrated class probabilities."""
    scores = logits(x, layers) / temperature
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    for answer in logits(np.load(sys.argv[1], allow_pickle=False), load()[0]).argmax(axis=1):
        print(answer)
'''


def export(
    student: nn.Module, x: Features, folder: str | Path, formats: Sequence[str] = FORMATS, temperature: float = 1.0
) -> list[dict[str, Any]]:
    """Write a student in each format and compare it with torch on the rows of x; one row of figures per format.

    numpy: student.npz and predict.py. onnx: student.onnx, input `features` [nodes, features] of any length, output
    `logits`. int8: student.int8.onnx, weights of eight bits, activations quantised as they come (onnxruntime).

    Returns:
        format, file, bytes, max_abs_error, argmax_agreement.

    Raises:
        UsageError: an unknown format, or a student that is no plain MLP.
        MissingExtraError: onnx or onnxruntime is not installed.
        DataError: an export answers differently from the student; its file is not kept.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"formats {','.join(formats)!r}: expected some of {', '.join(FORMATS)}.")
    if type(student) is not Mlp:
        raise UsageError(f"a student of type {type(student).__name__} has no export yet; expected a plain MLP.")
    if {"onnx", "int8"} & set(formats):
        _require_onnx()
    maps: list[Any] = list(student.layers)
    layers = [(_array(layer.weight), _array(layer.bias)) for layer in maps]
    wanted = predict(student, x).numpy()
    rows = (x.dense() if isinstance(x, SparseMatrix) else x).numpy()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in formats:
        path, answer = WRITERS[name](folder, layers, temperature)
        figures = {"format": name, "file": path.name, "bytes": path.stat().st_size, **parity(answer(rows), wanted)}
        problem = _problem(figures, wanted)
        if problem:
            path.unlink()
            raise DataError(f"{path.name}: {problem} Export without {name}, and report a student that shows it.")
        found.append(figures)
    return found


def parity(found: Array, wanted: Array) -> dict[str, float]:
    """Largest absolute difference of logits, and share of rows with the same largest logit."""
    same = found.argmax(axis=1) == wanted.argmax(axis=1)
    return {"max_abs_error": float(np.abs(found - wanted).max()), "argmax_agreement": float(same.mean())}


def _problem(figures: dict[str, Any], wanted: Array) -> str:
    agreement, error = figures["argmax_agreement"], figures["max_abs_error"]
    exact = figures["format"] != "int8"
    least = EXACT_AGREEMENT if exact else EIGHT_BIT_AGREEMENT
    most = EXACT_ERROR * max(1.0, float(np.abs(wanted).max()))
    if agreement < least:
        return f"{agreement:.2%} of {len(wanted)} rows get the student's answer, expected {least:.1%} or more."
    if exact and not error <= most:
        return f"logits differ from the student's by up to {error:.2g}, expected {most:.2g} or less."
    return ""


def _write_numpy(folder: Path, layers: Any, temperature: float) -> tuple[Path, Callable[[Array], Array]]:
    path = folder / "student.npz"
    arrays = {f"{kind}{k}": part for k, pair in enumerate(layers) for kind, part in zip(("weight", "bias"), pair)}  # noqa: B905
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, layers=np.int64(len(layers)), temperature=np.float64(temperature), **arrays)
    write_text(folder / "predict.py", PREDICT)
    specification = importlib.util.spec_from_file_location("predict", folder / "predict.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    read, _ = module.load(path)
    return path, lambda rows: np.asarray(module.logits(rows, read))


def _write_onnx(folder: Path, layers: Any, temperature: float) -> tuple[Path, Callable[[Array], Array]]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    name, nodes, constants = "features", [], []
    for k, (weight, bias) in enumerate(layers):
        constants += [numpy_helper.from_array(weight, f"weight{k}"), numpy_helper.from_array(bias, f"bias{k}")]
        last = k == len(layers) - 1
        nodes.append(helper.make_node("MatMul", [name, f"weight{k}"], [f"product{k}"]))
        nodes.append(helper.make_node("Add", [f"product{k}", f"bias{k}"], ["logits" if last else f"sum{k}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"sum{k}"], [f"hidden{k}"]))
            name = f"hidden{k}"
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["nodes", width])
        for end, width in (("features", layers[0][0].shape[0]), ("logits", layers[-1][0].shape[1]))
    ]
    graph = helper.make_graph(nodes, "student", ends[:1], ends[1:], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="structkd",
        producer_version=__version__,
    )  # fmt: skip
    helper.set_model_props(model, {"temperature": repr(temperature)})
    onnx.checker.check_model(model)
    path = folder / "student.onnx"
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return path, _session(path)


def _write_eight_bit(folder: Path, layers: Any, temperature: float) -> tuple[Path, Callable[[Array], Array]]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, work = folder / "student.int8.onnx", folder / ".tmp-int8"
    work.mkdir(exist_ok=True)
    logging.disable(logging.WARNING)  # advice on convolutions, which a student has none of
    try:
        wide, _ = _write_onnx(work, layers, temperature)
        with atomic_path(path) as temporary:
            # seven bits of the eight: processors without VNNI saturate sums of two full products
            quantize_dynamic(wide, temporary, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(work)
    return path, _session(path)


WRITERS: dict[str, Callable[[Path, Any, float], tuple[Path, Callable[[Array], Array]]]] = {
    "numpy": _write_numpy,
    "onnx": _write_onnx,
    "int8": _write_eight_bit,
}
"Format -> writes it and hands back its answers."


def _session(path: Path) -> Callable[[Array], Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda rows: np.asarray(session.run(["logits"], {"features": rows})[0])


def _require_onnx() -> None:
    for package in ("onnx", "onnxruntime"):
        try:
            present = importlib.util.find_spec(package) is not None
        except ValueError:  # a package that is blocked
            present = False
        if not present:
            raise MissingExtraError(package, "onnx", "graph export --formats onnx,int8")


def _array(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
