"""Bm25Index against the formula written out, against bm25s itself, and against the published column on real data."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
import Stemmer

from structkd import index
from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.ids import Ids, Texts
from structkd.index.text.bm25 import Bm25Index

TEXTS = [
    "Cats chase mice",
    "A cat sat on the mat; the cat slept",
    "Dogs chase cats, and cats run",
    "mice",
    "",
    "the of and",
    "Running dogs ran",
    "mice",
]
DOCUMENTS = Texts(Ids(["e", "d", "c", "b2", "x", "y", "a", "b1"]), TEXTS)
STEMS = [  # by hand: lower case, two or more characters, without stop words, Snowball English
    ["cat", "chase", "mice"],
    ["cat", "sat", "mat", "cat", "slept"],
    ["dog", "chase", "cat", "cat", "run"],
    ["mice"],
    [],
    [],
    ["run", "dog", "ran"],
    ["mice"],
]


def slow_score(query: list[str], words: list[str], k1: float, b: float) -> float:
    """Lucene's BM25 in float64, word by word."""
    mean = sum(map(len, STEMS)) / len(STEMS)
    counts, total = Counter(words), 0.0
    for word in query:
        holding = sum(word in other for other in STEMS)
        if holding and counts[word]:
            idf = math.log(1 + (len(STEMS) - holding + 0.5) / (holding + 0.5))
            total += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(words) / mean))
    return total


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 0.0), (2.0, 1.0)])
def test_equals_the_formula(k1: float, b: float) -> None:
    built = index.build_text(DOCUMENTS, k1=k1, b=b)
    assert isinstance(built, Bm25Index)
    for text, query in [("cats running", ["cat", "run"]), ("the mice! Mice?", ["mice", "mice"])]:
        expected = [slow_score(query, words, k1, b) for words in STEMS]
        np.testing.assert_allclose(built.scores(text), expected, rtol=1e-5, atol=1e-7)


def test_equals_bm25s_on_its_own_route() -> None:
    tool = bm25s.BM25(k1=0.9, b=0.4, method="lucene", backend="numpy")
    stemmer = Stemmer.Stemmer("english")
    tool.index(bm25s.tokenize(TEXTS, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    built = index.build_text(DOCUMENTS)
    assert isinstance(built, Bm25Index)
    for text in ("cats and mice", "dogs chase"):
        words = bm25s.tokenize(text, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)[0]
        np.testing.assert_allclose(built.scores(text), tool.get_scores(words), rtol=1e-6)


def test_lists_follow_the_tie_rule_and_hold_hits_only() -> None:
    top = index.build_text(DOCUMENTS).search(["mice", "the", "zebra", "cat mice"], 5)
    assert top.document_ids()[0] == ["b1", "b2", "e", None, None]
    assert top.scores[0, 0] == top.scores[0, 1] > top.scores[0, 2] > 0
    assert top.document_ids()[1:3] == [[None] * 5] * 2
    assert set(top.document_ids()[3]) == {"e", "b1", "b2", "c", "d"}
    run = top.run(["1", "2", "3", "4"])
    assert [len(documents) for documents, _ in run.lists.values()] == [3, 0, 0, 5]


def test_exclusions_are_refilled() -> None:
    top = index.build_text(DOCUMENTS).search(["mice"], 2, exclude=[["b1"]])
    assert top.document_ids() == [["b2", "e"]]


def test_reopened_is_the_same(tmp_path: Path) -> None:
    first = index.build_text(DOCUMENTS, out=tmp_path)
    second = index.open_text(tmp_path)
    queries = ["cats chase", "mice"]
    np.testing.assert_array_equal(first.search(queries, 4).rows, second.search(queries, 4).rows)
    np.testing.assert_array_equal(first.search(queries, 4).scores, second.search(queries, 4).scores)
    assert list(second.ids) == list(DOCUMENTS.ids)
    assert index.verify(tmp_path).ok


def test_documents_without_words() -> None:
    built = index.build_text(Texts(Ids(["a", "b"]), ["", "the"]))
    assert not built.search(["anything", ""], 3).valid.any()


def test_bad_calls() -> None:
    with pytest.raises(DataError, match="found no documents"):
        index.build_text(Texts(Ids([]), []))
    with pytest.raises(UsageError, match="kind 'flat' is no text index; expected one of bm25"):
        index.build_text(DOCUMENTS, kind="flat")
    with pytest.raises(DataError, match=r"k1 -1.0 and b 0.4: expected k1 >= 0 and b between 0 and 1"):
        index.build_text(DOCUMENTS, k1=-1.0)
    with pytest.raises(UsageError, match="k is 0"):
        index.build_text(DOCUMENTS).search(["x"], 0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    index.build_text(DOCUMENTS, out=tmp_path)
    path = next(tmp_path.glob("bm25-*"))
    data = bytearray(path.read_bytes())
    data[3] ^= 255
    path.write_bytes(bytes(data))
    assert not index.verify(tmp_path).ok
    with pytest.raises(CorruptFileError, match="cannot be read"):
        index.open_text(tmp_path)


def ndcg_at_10(run: dict[str, list[str]], qrels: dict[str, dict[str, int]]) -> float:
    """Mean over judged queries of DCG@10 (gain = grade, discount log2(rank + 1)) over the best possible."""
    values = []
    for query, grades in qrels.items():
        gains = [grades.get(document, 0) / math.log2(rank + 2) for rank, document in enumerate(run.get(query, [])[:10])]
        best = sorted(grades.values(), reverse=True)[:10]
        values.append(sum(gains) / sum(grade / math.log2(rank + 2) for rank, grade in enumerate(best)))
    return float(np.mean(values))


@pytest.mark.parametrize(("name", "column"), [("cranfield", 0.3433), ("cisi", 0.3725), ("cacm", 0.4874)])
def test_published_column_on_real_collections(real_data: Path, name: str, column: float) -> None:
    folder = real_data / "ranking" / name
    documents, queries = (
        [json.loads(line) for line in (folder / f).read_text().splitlines()] for f in ("corpus.jsonl", "queries.jsonl")
    )
    texts = [f"{item.get('title', '')} {item['text']}".strip() for item in documents]
    built = index.build_text(Texts(Ids(item["_id"] for item in documents), texts))
    run = built.search([item["text"] for item in queries], 10).run([item["_id"] for item in queries])
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    lists = {query: documents_of for query, (documents_of, _) in run.lists.items()}
    assert ndcg_at_10(lists, qrels) == pytest.approx(column, abs=0.005)


def test_jax_is_not_started_for_bm25(tmp_path: Path) -> None:
    """bm25s asks JAX for a top-k when it is imported, and JAX then holds most of a GPU."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('jax was imported')")
    code = "import structkd.index.text.bm25, sys; assert 'jax' not in sys.modules; import bm25s; print('fine')"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
