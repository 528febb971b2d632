"""`structkd scores`: the lines of the contract, their JSON keys and exit status."""

import json
from pathlib import Path

import numpy as np
import pytest

from structkd import scores
from structkd.cli.app import run
from structkd.scores import TeacherSpec

RUN = "q1 Q0 d1 1 9.5 t\nq1 Q0 d2 2 3.0 t\nq1 Q0 d3 3 -1.25 t\nq2 Q0 d1 1 0.5 t\nq2 Q0 d3 2 0.25 t\n"


def called(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, dict]:
    status = run([str(argument) for argument in ("scores", *arguments, "--json")])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


def test_from_a_run_to_a_published_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "teacher.run").write_text(RUN)
    store, out = tmp_path / "s", tmp_path / "p"
    status, found = called(capsys, "import", tmp_path / "teacher.run", "--format", "trec-run", "--out", store)
    assert (status, found["rows"], found["format"]) == (0, 5, "trec-run")
    status, shown = called(capsys, "show", store)
    assert status == 0
    assert {"kind", "teacher", "fingerprint", "rows", "queries", "bytes", "bytes_per_row", "stats"} <= shown.keys()
    assert shown["teacher"]["model"] == "teacher.run"
    assert (shown["kind"], shown["rows"], shown["queries"]) == ("pairs", 5, 2)
    assert shown["bytes_per_row"] == shown["bytes"] / 5
    assert shown["stats"]["max"] == 9.5
    status, _ = called(capsys, "export", store, "--format", "margin-tsv-ids", "--out", tmp_path / "m.tsv")
    assert status == 0
    assert (tmp_path / "m.tsv").read_text().splitlines()[0] == "9.5\t3.0\tq1\td1\td2"
    status, found = called(capsys, "publish", store, "--out", out, "--license", "CC-BY-4.0")
    assert (status, found["rows"], found["files"]) == (0, 5, 5)
    status, found = called(capsys, "verify", out)
    assert (status, found) == (0, {"ok": True, "files": 5, "problems": []})
    path = out / "data" / "scores-00000.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    status, found = called(capsys, "verify", out)
    assert status == 1
    assert found["problems"] == [
        {"path": "data/scores-00000.parquet", "problem": "its bytes differ from the manifest's checksum"}
    ]
    status, found = called(capsys, "compact", store, "--dtype", "float32")
    assert (status, found["dtype"], found["rows"]) == (0, "float32", 5)


def test_import_with_a_collection_keys_by_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    texts = [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in (1, 2, 3)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in (1, 2)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    (tmp_path / "r").write_text(RUN)
    status, _ = called(
        capsys, "import", tmp_path / "r", "--out", tmp_path / "s", "--collection", folder, "--teacher-name", "mine"
    )
    assert status == 0
    store = scores.open(tmp_path / "s", expect=TeacherSpec("mine"))
    assert None not in store.documents.hashes
    for format in ("tevatron", "flagembedding", "margin-tsv-text"):
        line = ("export", tmp_path / "s", "--format", format, "--out", tmp_path / format, "--collection", folder)
        assert called(capsys, *line)[0] == 0
    assert json.loads((tmp_path / "tevatron").read_text().splitlines()[0])["positive_passages"][0]["text"] == "text 1"
    (tmp_path / "r").write_text("q1 Q0 unknown 1 2.0 t\n")
    assert (
        run(["scores", "import", str(tmp_path / "r"), "--out", str(tmp_path / "x"), "--collection", str(folder)]) == 1
    )
    assert "1 of 1 ids are unknown, for example 'unknown'" in capsys.readouterr().err


def pair_store(folder: Path, model: str, lists: dict[str, dict[str, float]]) -> Path:
    flat = [(q, d, s) for q, found in lists.items() for d, s in found.items()]
    queries, documents, values = zip(*flat, strict=True)
    scores.write_pairs(folder, TeacherSpec(model), list(queries), list(documents), np.array(values))
    return folder


A = {"q": {"a": 1.0, "b": 2.0, "c": 6.0}}
B = {"q": {"a": 3.0, "b": 4.0, "c": 0.0}}
C = {"q": {"a": 8.0, "b": 0.0, "c": 0.5}}


def standard(values: dict[str, float]) -> dict[str, float]:
    mean, deviation = np.mean(list(values.values())), np.std(list(values.values()))
    return {name: (value - mean) / deviation for name, value in values.items()}


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--method", "mean"], {"a": 4.0, "b": 2.0, "c": 6.5 / 3}),
        (["--method", "median"], {"a": 3.0, "b": 2.0, "c": 0.5}),
        (["--method", "weighted", "--weights", "1,0,3"], {"a": 6.25, "b": 0.5, "c": 1.875}),
        (
            ["--method", "rrf"],
            {"a": 1 / 63 + 1 / 62 + 1 / 61, "b": 1 / 62 + 1 / 61 + 1 / 63, "c": 1 / 61 + 1 / 63 + 1 / 62},
        ),
        (
            ["--method", "standardised"],
            {name: float(np.mean([standard(x["q"])[name] for x in (A, B, C)])) for name in "abc"},
        ),
    ],
)
def test_ensembles(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], want: dict) -> None:
    stores = [pair_store(tmp_path / name, name, lists) for name, lists in (("a", A), ("b", B), ("c", C))]
    status, found = called(capsys, "ensemble", *stores, "--out", tmp_path / "out", *arguments)
    assert (status, found["rows"]) == (0, 3)
    store = scores.open(tmp_path / "out")
    got = store.lookup(["q"] * 3, ["a", "b", "c"])
    np.testing.assert_allclose(got, [want[name] for name in "abc"], rtol=2e-3)
    assert store.spec.model == "a+b+c"
    assert store.spec.extra["teachers"] == [TeacherSpec(name).fingerprint for name in "abc"]


