"""`structkd index` as scripts call it: lines and JSON keys of the contract, runs, exit status."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import load_npz

from structkd import graph
from structkd.cli.app import run
from structkd.trec import Run, read_run, write_run

KEYS = {"kind", "metric", "dim", "count", "bytes", "recall", "build_seconds"}


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    documents = {"d2": ("Cats", "purr at night"), "d1": ("Cats", "purr at night"), "d3": ("", "dogs bark")}
    lines = [json.dumps({"_id": name, "title": title, "text": text}) for name, (title, text) in documents.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    queries = {"q1": "cat purring", "q2": "dogs", "q3": "zebra"}
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": q, "text": t}) for q, t in queries.items()))
    judged = "q1\td1\t1\nq2\td3\t1\nq3\td3\t1\n"
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((30, 4)))
    (tmp_path / "ids.txt").write_text("".join(f"d{n}\n" for n in range(30)))
    return tmp_path / "v.npy"


def called(capsys: pytest.CaptureFixture[str], *tokens: object) -> Any:
    status = run([str(token) for token in tokens] + ["--json"])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out)


def test_texts(collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = called(capsys, "index", "build", "--collection", collection, "--kind", "bm25", "--out", tmp_path / "i")
    assert built.keys() >= KEYS
    assert (built["kind"], built["count"], built["recall"]) == ("bm25", 3, 1.0)
    found = called(
        capsys, "index", "search", tmp_path / "i", "--collection", collection, "--k", 2, "--out", tmp_path / "r"
    )
    assert found["documents"] == 3
    lists = read_run(tmp_path / "r").lists
    assert {query: documents for query, (documents, _) in lists.items()} == {"q1": ["d1", "d2"], "q2": ["d3"]}
    shown = called(capsys, "index", "show", tmp_path / "i")
    assert shown == built
    assert called(capsys, "index", "verify", tmp_path / "i") == {"ok": True, "files": 3, "problems": []}


def test_vectors(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "i"
    ids = tmp_path / "ids.txt"
    built = called(
        capsys,
        *("index", "build", "--vectors", vectors, "--ids", ids, "--kind", "auto"),
        "--metric",
        "cosine",
        "--out",
        folder,
    )
    assert built.keys() >= KEYS
    assert (built["kind"], built["metric"], built["dim"], built["count"]) == ("flat", "cosine", 4, 30)
    assert built["reason"].startswith("30 vectors are at most 2,000,000")
    called(capsys, "index", "search", folder, "--queries", vectors, "--k", 5, "--out", tmp_path / "r")
    lists = read_run(tmp_path / "r").lists
    assert {query: documents[0] for query, (documents, _) in lists.items()} == {str(n): f"d{n}" for n in range(30)}
    called(
        capsys,
        *("index", "search", folder, "--queries", vectors, "--query-ids", ids),
        "--k",
        1,
        "--out",
        tmp_path / "s",
    )
    assert list(read_run(tmp_path / "s").lists) == [f"d{n}" for n in range(30)]
    graph = called(
        capsys,
        *("index", "knn-graph", folder, "--k", 3, "--symmetric", "union", "--self-loops"),
        "--out",
        tmp_path / "g.npz",
    )
    matrix = load_npz(tmp_path / "g.npz")
    assert graph["edges"] == matrix.nnz
    assert (matrix != matrix.T).nnz == 0
    assert matrix.diagonal() == pytest.approx(1)


def test_many_vectors_per_document(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "tokens.txt"
    names.write_text("".join(f"d{n // 3}\n" for n in range(30)))
    built = called(
        capsys,
        *("index", "build", "--vectors", vectors, "--ids", names, "--kind", "multi-vector"),
        "--out",
        tmp_path / "m",
    )
    assert (built["kind"], built["count"], built["dim"]) == ("multi-vector", 10, 4)
    searched = ("index", "search", tmp_path / "m", "--queries", vectors, "--query-ids", names, "--k", 4)
    called(capsys, *searched, "--out", tmp_path / "r")
    lists = read_run(tmp_path / "r").lists
    assert {query: documents[0] for query, (documents, _) in lists.items()} == {f"d{n}": f"d{n}" for n in range(10)}
    assert (
        run(["index", "build", "--vectors", str(vectors), "--kind", "multi-vector", "--out", str(tmp_path / "n")]) == 2
    )
    assert "no ids for 30 vectors; multi-vector needs one id per vector" in capsys.readouterr().err


def test_ids_beside_the_vectors_are_taken(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.txt").write_text("".join(f"n{n}\n" for n in range(30)))
    called(capsys, "index", "build", "--vectors", vectors, "--out", tmp_path / "i")
    called(capsys, "index", "search", tmp_path / "i", "--queries", vectors, "--k", 1, "--out", tmp_path / "r")
    lists = read_run(tmp_path / "r").lists
    assert {query: documents for query, (documents, _) in lists.items()} == {f"n{n}": [f"n{n}"] for n in range(30)}


def test_verify_says_which_file_is_bad(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called(capsys, "index", "build", "--vectors", vectors, "--out", tmp_path / "i")
    path = next((tmp_path / "i").glob("vectors-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert run(["index", "verify", str(tmp_path / "i"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["problems"] == [{"path": path.name, "problem": "bytes differ from the checksum in the manifest"}]


@pytest.mark.parametrize(
    ("tokens", "status", "message"),
    [
        (["build", "--out", "{}/i"], 2, "give either --collection (texts) or --vectors"),
        (["build", "--collection", "{}/set", "--kind", "flat", "--out", "{}/i"], 2, "kind 'flat' indexes vectors"),
        (["build", "--vectors", "{}/v.npy", "--kind", "bm25", "--out", "{}/i"], 2, "is unknown for vectors"),
        (["build", "--vectors", "{}/none.npy", "--out", "{}/i"], 1, "none.npy: no such file"),
        (["show", "{}/set"], 1, "no index.json there"),
        (["verify", "{}/set"], 1, "no index.json there"),
        (["fuse", "{}/r", "--k", "0", "--out", "{}/f"], 2, "k is 0; expected a whole number of at least 1"),
        (["search", "{}/set", "--out", "{}/r"], 2, "give either --collection"),
        (["search", "{}/set", "--queries", "{}/v.npy", "--out", "{}/r"], 1, "no index.json there"),
    ],
)
def test_one_line_says_what_is_wrong(
    tokens: list[str],
    status: int,
    message: str,
    collection: Path,
    vectors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["index", *(token.format(tmp_path) for token in tokens)]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_runs_are_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", Run({"q": (["x", "y", "z"], np.asarray([3.0, 2.0, 1.0]))}))
    write_run(tmp_path / "b", Run({"q": (["y", "w"], np.asarray([0.9, 0.1])), "r": (["x"], np.asarray([5.0]))}))
    runs = (tmp_path / "a", tmp_path / "b")
    found = called(capsys, "index", "fuse", *runs, "--out", tmp_path / "f", "--k", 3)
    assert found == {"run": str(tmp_path / "f"), "runs": 2, "by": "rank", "queries": 2, "documents": 4}
    lists = read_run(tmp_path / "f").lists
    assert lists["q"][0] == ["y", "x", "w"]  # 1/62 + 1/61, then 1/61, then 1/62 (before z, 1/63)
    np.testing.assert_allclose(lists["q"][1], [1 / 62 + 1 / 61, 1 / 61, 1 / 62], rtol=1e-6)
    assert lists["r"][0] == ["x"]
    line = ("index", "fuse", *runs, "--out", tmp_path / "g", "--by", "score", "--weights", 1, 0.25)
    called(capsys, *line)
    lists = read_run(tmp_path / "g").lists  # min-max: x 1, y .5 + .25, z 0, w 0
    assert lists["q"][0] == ["x", "y", "w", "z"]
    np.testing.assert_allclose(lists["q"][1], [1, 0.75, 0, 0], atol=1e-7)
    assert run([str(t) for t in (*line[:-1], "--json")]) == 2
    assert "found 1 weights for 2 runs; give one weight per run" in capsys.readouterr().err


def test_a_neighbour_graph_trains_a_student_where_no_graph_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors with labels and nothing else: index, neighbour graph, a graph teacher and its student."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 240)
    np.save(tmp_path / "v.npy", rng.standard_normal((4, 16))[labels] + 0.8 * rng.standard_normal((240, 16)))
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    called(capsys, "index", "build", "--vectors", tmp_path / "v.npy", "--kind", "flat", "--out", tmp_path / "i")
    line = ("index", "knn-graph", tmp_path / "i", "--k", 6, "--symmetric", "union", "--out", tmp_path / "g.npz")
    made = called(capsys, *line, "--labels", tmp_path / "labels.txt")
    with np.load(tmp_path / "g.npz") as arrays:
        assert arrays["adj_data"].tolist() == [1.0] * made["edges"]
        assert len(arrays["adj_scores"]) == made["edges"]
        assert arrays["labels"].tolist() == labels.tolist()
        np.testing.assert_allclose(np.linalg.norm(arrays["attr_matrix"], axis=1), 1, rtol=1e-5)
    task = graph.load(f"npz:{tmp_path / 'g.npz'}", split="cpf", seed=0)
    assert task.x.shape == (240, 16)
    bench = ("graph", "bench", "--dataset", f"npz:{tmp_path / 'g.npz'}", "--split", "cpf", "--seeds", 1)
    found = called(capsys, *bench, "--methods", "mlp,glnn", "--out", tmp_path / "run")
    scores = {row["method"]: row["test_mean"] for row in found["rows"]}
    assert scores["glnn"] > 0.8
    assert found["rows"][0]["teacher_test_mean"] > 0.9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "found 2 labels for 30 nodes; give one per vector, in row order"),
        ("1\ncat\n", "labels.txt:2: found 'cat', expected a whole number (-1 for unknown)"),
    ],
)
def test_labels_that_do_not_fit(
    text: str, message: str, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text(text)
    called(capsys, "index", "build", "--vectors", vectors, "--out", tmp_path / "i")
    line = ["index", "knn-graph", str(tmp_path / "i"), "--out", str(tmp_path / "g"), "--labels"]
    assert run([*line, str(tmp_path / "labels.txt")]) == 1
    assert message in capsys.readouterr().err
    np.save(tmp_path / "l.npy", np.zeros(30))
    assert run([*line, str(tmp_path / "l.npy")]) == 1
    assert "found float64 of shape [30], expected one whole number a vector" in capsys.readouterr().err
