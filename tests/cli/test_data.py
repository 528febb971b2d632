import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from structkd import graph
from structkd.cli.app import run
from structkd.graph.data.datasets import DATASETS
from structkd.graph.data.readers import csr_npz
from structkd.ranking.data.check import check_folder
from structkd.ranking.data.datasets import load

ROOT = Path(__file__).parents[2]


def beir(folder: Path, corpus: str, queries: str, **qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    for split, text in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


SOUND = '{"_id": "d1", "title": "", "text": "red"}\n{"_id": "d2", "text": "blue"}\n'
ASKED = '{"_id": "q1", "text": "what is red?"}\n{"_id": "q2", "text": "What is red"}\n'


def test_list_names_every_builtin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["datasets"]
    assert {"digits", "pydocs", "planetoid:Cora"} <= {row["name"] for row in rows}
    for row in rows:
        assert set(row) == {"name", "kind", "make", "size", "source", "licence"}
        assert all(row.values()) or row["make"] is False
    families = {row["name"].partition(":")[0] for row in rows if row["kind"] == "graph"}
    assert families == set(DATASETS)
    assert run(["data", "list"]) == 0
    assert "planetoid:Cora" in capsys.readouterr().out


def test_the_manifest_in_the_data_folder_is_the_packages() -> None:
    in_data, in_package = ROOT / "data" / "manifest.toml", ROOT / "structkd" / "data_manifest.toml"
    assert tomllib.loads(in_data.read_text()) == tomllib.loads(in_package.read_text())


def test_made_digits_are_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "make", "digits", "--out", str(tmp_path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    first, again = graph.load("digits"), graph.load(f"npz:{made['path']}", split="masks")
    for name in ("x", "edge_index", "y", "train", "valid", "test"):
        assert np.array_equal(getattr(first, name).numpy(), getattr(again, name).numpy()), name
    assert csr_npz(tmp_path / "graph.npz").masks is not None
    assert run(["data", "check", made["path"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"nodes": 1797, "edges": 6309, "classes": 10}


def test_made_pydocs_are_pydocs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pydocs"
    assert run(["data", "make", "pydocs", "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["documents"] == len(load("pydocs").documents)
    assert load(out, "train").qrels == load("pydocs", "train").qrels
    assert run(["data", "check", str(out)]) == 0
    assert "no problem found" in capsys.readouterr().out


def test_make_knows_what_it_can_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "make", "planetoid:Cora", "--out", str(tmp_path)]) == 2
    assert "'planetoid:Cora' cannot be made; expected one of digits, sbm" in capsys.readouterr().err


def test_check_finds_every_problem_of_a_collection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = beir(
        tmp_path / "bad",
        SOUND + '{"_id": "d1", "text": "again"}\n{cut\n{"_id": "", "text": "x"}\n{"_id": "d9"}\n[1]\n',
        ASKED + '{"_id": "q3", "text": " "}\n',
        test="query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t0\nq7\td1\t1\nq1\td2\tyes\nq2\t0\td2\t2\n",
    )
    assert run(["data", "check", str(folder), "--json"]) == 1
    found = [
        (p["path"].removeprefix(f"{folder}/"), p["problem"]) for p in json.loads(capsys.readouterr().out)["problems"]
    ]
    assert [where for where, _ in found] == [
        "corpus.jsonl:3", "corpus.jsonl:4", "corpus.jsonl:5", "corpus.jsonl:6", "corpus.jsonl:7",
        "queries.jsonl:3", "qrels/test.tsv:3", "qrels/test.tsv:4", "qrels/test.tsv:5",
    ]  # fmt: skip
    assert [what.split("(")[0].strip() for _, what in found] == [
        "id 'd1' occurs a second time",
        "not valid JSON",
        "'_id' is '', expected a non-empty string",
        "'d9' has no string 'text'",
        "found list, expected an object with _id and text",
        "query 'q3' is empty",
        "document 'd1' is judged twice for query 'q1'",
        "query 'q7' is judged but not in queries.jsonl",
        "found 'q1 d2 yes', expected `query document grade`",
    ]
    assert run(["data", "check", str(folder)]) == 1
    assert capsys.readouterr().out.count("\n") == 10


def test_check_notes_what_is_only_odd(tmp_path: Path) -> None:
    folder = beir(
        tmp_path / "odd",
        SOUND + '{"_id": "d3", "text": "Red."}\n{"_id": "d4", "text": ""}\n',
        ASKED,
        train="q1\td1\t1\n",
        test="q2\td1\t0\nq2\tzz\t-1\n",
    )
    report = check_folder(folder)
    assert report.problems == []
    assert report.counts == {"documents": 4, "queries": 2, "judgements": 3}
    notes = " | ".join(text for _, text in report.notes)
    for expected in (
        "1 documents have no text",
        "1 documents repeat another's text",
        "1 judged documents are not in corpus.jsonl",
        "1 judged queries have no document above grade 0",
        "1 training queries repeat a test query's text (q1)",
    ):
        assert expected in notes


def test_check_of_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    report = check_folder(tmp_path / "empty")
    assert [what for _, what in report.problems] == ["no such file", "no such file"]
    for content in (None, b"PK cut"):
        path = tmp_path / "graph.npz"
        if content is not None:
            path.write_bytes(content)
        assert run(["data", "check", str(path)]) == 1
        assert "1 problems" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["scifact", "cranfield", "nfcorpus", "cisi", "cacm", "adi"])
def test_real_collections_are_sound(real_data: Path, name: str) -> None:
    report = check_folder(real_data / "ranking" / name)
    assert report.problems == []
    collection = load(real_data / "ranking" / name)
    assert report.counts["documents"] == len(collection.documents)
