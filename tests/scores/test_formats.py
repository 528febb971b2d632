"""Score formats: every one round-trips and is recognised; every malformed file is named with its line."""

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from structkd import scores
from structkd.errors import ConflictingScoresError, DataError, UsageError
from structkd.scores import READERS, WRITERS, TeacherSpec
from structkd.scores.formats import registry as formats
from structkd.scores.formats.base import NodeTable, ScoreTable

LISTS = {"q1": {"d1": 9.5, "d2": -1.25, "d3": 3.0}, "q2": {"d3": 0.5, "d1": 0.25}}
QUERY_TEXTS = {"q1": "what is it", "q2": "who did it"}
DOCUMENT_TEXTS = {"d1": "it is one thing", "d2": "it is another", "d3": "someone did it"}
HASHED = {"margin-tsv-text", "flagembedding"}  # formats without document ids


def store_of(folder: Path, lists: dict = LISTS) -> scores.PairScores:
    flat = [(q, d, s) for q, found in lists.items() for d, s in found.items()]
    queries, documents, values = zip(*flat, strict=True)
    return scores.write_pairs(folder, TeacherSpec("t"), list(queries), list(documents), np.array(values))


def as_lists(table: ScoreTable) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    ids = table.query_ids.to_pylist(), table.document_ids.to_pylist()
    for query, document, score in zip(*ids, table.scores.tolist(), strict=True):
        assert out.setdefault(query, {}).setdefault(document, score) == score
    return out


def by_id(ids: pa.Array, texts: pa.Array | None) -> dict[str, str]:
    return dict(zip(ids.to_pylist(), (ids if texts is None else texts).to_pylist(), strict=True))


PAIR_FORMATS = sorted(set(WRITERS) - {"node-npz"})


def test_what_is_read_is_written() -> None:
    contract = (
        "margin-tsv-ids margin-tsv-text sbert-pickle sbert-jsonl hf-margin pylate tevatron flagembedding "
        "colbert-examples trec-run beir-run lightning-ir rank-permutations node-npz parquet"
    )
    assert set(READERS) == set(WRITERS) == set(contract.split())


@pytest.mark.parametrize("numbers", [False, True], ids=["string ids", "number ids"])
@pytest.mark.parametrize("format", PAIR_FORMATS)
def test_round_trip_and_recognition(tmp_path: Path, format: str, numbers: bool) -> None:
    rename = (lambda name: str(int(name[1:]) * 7)) if numbers else str
    lists = {rename(q): {rename(d): s for d, s in found.items()} for q, found in LISTS.items()}
    texts = [{rename(k): v for k, v in table.items()} for table in (QUERY_TEXTS, DOCUMENT_TEXTS)]
    path = tmp_path / "file"
    count = formats.write(path, format, store_of(tmp_path / "s", lists), query_texts=texts[0], document_texts=texts[1])
    assert count == 5
    assert formats.sniff(path) == ("pylate" if format == "parquet" else format)
    table = formats.read(path, format)[1]
    if format in HASHED:
        found = {
            (q, d): s
            for q, d, s in zip(
                table.query_texts.to_pylist(), table.document_texts.to_pylist(), table.scores.tolist(), strict=True
            )
        }
        assert found == {(texts[0][q], texts[1][d]): s for q, docs in lists.items() for d, s in docs.items()}
    elif format == "rank-permutations":
        order = {
            q: {d: -r for r, d in enumerate(sorted(f, key=f.__getitem__, reverse=True), 1)} for q, f in lists.items()
        }
        assert as_lists(table) == order
        assert table.kind == "rank"
    elif format == "hf-margin":
        best = {query: max(found.values()) for query, found in lists.items()}
        assert as_lists(table) == {q: {d: s - best[q] for d, s in found.items()} for q, found in lists.items()}
        assert table.kind == "margin"
        assert "first positive is set to 0" in table.notes[0]
    else:
        assert as_lists(table) == lists
    again = tmp_path / "again"
    third = formats.write(
        again,
        format,
        store_of(tmp_path / "b", as_lists(table)),
        query_texts=by_id(table.query_ids, table.query_texts) | texts[0],
        document_texts=by_id(table.document_ids, table.document_texts) | texts[1],
    )
    assert third == 5
    if format not in (*HASHED, "sbert-jsonl", "trec-run", "lightning-ir", "parquet", "pylate"):
        assert again.read_bytes() == path.read_bytes()