def test_ensembles_never_average_over_fewer_teachers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = pair_store(tmp_path / "a", "a", A)
    two = pair_store(tmp_path / "b", "b", {"q": {"a": 3.0, "x": 1.0}, "r": {"a": 1.0}})
    line = ["scores", "ensemble", str(one), str(two), "--out", str(tmp_path / "out")]
    assert run(line) == 1
    assert "1 missing, for example r" in capsys.readouterr().err
    assert run([*line, "--missing", "union"]) == 2
    assert "average over fewer teachers" in capsys.readouterr().err
    assert run([*line, "--missing", "common"]) == 0
    assert scores.open(tmp_path / "out").pairs()[1] == ["a"]
    capsys.readouterr()
    union = tmp_path / "union"
    assert run([*line[:-1], str(union), "--missing", "union", "--method", "rrf"]) == 0
    store = scores.open(union)
    assert len(store) == 5
    assert store.lookup(["q"], ["x"]) == pytest.approx(1 / 62, rel=1e-3)
    capsys.readouterr()
    for extra, message in (
        (["--method", "weighted"], "--weights belongs to"),
        (["--method", "weighted", "--weights", "1"], "1 weights for 2 stores"),
        (["--method", "weighted", "--weights", "x,y"], "expected numbers"),
    ):
        assert run([*line, *extra]) == 2
        assert message in capsys.readouterr().err


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = pair_store(tmp_path / "a", "a", A | {"r": {"a": 5.0}})
    two = pair_store(tmp_path / "b", "b", {"q": {"a": 1.5, "b": 2.0, "x": 1.0}, "r": {"a": 5.0}})
    status, found = called(capsys, "diff", one, two)
    assert status == 0
    assert (found["only_first"], found["only_second"], found["common"]) == (1, 1, 3)
    assert found["max_difference"] == 0.5
    assert found["mean_difference"] == pytest.approx(0.5 / 3)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 5], [1.5, 2, 5])[0, 1])
    assert found["same_best"] == 1.0
    assert found["teacher_fields"] == {"model": ["a", "b"]}


def test_nodes_from_npz(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", logits=logits, graph_fingerprint="g")
    status, found = called(capsys, "import", tmp_path / "x.npz", "--out", tmp_path / "s")
    assert (status, found["kind"], found["rows"], found["dtype"]) == (0, "rows", 6, "float32")
    np.testing.assert_array_equal(scores.open(tmp_path / "s").logits, logits)
    assert called(capsys, "export", tmp_path / "s", "--format", "node-npz", "--out", tmp_path / "y.npz")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["logits"], logits)
    status, found = called(capsys, "diff", tmp_path / "s", tmp_path / "s")
    assert (found["max_difference"], found["same_best"], found["same_graph"]) == (0.0, 1.0, True)
    assert run(["scores", "ensemble", str(tmp_path / "s"), str(tmp_path / "s"), "--out", str(tmp_path / "e")]) == 2


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["scores", "verify", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "expected a folder of teacher scores" in err


def test_checking_files_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, structkd.cli.scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
