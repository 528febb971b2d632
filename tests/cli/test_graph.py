"""Every graph command on a tiny graph, through the command line: JSON keys, files, errors."""

import json
from pathlib import Path

import pytest

from structkd.cli.app import run

DATA = ["--dataset", "sbm:nodes=300,classes=3,signal=0.7"]
MLP = ["distill", "--dataset", "sbm:", "--method", "mlp", "--out", "x"]
SHORT = ["--epochs", "10", "--hidden", "16"]


def call(capsys: pytest.CaptureFixture[str], *tokens: str) -> dict:
    assert run(["graph", *tokens, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_teach_score_distill_evaluate_latency_spectrum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, store, student = (str(tmp_path / name) for name in ("teacher", "store", "student"))
    taught = call(capsys, "teach", *DATA, *SHORT, "--model", "sage", "--out", teacher)
    assert taught["teacher"] == "sage"
    scored = call(capsys, "score", *DATA, "--teacher", teacher, "--out", store)
    assert (scored["nodes"], scored["classes"]) == (300, 3)
    done = call(capsys, "distill", *DATA, *SHORT, "--scores", store, "--method", "glnn", "--out", student)
    assert (done["method"], done["input_class"]) == ("glnn", "graph_free")
    judged = call(capsys, "evaluate", *DATA, "--model", student)
    assert judged["test"] == done["metrics"]["test"]
    timed = call(capsys, "latency", *DATA, "--teacher", teacher, "--student", student, "--batches", "1,4")
    assert {"rows", "speedup"} == set(timed)
    assert {"model", "batch", "p50_ms", "p99_ms", "nodes_per_second"} <= set(timed["rows"][0])
    bands = call(capsys, "spectrum", *DATA, "--scores", store, "--methods", "lfd", "--out", str(tmp_path / "bands"))
    assert list(bands["curves"]) == ["lfd"]
    assert (tmp_path / "bands" / "figures" / "band-agreement.json").is_file()


def test_the_same_line_again_draws_one_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, flags in (("teach", ["--model", "gcn"]), ("distill", ["--method", "mlp"])):
        folder = tmp_path / command
        for _ in range(2):
            call(capsys, command, *DATA, *SHORT, *flags, "--out", str(folder))
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


def test_bench_prints_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", *DATA, "--methods", "mlp,glnn", "--seeds", "2", "--seed", "3", "--out", str(tmp_path)]
    found = call(capsys, *line)
    assert {"dataset", "split", "setting", "seeds", "rows"} <= set(found)
    assert found["seeds"] == [3, 4]
    assert [row["method"] for row in found["rows"]] == ["mlp", "glnn"]
    assert call(capsys, *line)["asked"] == 0


@pytest.mark.parametrize(
    ("tokens", "status", "message"),
    [
        (["bench", "--dataset", "digits", "--methods", "magic"], 2, "method 'magic': expected some of mlp"),
        (["bench", "--dataset", "digits", "--teacher", "gin"], 2, "teacher 'gin': expected one of gcn"),
        (["bench", "--dataset", "digits", "--seeds", "0"], 2, "--seeds 0: expected 1 or more"),
        (["bench", "--dataset", "npz:none.npz"], 1, "none.npz: no such file"),
        (
            ["bench", "--dataset", "sbm:", "--teacher", "scores:there.pt"],
            2,
            "expected a folder of teacher scores, or a .npz",
        ),
        (["evaluate", "--dataset", "sbm:", "--model", "none"], 1, "none: no model.json there; expected a folder that"),
        ([*MLP, "--epochs", "0"], 2, "epochs 0: expected 1 or more"),
        ([*MLP, "--patience", "0"], 2, "patience 0: expected 1 or more"),
        ([*MLP, "--hidden", "0"], 2, "hidden 0: expected 1 or more of both"),
        ([*MLP, "--dropout", "1.5"], 2, "dropout 1.5: expected a share from 0 to below 1"),
        ([*MLP, "--learning-rate", "-1"], 2, "learning rate -1.0: expected a number above 0"),
        ([*MLP, "--weight-decay", "-1"], 2, "weight decay -1.0: expected 0 or a number above it"),
        ([*MLP, "--label-weight", "7"], 2, "label weight 7.0: expected a share from 0 to 1"),
        (
            ["teach", "--dataset", "sbm:", "--model", "gat", "--heads", "0", "--out", "x"],
            2,
            "heads 0: expected 1 or more",
        ),
        (
            ["teach", "--dataset", "sbm:", "--fan-out", "5,5", "--batch-nodes", "0", "--out", "x"],
            2,
            "batch nodes 0: exp",
        ),
        (["distill", "--dataset", "digits", "--out", "x"], 2, "--method ff-g2m needs --scores DIR"),
    ],
)
def test_errors(
    tokens: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "there.pt").write_bytes(b"")
    assert run(["graph", *tokens]) == status
    assert message in capsys.readouterr().err
