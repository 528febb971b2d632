"""Exported students, calibration and the fallback list, against torch, scikit-learn-like loops and onnxruntime."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import graph
from structkd.cli.app import run
from structkd.errors import DataError, MissingExtraError, UsageError
from structkd.graph.distillation import predict
from structkd.graph.models.students import Ensemble
from structkd.graph.serving import export as exporting
from structkd.graph.serving.calibration import best_temperature, calibration_error, fallback
from structkd.graph.serving.export import export

DATASET = "sbm:nodes=400,classes=3,degree=6,signal=0.7"


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load(DATASET)


@pytest.fixture(scope="module")
def student(task) -> torch.nn.Module:
    config = graph.DistillConfig("mlp", hidden=48, layers=3, epochs=30)
    return graph.distill(task, None, config).student


def test_numpy_answers_alone(task, student, tmp_path):
    """The two files work in a Python that cannot import torch or this package."""
    (row,) = export(student, task.x, tmp_path, ("numpy",), temperature=1.7)
    assert row["file"] == "student.npz"
    assert row["bytes"] == (tmp_path / "student.npz").stat().st_size
    np.save(tmp_path / "x.npy", task.x.numpy())
    code = (
        "import sys; sys.modules['torch'] = sys.modules['structkd'] = None; sys.path.insert(0, sys.argv[1]);"
        "import numpy, predict; layers, t = predict.load(); x = numpy.load(sys.argv[1] + '/x.npy');"
        "numpy.save(sys.argv[1] + '/z.npy', predict.logits(x, layers));"
        "numpy.save(sys.argv[1] + '/p.npy', predict.probabilities(x, layers, t))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    expected = predict(student, task.x)
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), (expected / 1.7).softmax(dim=1).numpy(), atol=1e-5)
    printed = subprocess.run(
        [sys.executable, str(tmp_path / "predict.py"), str(tmp_path / "x.npy")], capture_output=True, check=True
    ).stdout.split()
    assert [int(answer) for answer in printed] == expected.argmax(dim=1).tolist()


def test_onnx_takes_batches_of_any_length(task, student, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    rows = export(student, task.x, tmp_path, ("onnx", "int8"))
    assert [row["file"] for row in rows] == ["student.onnx", "student.int8.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.int8.onnx", "student.onnx"]
    expected = predict(student, task.x).numpy()
    for row, tolerance in zip(rows, (1e-5, 0.05 * np.abs(expected).max()), strict=True):
        session = onnxruntime.InferenceSession(str(tmp_path / row["file"]), providers=["CPUExecutionProvider"])
        found = [session.run(None, {"features": task.x.numpy()[:size]})[0] for size in (1, 7, 400)]
        for part in found[:1] + found[2:]:
            np.testing.assert_allclose(part, expected[: len(part)], atol=tolerance)
        assert row["max_abs_error"] == pytest.approx(float(np.abs(found[2] - expected).max()), abs=1e-6)
        same = found[2].argmax(axis=1) == expected.argmax(axis=1)
        assert row["argmax_agreement"] == pytest.approx(same.mean())
    assert rows[0]["argmax_agreement"] == 1.0
    assert rows[1]["argmax_agreement"] > 0.97


def test_eight_bits_take_a_quarter(tmp_path):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    task = graph.load("sbm:nodes=300,features=256,signal=0.5")
    student = graph.distill(task, None, graph.DistillConfig("mlp", hidden=256, layers=3, epochs=20)).student
    wide, narrow = export(student, task.x, tmp_path, ("onnx", "int8"))
    assert narrow["bytes"] < 0.3 * wide["bytes"]


@pytest.mark.parametrize("name", ["numpy", "onnx", "int8"])
def test_an_export_that_answers_differently_fails_and_leaves_no_file(task, student, tmp_path, monkeypatch, name):
    if name != "numpy":
        pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    writer = exporting.WRITERS[name]

    def broken(folder, layers, temperature):
        path, answer = writer(folder, layers, temperature)
        return path, lambda rows: -answer(rows)

    monkeypatch.setitem(exporting.WRITERS, name, broken)
    with pytest.raises(DataError, match=r"rows get the student's answer, expected 9\d\.\d% or more"):
        export(student, task.x, tmp_path, (name,))
    assert not list(tmp_path.glob("student*"))
    if name != "int8":
        monkeypatch.setitem(exporting.WRITERS, name, lambda *a: (lambda p, f: (p, lambda r: f(r) * 1.1))(*writer(*a)))
        with pytest.raises(DataError, match=r"logits differ from the student's by up to"):
            export(student, task.x, tmp_path, (name,))


def test_wrong_exports_say_so(task, student, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="formats 'tflite': expected some of numpy, onnx, int8"):
        export(student, task.x, tmp_path, ("tflite",))
    with pytest.raises(UsageError, match="a student of type Ensemble has no export yet; expected a plain MLP"):
        export(Ensemble([student]), task.x, tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)  # as where the extra is missing, whether or not it is here
    with pytest.raises(
        MissingExtraError, match=r"needs onnx, which is not installed. Run: pip install 'structkd\[onnx"
    ):
        export(student, task.x, tmp_path, ("onnx",))
    assert export(student, task.x, tmp_path, ("numpy",))[0]["argmax_agreement"] == 1.0


def test_temperature_undoes_a_known_scale():
    """Labels drawn from softmax(z): the best temperature of 3 z is 3."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40000, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    assert best_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    losses = torch.stack([torch.nn.functional.cross_entropy(logits[:500] / t, labels[:500]) for t in grid])
    assert best_temperature(logits[:500], labels[:500]) == pytest.approx(float(grid[losses.argmin()]), rel=0.005)
    assert calibration_error(3 * logits, labels, 3.0) < 0.02 < 0.1 < calibration_error(3 * logits, labels)
    with pytest.raises(DataError, match="calibration needs validation nodes"):
        best_temperature(logits[:0], labels[:0])
    with pytest.raises(DataError, match="calibration error of no node"):
        calibration_error(logits[:0], labels[:0])


