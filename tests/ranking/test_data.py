"""The BEIR reader: real folders, tolerated oddities, every error with its place."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from structkd.errors import DataError, UsageError
from structkd.ranking.data.collection import hold_out, load, splits
from structkd.trec import run_of


def write(folder: Path, corpus: str | None = None, queries: str | None = None, **qrels: str) -> Path:
    corpus = '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": ""}\n' if corpus is None else corpus
    queries = '{"_id": "q1", "text": "a"}\n{"_id": "q2", "text": "b"}\n' if queries is None else queries
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    for name, text in qrels.items():
        path = folder / "qrels.tsv" if name == "plain" else folder / "qrels" / f"{name}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "documents", "queries", "judgements"),
    [("scifact", 5183, 300, 339), ("cranfield", 1400, 225, 1837), ("msmarco-dl22", 16660, 76, 0), ("adi", 82, 35, 170)],
)
def test_real_collections(real_data: Path, name: str, documents: int, queries: int, judgements: int) -> None:
    collection = load(real_data / "ranking" / name)
    assert (len(collection.documents), len(collection.queries)) == (documents, queries)
    assert sum(map(len, collection.qrels.values())) == judgements


def test_training_split_drops_the_two_queries_that_repeat_a_test_text(
    real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = load(real_data / "ranking" / "scifact", split="train")
    assert len(train.queries) == 807
    assert "871, 1291" in capsys.readouterr().err
    assert splits(real_data / "ranking" / "scifact") == ["train"]


def test_title_and_text_are_joined_and_an_empty_document_stays(tmp_path: Path) -> None:
    collection = load(write(tmp_path))
    assert list(collection.documents.texts) == ["T one", ""]
    assert collection.qrels == {}


def test_judgements_with_header_without_and_in_trec_form_agree(tmp_path: Path) -> None:
    forms = ["query-id\tcorpus-id\tscore\nq1\td1\t1\n", "q1\td1\t1\n", "q1 0 d1 1\n"]
    found = []
    for position, text in enumerate(forms):
        (tmp_path / str(position)).mkdir()
        found.append(load(write(tmp_path / str(position), plain=text)).qrels)
    assert found == [{"q1": {"d1": 1}}] * 3


def test_a_judged_document_outside_the_pool_is_kept_and_is_no_positive_of_the_pool(tmp_path: Path) -> None:
    collection = load(write(tmp_path, plain="q1\td9\t2\nq1\td1\t1\nq2\td2\t0\n"))
    assert collection.qrels["q1"] == {"d9": 2, "d1": 1}
    assert collection.positives("q1") == ["d1"]
    assert collection.positives("q2") == []
    assert collection.positives("q1", grade=2) == []


def test_splits_choose_queries_and_drop_repeated_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(["x", "y", "X .", "z"]))
    folder = write(tmp_path, queries=queries, test="q0\td1\t1\n", train="q1\td1\t1\nq2\td2\t1\n")
    assert list(load(folder).queries.ids) == ["q0"]
    assert list(load(folder, split="train").queries.ids) == ["q1", "q2"]
    (folder / "queries.jsonl").write_text(queries.replace("X .", " X."))
    assert list(load(folder, split="train").queries.ids) == ["q1"]
    assert "q2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus": '{"_id": "d1", "text": "a"}\n{"_id"'}, "corpus.jsonl:2: not valid JSON"),
        ({"corpus": "[]\n"}, "corpus.jsonl:1: found list, expected an object"),
        ({"corpus": '{"_id": 3, "text": "a"}\n'}, "corpus.jsonl:1: '_id' is 3, expected a non-empty string"),
        ({"corpus": '{"_id": "d1"}\n'}, "corpus.jsonl:1: document 'd1' has no string 'text'"),
        ({"corpus": '{"_id": "d", "text": "a"}\n{"_id": "d", "text": "b"}\n'}, "'d' stands in line 1 already"),
        ({"corpus": "\n"}, "holds no document"),
        ({"queries": '{"_id": "q", "text": " "}\n'}, "queries.jsonl:1: query 'q' is empty"),
        ({"plain": "q1\td1\t1\nq9\td1\t1\n"}, "qrels.tsv:2: query 'q9' is judged but is not among the 2 queries"),
        ({"plain": "q1\td1\t1\nq1\td1\t0\n"}, "qrels.tsv:2: document 'd1' is judged twice for query 'q1'"),
        ({"plain": "q1\td1\t1\nq1\td1\t0.5\n"}, "qrels.tsv:2: found"),
        ({"train": "q1\td1\t1\n", "dev": "q2\td1\t1\n"}, "several splits (dev, train) and none is 'test'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, files: dict[str, str], message: str) -> None:
    folder = write(tmp_path, **files)
    with pytest.raises(DataError) as error:
        load(folder)
    assert message in str(error.value)


def test_unknown_folder_split_and_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match="no split 'train'"):
        load(write(tmp_path), split="train")
    with pytest.raises(DataError, match="documents: 1 of 1 ids are unknown, for example 'd7'"):
        load(tmp_path).pairs(["q1"], ["d7"])


def test_pairs_of_a_run_follow_its_order(tmp_path: Path) -> None:
    collection = load(write(tmp_path))
    pairs = collection.pairs_of(run_of(["q2", "q1", "q1"], ["d1", "d1", "d2"], np.array([1.0, 1.0, 2.0])))
    assert list(zip(pairs.query_ids, pairs.document_ids, strict=True)) == [("q2", "d1"), ("q1", "d2"), ("q1", "d1")]


def test_hold_out_is_seeded_disjoint_and_complete() -> None:
    ids = [f"q{i}" for i in range(50)]
    train, held = hold_out(ids, 0.1, seed=3)
    assert len(held) == 5
    assert sorted(train + held) == sorted(ids)
    assert hold_out(ids[::-1], 0.1, seed=3) == (train, held)
    assert hold_out(ids, 0.1, seed=4)[1] != held
    assert hold_out(["q"], 0.5, seed=0) == (["q"], [])
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        hold_out(ids, 1.0, seed=0)


def test_reading_a_collection_loads_no_torch() -> None:
    code = "import sys, structkd.ranking.data.collection; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