def test_node_npz(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    store = scores.write_nodes(tmp_path / "s", TeacherSpec("g", kind="rows"), logits, "graph")
    assert formats.write(tmp_path / "x", "node-npz", store) == 5
    format, table = formats.read(tmp_path / "x")
    assert format == "node-npz"
    assert isinstance(table, NodeTable)
    np.testing.assert_array_equal(table.logits, logits)
    assert table.graph_fingerprint == "graph"
    np.savez(tmp_path / "glnn.npz", logits.astype(np.float64))  # as GLNN keeps its teacher's output
    _, table = formats.read(tmp_path / "glnn.npz")
    assert "names no graph_fingerprint" in table.notes[0]
    for arrays, message in (({"x": logits}, "expected one of"), ({"logits": logits[0]}, "expected floats in 2 axes")):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(DataError, match=message):
            formats.read(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", logits=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        formats.read(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(DataError, match="not a readable npz"):
        formats.read(tmp_path / "bad.npz")


def test_every_real_run_is_recognised(real_data: Path) -> None:
    from structkd.trec import read_run

    paths = sorted((real_data / "ranking").glob("*/runs/*.tsv"))
    assert len(paths) >= 17
    for path in paths:
        format, table = formats.read(path)
        assert format == "trec-run"
        assert len(table) == len(read_run(path))


def test_real_splade_scores_survive(real_data: Path, tmp_path: Path) -> None:
    _, table = formats.read(real_data / "ranking" / "msmarco-dl22" / "runs" / "splade_p_p_ensemble_distil.tsv")
    assert table.scores.max() > 2e6
    ids = table.query_ids.to_pylist(), table.document_ids.to_pylist()
    store = scores.write_pairs(tmp_path, TeacherSpec("splade"), *ids, table.scores)
    assert store.dtype == "float32"
    np.testing.assert_array_equal(store.lookup(*ids), table.scores)


# shapes seen in public files

OTHER_SHAPES = {
    "gzip without a suffix": (gzip.compress(b"q1 Q0 d1 1 2.5 tag\n"), "trec-run", {"q1": {"d1": 2.5}}),
    "byte order mark and CRLF": (b"\xef\xbb\xbfq1\td1\t1\t2.5\r\n\r\n", "trec-run", {"q1": {"d1": 2.5}}),
    "aligned columns": (b"q1   Q0  d1    1   2.5   tag\n", "trec-run", {"q1": {"d1": 2.5}}),
    "lists as strings": (
        b'{"query_id": 1, "document_ids": "[2, 3]", "scores": "[0.5, 0.25]"}\n',
        "pylate",
        {"1": {"2": 0.5, "3": 0.25}},
    ),
    "swapped scorer output": (b"[1, [[0.5, 7], [0.25, 8]]]\n", "colbert-examples", {"1": {"7": 0.5, "8": 0.25}}),
    "ColBERT without scores": (b"[1, 7, 8]\n", "rank-permutations", {"1": {"7": -1, "8": -2}}),
    "MS MARCO run": (b"1\t7\t1\n1\t8\t2\n", "rank-permutations", {"1": {"7": -1, "8": -2}}),
    "Lightning IR CSV": (b"query_id,doc_id,score\n1,7,0.5\n", "lightning-ir", {"1": {"7": 0.5}}),
    "Lightning IR JSON": (b'{"query_id": "1", "doc_id": "7", "score": 0.5}\n', "lightning-ir", {"1": {"7": 0.5}}),
    "several systems": (
        b'{"qid": 1, "pos": [{"pid": 2, "ce-score": 9.0}], "neg": {"a": [{"pid": 3, "ce-score": 1}], "b": []}}\n',
        "sbert-jsonl",
        {"1": {"2": 9.0, "3": 1.0}},
    ),
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_shapes_of_public_files(tmp_path: Path, name: str) -> None:
    data, format, want = OTHER_SHAPES[name]
    (tmp_path / "file").write_bytes(data)
    found, table = formats.read(tmp_path / "file")
    assert found == format
    assert as_lists(table) == want


def test_parquet_names_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"qid": ["1"], "docno": ["a"], "score": [2.0]}), path)
    assert formats.sniff(path) == "lightning-ir"
    assert as_lists(formats.read(path)[1]) == {"1": {"a": 2.0}}
    pq.write_table(pa.table({"query_id": [1], "corpus_id": [[7, 8]], "score": [[1.0, 2.0]]}), path)
    assert as_lists(formats.read(path)[1]) == {"1": {"7": 1.0, "8": 2.0}}
    pq.write_table(pa.table({"query_id": [1, 1], "doc_id": [7, 8], "rank": [1, 2]}), path)
    assert formats.read(path)[1].kind == "rank"
    for columns, message in (
        ({"query_id": [1], "document_ids": [[7, 8]], "scores": [[1.0]]}, "row 0: 2 documents but 1 scores"),
        ({"query_id": [1], "document_ids": ["[7, "], "scores": [[1.0]]}, "looks like a list but is not JSON"),
        ({"query_id": [None], "document_ids": [[7]], "scores": [[1.0]]}, "row 0: query id None"),
        ({"query_id": [1], "document_ids": [[7]], "scores": [[None]]}, "row 0: score None is not a number"),
        ({"query_id": [1], "document_ids": [[7]]}, "expected one of"),
        ({"query": [1]}, "expected one of"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=message):
            formats.read(path, "parquet")
    path.write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not a readable parquet"):
        formats.read(path)


def test_margins_are_chained(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"

    def write(rows: list[tuple[str, str, str, float]]) -> ScoreTable:
        names = ("query_id", "positive_id", "negative_id", "score")
        pq.write_table(pa.table({n: [row[i] for row in rows] for i, n in enumerate(names)}), path)
        return formats.read(path, "hf-margin")[1]

    table = write([("q", "a", "b", 3.0), ("q", "c", "b", 1.0), ("q", "c", "d", 5.0), ("q", "x", "y", 1.0)])
    assert as_lists(table) == {"q": {"a": 0.0, "b": -3.0, "c": -2.0, "d": -7.0}}
    assert "2 pairs are joined to that positive by no margin" in table.notes[1]
    with pytest.raises(ConflictingScoresError, match="margins disagree about document"):
        write([("q", "a", "b", 3.0), ("q", "b", "c", 1.0), ("q", "a", "c", 9.0)])


# malformed files

MALFORMED = [
    ("trec-run", "q Q0 d 1 2.5 tag\nq Q0 e 2 x tag\n", r"file:2: score 'x' is not a number"),
    ("trec-run", "q Q0 d 1 nan tag\n", r"file:1: score 'nan' is not a finite number"),
    ("beir-run", '{"q": {"d": "x"}}', r"query 'q', document 'd': score 'x' is not a number"),
    ("beir-run", '{"q": {"d": 1.0', "not a JSON object"),
    ("beir-run", "[1]", r"file:1: found '\[1\]', expected a JSON object"),
    ("beir-run", '{"q": 3}', "query 'q' holds a int"),
    ("margin-tsv-ids", "1.0\t0.5\tq\td\te\n1.0\t0.5\tq\td\n", r"file:2: found 4 columns, expected 5 \(pos_score"),
    ("margin-tsv-ids", "1.0\tinf\tq\td\te\n", r"file:1: neg_score 'inf' is not a finite number"),
    ("margin-tsv-ids", "1.0\t0.5\t\td\te\n", r"file:1: query id ''"),
    ("margin-tsv-text", "1.0\t0.5\tq x\td y\n", r"file:1: found 4 columns, expected 5 \(pos_score, neg_score, query"),
    ("sbert-jsonl", '{"qid": 1, "pos": [1], "neg": {"a": [2]}}\n', "file:1: items are plain ids"),
    ("sbert-jsonl", '{"qid": 1, "neg": {"a": [{"pid": 2}]}}\n', r"file:1: item with fields \['pid'\]"),
    ("sbert-jsonl", '{"qid": 1}\n', 'file:1: expected an object with "qid"'),
    ("sbert-jsonl", '{"qid": 1, "pos"', "file:1: not JSON .* cut short"),
    ("pylate", '{"query_id": 1, "document_ids": [1, 2], "scores": [1]}\n', "file:1: 2 documents but 1 scores"),
    ("pylate", '{"query_id": 1}\n', "file:1: fields"),
    ("pylate", "[1]\n", "file:1: found a JSON list"),
    ("lightning-ir", "query_id,doc_id,score\n1,2,x\n", "file:2: score 'x'"),
    ("lightning-ir", "query_id,doc_id\n1,2\n", "file:1: columns"),
    ("colbert-examples", "[1, [2, 0.5], 3]\n", "file:1: found 3, expected a pair"),
    ("colbert-examples", "[1, [0.5, 2]]\n", r"file:1: document id 0\.5"),
    ("colbert-examples", "[1, 2, 3]\n", "file:1: expected .*rank-permutations"),
    ("tevatron", '{"query_id": "1"}\n', "file:1: expected query_id, query"),
    (
        "tevatron",
        '{"query_id": "1", "query": "x", "positive_passages": [{"docid": "d", "text": "t"}]}\n',
        "file:1: a passage without",
    ),
    ("flagembedding", '{"query": "x", "pos": ["a"], "neg": []}\n', "file:1: 1 pos texts but no pos_scores"),
    ("flagembedding", '{"query": "x"}\n', "file:1: expected query, pos, neg"),
    ("rank-permutations", "1\t7\t1\n1\t8\n", "file:2: found 2 columns, expected 3"),
    ("rank-permutations", '{"x": 1}\n', "file:1: expected"),
    ("sbert-pickle", "\x80\x04cut", "not a readable pickle"),
]


@pytest.mark.parametrize(("format", "text", "message"), MALFORMED)
def test_malformed_files_are_named_with_their_line(tmp_path: Path, format: str, text: str, message: str) -> None:
    (tmp_path / "file").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        formats.read(tmp_path / "file", format)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    for value in ({1: {2: Evil()}}, Evil()):
        (tmp_path / "file").write_bytes(gzip.compress(pickle.dumps(value)))
        with pytest.raises(DataError, match=r"asks for posix\.system"):
            formats.read(tmp_path / "file")
    assert not (tmp_path / "ran").exists()
    numbers = {1: {2: np.float32(0.5), 3: np.float64(1.5)}}
    (tmp_path / "file").write_bytes(pickle.dumps(numbers))
    assert as_lists(formats.read(tmp_path / "file")[1]) == {"1": {"2": 0.5, "3": 1.5}}
    (tmp_path / "file").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="holds a list"):
        formats.read(tmp_path / "file")


def test_what_cannot_be_told_or_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        formats.read(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        formats.read(tmp_path / "file")
    for text in ("hello world\n", "1 2\n", '{"a": 1}\n'):
        (tmp_path / "file").write_text(text)
        with pytest.raises(DataError, match="Name one with --format"):
            formats.read(tmp_path / "file")
    with pytest.raises(UsageError, match="expected auto or one of beir-run"):
        formats.read(tmp_path / "file", "csv")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(DataError, match="no scores in it"):
        formats.read(tmp_path / "file", "beir-run")
    store = store_of(tmp_path / "s")
    with pytest.raises(UsageError, match="cannot hold pairs"):
        formats.write(tmp_path / "x", "node-npz", store)
    with pytest.raises(UsageError, match="Name their --collection"):
        formats.write(tmp_path / "x", "tevatron", store)
    two = {name: text for name, text in DOCUMENT_TEXTS.items() if name != "d3"}
    with pytest.raises(DataError, match="document 'd3' is not in the collection"):
        formats.write(tmp_path / "x", "tevatron", store, query_texts=QUERY_TEXTS, document_texts=two)
    single = store_of(tmp_path / "one", {"q": {"d": 1.0}})
    for format in ("margin-tsv-ids", "hf-margin"):
        with pytest.raises(DataError, match="query 'q' has a single document"):
            formats.write(tmp_path / "x", format, single)
    assert not (tmp_path / "x").exists()


def test_swapped_score_columns_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("0.5\t1.0\tq\td\te\n0.1\t1.0\tq\td2\te2\n1.0\t0.2\tr\td\te\n")
    _, table = formats.read(tmp_path / "file")
    assert "outscores the negative in only 1 of 3 lines" in table.notes[0]


def test_ranks_that_contradict_scores_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("q Q0 a 1 0.5 t\nq Q0 b 2 0.9 t\n")
    _, table = formats.read(tmp_path / "file")
    assert "rank column disagrees" in table.notes[0]
    assert as_lists(formats.read(tmp_path / "file", "rank-permutations")[1]) == {"q": {"a": -1.0, "b": -2.0}}


def test_json_numbers_only_when_all_ids_are(tmp_path: Path) -> None:
    formats.write(tmp_path / "x", "sbert-jsonl", store_of(tmp_path / "s", {"1": {"7": 2.0, "007": 1.0}}))
    line = json.loads((tmp_path / "x").read_text())
    assert line == {"qid": 1, "pos": [{"pid": "7", "ce-score": 2.0}], "neg": {"t": [{"pid": "007", "ce-score": 1.0}]}}