def test_calibration_error_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 3, generator=generator)
    labels = torch.randint(3, (300,), generator=generator)
    probabilities = (logits.double() / 1.3).softmax(dim=1).tolist()
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities, labels.tolist(), strict=True):
        confidence = max(row)
        number = next(b for b in range(15) if b / 15 < confidence <= (b + 1) / 15)
        bins.setdefault(number, []).append((confidence, row.index(confidence) == label))
    expected = sum(
        len(rows) / 300 * abs(sum(r for _, r in rows) / len(rows) - sum(c for c, _ in rows) / len(rows))
        for rows in bins.values()
    )
    assert calibration_error(logits, labels, 1.3) == pytest.approx(expected, abs=1e-12)


def test_the_least_confident_nodes_go_to_the_teacher():
    logits = torch.tensor([[3.0, 0], [0.1, 0], [0, 2.0], [0, 0.2]])
    labels, valid = torch.tensor([0, 1, 1, 0]), torch.tensor([True, True, False, True])
    teacher = torch.tensor([[0.0, 1], [0, 1], [0, 1], [1, 0]])
    found = fallback(logits, labels, valid, 2.0, share=0.5, teacher=teacher)
    assert found.rows.tolist() == [1, 3]
    assert (found.share, found.threshold) == (0.5, pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-6))
    assert found.metrics == pytest.approx({"share_valid": 2 / 3, "student": 1 / 3, "teacher": 2 / 3, "mix": 1.0})
    again = fallback(logits, labels, valid, 2.0, threshold=found.threshold)
    assert again.rows.tolist() == [1, 3]
    assert "mix" not in again.metrics
    assert len(fallback(logits, labels, valid, 2.0, share=1.0).rows) == 4
    with pytest.raises(UsageError, match="give either a share of nodes or a confidence threshold"):
        fallback(logits, labels, valid, 2.0)
    with pytest.raises(UsageError, match=r"fallback 1.5: expected a number from 0 to 1"):
        fallback(logits, labels, valid, 2.0, share=1.5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = ["--dataset", "sbm:nodes=300,classes=3,signal=0.7"]
    short = ["--epochs", "20", "--hidden", "16"]
    teacher, store, student, out = (str(tmp_path / name) for name in ("teacher", "store", "student", "out"))
    line = ["graph", "teach", *data, *short, "--model", "sage", "--fan-out", "4,4", "--batch-nodes", "20"]
    assert run([*line, "--out", teacher]) == 0
    assert run(["graph", "score", *data, "--teacher", teacher, "--out", store]) == 0
    line = ["graph", "distill", *data, *short, "--scores", store, "--batch-nodes", "100", "--batch-edges", "50"]
    assert run([*line, "--out", student]) == 0
    capsys.readouterr()
    line = ["graph", "export", *data, "--student", student, "--formats", "numpy", "--scores", store, "--out", out]
    assert run([*line, "--fallback-share", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"out", "rows", "calibration", "fallback"}
    assert found["rows"][0]["argmax_agreement"] == 1.0
    assert found["calibration"]["temperature"] > 0
    listed = [int(row) for row in (tmp_path / "out" / "fallback.txt").read_text().split()]
    assert len(listed) == len(set(listed)) == found["fallback"]["nodes"] == 30
    assert set(found["fallback"]["valid"]) == {"share_valid", "student", "teacher", "mix"}
    assert run([*line, "--fallback-share", "0.1", "--fallback-threshold", "0.5"]) == 2
    assert "exclude each other; give one" in capsys.readouterr().err
    line = ["graph", "latency", *data, "--teacher", teacher, "--student", student, "--repeats", "3", "--json"]
    assert run([*line, "--fan-out", "2,2"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert {"cold_p50_ms", "cold_p99_ms", "first_ms"} <= set(timed["rows"][0])
    assert run([*line, "--fan-out", "2"]) == 2
    assert "fan-out '2': 1 numbers for a teacher of 2 layers" in capsys.readouterr().err
