"""Score files become stores: whole or not at all, in blocks, whatever packing, line ends and ids they come with."""

import gzip
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from structkd import scores
from structkd.cli.app import run
from structkd.errors import ConflictingScoresError, DataError
from structkd.packed import open_packed, packed_writer, unpacked
from structkd.scores import TeacherSpec
from structkd.scores.formats import base as formats_base
from structkd.scores.formats import delimited
from structkd.scores.formats import json_lines as formats_json
from structkd.scores.formats import pickles as formats_pickle
from structkd.scores.formats import registry as formats
from structkd.scores.formats import tables as formats_tables
from structkd.scores.formats.delimited import Layout, read_columns
from structkd.scores.layout.parts import part_names
from structkd.scores.layout.snapshot import manifest_path
from structkd.scores.manifest import ScoreManifest

LISTS = {
    f"q{i}": {f"d{j}": float(np.float16(random.Random(100 * i + j).uniform(-9, 9))) for j in range(i, i + 7)}
    for i in range(9)
}
PAIRS = {(q, d): s for q, found in LISTS.items() for d, s in found.items()}
TEXTS = {"query_texts": {q: f"query {q}" for q in LISTS}, "document_texts": {f"d{j}": f"text {j}" for j in range(20)}}
WITH_IDS = ("beir-run", "colbert-examples", "lightning-ir", "margin-tsv-ids", "parquet", "pylate", "sbert-jsonl",
            "sbert-pickle", "tevatron", "trec-run")  # fmt: skip


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block border that a large file has, in a small one."""
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 50)
    for module in (formats_base, formats_tables, formats_pickle):
        monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    monkeypatch.setattr(formats_tables, "_BATCH_LISTS", 2)
    monkeypatch.setattr(formats_pickle, "_CHUNK", 37)


def store_of(folder: Path) -> scores.PairScores:
    columns = [list(column) for column in zip(*PAIRS, strict=True)]
    return scores.write_pairs(folder, TeacherSpec("t"), *columns, np.array(list(PAIRS.values())), dtype="float32")


def pairs_in(folder: Path) -> dict[tuple[str, str], float]:
    queries, documents, values = scores.open(folder).pairs()
    return dict(zip(zip(queries, documents, strict=True), values.tolist(), strict=True))


def imported(tmp_path: Path, data: bytes | str, **options: str) -> dict[tuple[str, str], float]:
    path = tmp_path / "file"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    scores.import_file(path, tmp_path / "imported", dtype="float32", **options)
    return pairs_in(tmp_path / "imported")


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format", WITH_IDS)
def test_every_format_comes_back_through_many_blocks(tmp_path: Path, format: str, packing: str) -> None:
    if packing and format in ("parquet", "pylate", "lightning-ir"):
        packing = ""
    path = tmp_path / f"file.run{packing}" if format == "lightning-ir" else tmp_path / f"file{packing}"
    assert formats.write(path, format, store_of(tmp_path / "s"), **TEXTS) == len(PAIRS)
    magic = {"": b"", ".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}[packing]
    assert path.read_bytes().startswith(magic)
    renamed = path.rename(tmp_path / "no-suffix")  # content tells the packing
    found = scores.import_file(renamed, tmp_path / "imported", dtype="float32")
    assert found == {"parquet": "pylate", "lightning-ir": "trec-run"}.get(format, format)
    assert pairs_in(tmp_path / "imported") == PAIRS
    assert scores.verify(tmp_path / "imported").ok
    assert len(part_names(tmp_path / "imported")) > 3


def test_packed_files(tmp_path: Path) -> None:
    for name in ("a", "a.gz", "a.zst"):
        with packed_writer(tmp_path / name) as stream:
            stream.write(b"some bytes" * 1000)
        assert unpacked(tmp_path / name) == b"some bytes" * 1000
        cut = tmp_path / "cut"
        cut.write_bytes((tmp_path / name).read_bytes()[:-9])
        if name != "a":
            with pytest.raises(DataError, match="packed data is damaged or cut short"):
                unpacked(cut)
            with pytest.raises(DataError, match=r"file|cut"):
                formats.read(cut, "trec-run")
    with pytest.raises(DataError, match="no such file"):
        open_packed(tmp_path / "none")
    with pytest.raises(TypeError), packed_writer(tmp_path / "half.gz") as stream:
        stream.write("no bytes")
    assert not (tmp_path / "half.gz").exists()


# what real files look like

LIKE = {("q", "d"): 2.5, ("q", "e"): -1.0}
SHAPES = {
    "CRLF": "q\td\t1\t2.5\r\nq\te\t2\t-1\r\n",
    "old Mac line ends": "q\td\t1\t2.5\rq\te\t2\t-1\r",
    "byte order mark": b"\xef\xbb\xbfq\td\t1\t2.5\nq\te\t2\t-1\n",
    "no last line end": "q\td\t1\t2.5\nq\te\t2\t-1",
    "blank lines": "\n\nq\td\t1\t2.5\n   \n\nq\te\t2\t-1\n\n",
    "single spaces": "q Q0 d 1 2.5 t\nq Q0 e 2 -1 t\n",
    "aligned": "q    Q0   d    1     2.5  t\nq    Q0   e    2    -1.0  t\n",
    "leading blanks": "  q Q0 d 1 2.5 t \n  q Q0 e 2 -1 t \n",
    "tabs and spaces": "q Q0\td 1\t2.5 t\nq Q0\te 2\t-1 t\n",
    "padded columns": "q \t d\t1\t 2.5\nq\te \t2 \t-1\n",
    "exponents": "q\td\t1\t.25e1\nq\te\t2\t-1E+0\n",
    "plus and integers": "q\td\t0\t+2.5\nq\te\t1\t-1\n",
    "ranks as floats": "q\td\t1.0\t2.5\nq\te\t2.0\t-1\n",
    "the same pair twice": "q\td\t1\t2.5\nq\te\t2\t-1\nq\td\t3\t2.5\n",
    "gzip": gzip.compress(b"q\td\t1\t2.5\nq\te\t2\t-1\n"),
    "two gzip members": gzip.compress(b"q\td\t1\t2.5\n") + gzip.compress(b"q\te\t2\t-1\n"),
    "CSV with a header": "qid,docno,score\nq,d,2.5\nq,e,-1\n",
    "quoted CSV": '"query_id","doc_id","score"\n"q","d","2.5"\n"q","e",-1\n',
    "TSV with a header": "query-id\tcorpus-id\tscore\r\nq\td\t2.5\r\nq\te\t-1\r\n",
    "JSON over lines": '{\n  "q": {\n    "d": 2.5,\n    "e": -1\n  }\n}\n',
    "JSON with a key twice": '{"q": {"d": 2.5}, "q": {"e": -1}}',
}


@pytest.mark.parametrize("name", SHAPES)
def test_auto_reads_what_people_have(tmp_path: Path, name: str) -> None:
    assert imported(tmp_path, SHAPES[name]) == LIKE


IDS = ["7", "07", "007", "-7", "7.0", "1e3", "é", "日本", "a:b/c", "x" * 300, "0", "9999999", "99999999999999999999"]


def test_ids_stay_what_they_are(tmp_path: Path) -> None:
    text = "".join(f"{q}\t{d}\t1\t{i}.5\n" for i, (q, d) in enumerate((q, d) for q in IDS for d in IDS[:4]))
    want = {(q, d): i + 0.5 for i, (q, d) in enumerate((q, d) for q in IDS for d in IDS[:4])}
    assert imported(tmp_path, text) == want
    scores.import_file(tmp_path / "file", tmp_path / "imported")  # again: nothing new
    assert pairs_in(tmp_path / "imported") == want
    scores.write_pairs(tmp_path / "n", TeacherSpec("t"), ["1", "1"], ["2", "02"], np.array([1.0, 2.0]))
    (tmp_path / "plain").write_text("1\t2\t1\t1\n1\t3\t2\t5\n")
    scores.import_file(tmp_path / "plain", tmp_path / "n", teacher_name="t")  # rows of an older store are found
    assert pairs_in(tmp_path / "n") == {("1", "2"): 1.0, ("1", "02"): 2.0, ("1", "3"): 5.0}
    assert scores.open(tmp_path / "n").documents.ids == ["2", "02", "3"]


def test_ids_with_blanks_stand_between_tabs_only(tmp_path: Path) -> None:
    lists = {("my query", "doc 1"): 2.0, ("my query", "doc 2"): 1.0}
    assert imported(tmp_path, "my query\tdoc 1\t1\t2\nmy query\tdoc 2\t2\t1\n") == lists
    store = scores.open(tmp_path / "imported")
    with pytest.raises(DataError, match="query id 'my query' holds white space, which separates"):
        formats.write(tmp_path / "x", "trec-run", store)
    for format in ("margin-tsv-ids", "rank-permutations", "beir-run"):
        formats.write(tmp_path / "x", format, store)
        found = formats.read(tmp_path / "x", format)[1].document_ids.to_pylist()
        assert sorted(found) == ["doc 1", "doc 2"], format
    bad = scores.write_pairs(tmp_path / "tab", TeacherSpec("t"), ["q", "q"], ["a\tb", "c"], np.array([1.0, 2.0]))
    for format in ("margin-tsv-ids", "rank-permutations"):
        with pytest.raises(DataError, match=r"id 'a\\tb' has a tab"):
            formats.write(tmp_path / "y", format, bad)
    assert not (tmp_path / "y").exists()


def test_both_parsers_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    lines = [f"{rng.choice(IDS)}\t{rng.choice(IDS)}\t{i}\t{rng.uniform(-1e4, 1e4)!r}" for i in range(500)]
    (tmp_path / "f").write_text("\n".join(lines) + "\n")
    layout = Layout({"query_id": "id", "document_id": "id", "rank": "number", "score": "number"})
    fast = list(read_columns(tmp_path / "f", layout))
    monkeypatch.setattr(delimited, "_parsed", lambda *_: None)
    slow = list(read_columns(tmp_path / "f", layout))
    assert len(fast) == len(slow) == 1
    for name in ("query_id", "document_id"):
        assert fast[0].texts[name].to_pylist() == slow[0].texts[name].to_pylist()
    for name in ("rank", "score"):
        np.testing.assert_array_equal(fast[0].numbers[name], slow[0].numbers[name])
        np.testing.assert_array_equal(fast[0].lines, slow[0].lines)


# what is broken

BROKEN = [
    ("trec-run", "q\td\t1\t2\n\nq\te\t2\n", "file:3: found 3 columns, expected 4"),
    ("trec-run", "q\td\t1\t2\n\t\te\t2\t1\n", "file:2: found 5 columns, expected 4"),
    ("trec-run", "q\td\t1\t2\n\te\t2\t1\n", r"file:2: query id ''"),
    ("trec-run", "q\td\t1\t2\nq\te\t2\tinf\n", "file:2: score 'inf' is not a finite number"),
    ("trec-run", "q\td\t1\t2\nq\te\t2\t1_0\n", "file:2: score '1_0' is not a number"),
    ("trec-run", "q\td\t1\t2\nq\te\t2\t1e39\n", r"file:2: score 1e\+39 is beyond the range of float32"),
    ("trec-run", "q\td\t2.5\t1\nq\te\t1.5\t2\n", "file:1: rank 2.5; .* the score is 1: do the two columns change"),
    ("trec-run", "q Q0 d 2.5 1 t\n", "file:1: rank 2.5"),
    ("trec-run", b"q\td\t1\t2\nq\t\xff\t2\t1\n", "file:2: cannot be read as UTF-8"),
    ("trec-run", "q\td\t1\t2\nq\td\t2\t3\n", r"file:2: query 'q', document 'd' has score 3, but .*file:1 says 2"),
    ("margin-tsv-ids", "7\t8\t9\t1.5\t2.5\n7\t8\t9\t1.5\t0.5\n", "file:1: neg_pid '2.5' looks like a score"),
    ("margin-tsv-ids", "2.5\t1.5\tq\td\te\n2.5\t1.0\tq\td\te\n", r"file:2: query 'q', document 'e'.*file:1 says 1\.5"),
    ("auto", "q\td\te\t2.5\t1.5\n", "file:1: five columns whose last two are numbers"),
    ("beir-run", '{\n"q": {"d": 1},\n"r": {"d": "x"}}', "file:3: query 'r', document 'd': score 'x' is not a number"),
    ("beir-run", '{\n"q": {"d": NaN}}', "file:2: score nan is not a finite number"),
    ("beir-run", '{"q": {"d": 1}} x', "something follows the object"),
    ("beir-run", '{"q" {"d": 1}}', "expected a colon"),
    ("beir-run", '{"q": {"d": 1}\n"r": {}}', "file:2: .*expected a comma"),
    ("beir-run", '{"q": {"d": 1, "d": 2}}', None),
    ("lightning-ir", "qid,docno,score\nq,d\n", "file:2: found 2 columns, expected 3"),
    ("lightning-ir", "qid,docno,score\nq,d,1,2\n", "file:2: found 4 columns, expected 3"),
    ("sbert-jsonl", '{"qid": 1, "pos": 3, "neg": {}}\n', "file:1: found a int, expected a list"),
    ("tevatron", '{"query_id": 1, "query": 3, "positive_passages": [{"docid": 1, "text": "t", "score": 1}]}\n',
     "file:1: the text of a query is a int"),
    ("rank-permutations", '{"query_id": 1, "document_ids": "[2]"}\n', "file:1: document_ids is a str"),
    ("rank-permutations", "q\td\t-1\n", "file:1: rank -1"),
    ("sbert-pickle", pickle.dumps({1: 2.0}, 4), "holds a number|query 1 holds a"),
    ("sbert-pickle", pickle.dumps({1: {2: float("nan")}}, 4), "query '1' has the score nan"),
    ("sbert-pickle", pickle.dumps({1: {2: "x"}}, 4), "score 'x' is not a number"),
    ("sbert-pickle", pickle.dumps({1: {2: 3.0}}, 4)[:-4], "ends in the middle|readable pickle"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "data", "message"), BROKEN)
def test_a_broken_file_leaves_nothing(tmp_path: Path, format: str, data: bytes | str, message: str | None) -> None:
    if message is None:
        assert imported(tmp_path, data, format=format) == {("q", "d"): 2.0}  # as every JSON reader has it
        return
    with pytest.raises(DataError, match=message):
        imported(tmp_path, data, format=format)
    assert not (tmp_path / "imported").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("end", ["q9\tx\t1\tnan\n", "q0\td0\t1\t99\n"])
def test_a_broken_file_is_taken_out_of_an_older_store(tmp_path: Path, end: str) -> None:
    store_of(tmp_path / "s")
    before = {path: path.read_bytes() for path in (tmp_path / "s" / "parts").iterdir()}
    (tmp_path / "file").write_text("".join(f"n{i}\tm{i}\t1\t{i}.5\n" for i in range(60)) + end)
    with pytest.raises(DataError, match=r"file:61: .*nan|file:61: .*score 99, but .* holds another score"):
        scores.import_file(tmp_path / "file", tmp_path / "s", teacher_name="t")
    assert {path: path.read_bytes() for path in (tmp_path / "s" / "parts").iterdir()} == before
    assert pairs_in(tmp_path / "s") == PAIRS
    assert scores.verify(tmp_path / "s").ok
    (tmp_path / "file").write_text("n0\tm0\t1\t0.5\n")
    scores.import_file(tmp_path / "file", tmp_path / "s", teacher_name="t")
    assert pairs_in(tmp_path / "s") == PAIRS | {("n0", "m0"): 0.5}


@pytest.mark.usefixtures("tiny_blocks")
def test_two_values_far_apart_in_a_file_are_both_named(tmp_path: Path) -> None:
    lines = [f"q\td{i}\t{i}\t{i}" for i in range(40)]
    with pytest.raises(
        ConflictingScoresError, match=r"file:41: query 'q', document 'd3' has score 9, but .*file:4 says"
    ):
        imported(tmp_path, "\n".join([*lines, "q\td3\t41\t9"]))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"qid": ["q"] * 9, "docno": [*"abcdefgh", "b"], "score": np.arange(9.0)}), path)
    with pytest.raises(ConflictingScoresError, match=r"t.parquet: row 8: .* but .*t.parquet: row 1 says 1"):
        scores.import_file(path, tmp_path / "p")


# pickles


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_pickles_of_every_protocol_and_kind_of_number(tmp_path: Path, protocol: int) -> None:
    rng = random.Random(1)
    numbers = [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40, *(rng.randrange(10**7) for _ in range(3000))]
    table = {7: {number: rng.uniform(-9, 9) for number in numbers}, 300: {1: 2.5}, 70000: {}, "x": {"y": 1, "7": 2}}
    table[8] = {numbers[0]: np.float32(0.5)} if protocol == 4 else {3: 0.5}  # numpy's numbers: the other reader
    (tmp_path / "file").write_bytes(pickle.dumps(table, protocol))
    scores.import_file(tmp_path / "file", tmp_path / "s", format="sbert-pickle", dtype="float32")
    want = {(str(q), str(d)): float(np.float32(s)) for q, found in table.items() for d, s in found.items()}
    assert pairs_in(tmp_path / "s") == want


def test_a_written_pickle_is_a_plain_dict(tmp_path: Path) -> None:
    formats.write(tmp_path / "x", "sbert-pickle", store_of(tmp_path / "s"))
    loaded = pickle.loads((tmp_path / "x").read_bytes())  # our own file
    assert {q: dict(found) for q, found in loaded.items()} == LISTS


@pytest.mark.usefixtures("tiny_blocks")
def test_code_in_the_middle_of_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "file").write_bytes(pickle.dumps({**{i: {1: 0.5} for i in range(5000)}, 9999: {2: Evil()}}, 4))
    with pytest.raises(DataError, match=r"file: opcode|the pickle asks for"):
        scores.import_file(tmp_path / "file", tmp_path / "s")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "s").exists()


# margins, language models


@pytest.mark.usefixtures("tiny_blocks")
def test_margins_of_a_query_may_stand_anywhere(tmp_path: Path) -> None:
    """More rows than are held in memory are split by query; the same scores come out."""
    rows = [(f"q{i % 5}", "p", f"n{i}", float(i)) for i in range(200)]
    names = ("query_id", "positive_id", "negative_id", "score")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet", row_group_size=10)
    scores.import_file(tmp_path / "m.parquet", tmp_path / "s", dtype="float32")
    want = {(q, n): -m for q, _, n, m in rows} | {(f"q{i}", "p"): 0.0 for i in range(5)}
    assert pairs_in(tmp_path / "s") == want


def test_answers_of_a_language_model(tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture) -> None:
    folder = real_data / "ranking" / "llm-responses"
    for path in sorted(folder.glob("*.json")):
        with pytest.raises(DataError, match=r"raw answers of a language model.*--candidates RUN"):
            scores.import_file(path, tmp_path / "none")
    runs = real_data / "ranking" / "msmarco-dl19" / "runs"
    line = ["scores", "import", folder / "rankvicuna_dl19_bm25.json", "--out", tmp_path / "s", "--json"]
    assert run([str(part) for part in [*line, "--candidates", runs / "bm25.tsv"]]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["format"], shown["queries"], shown["teacher"]["extra"]) == ("answers", 43, {"score_kind": "rank"})
    store = scores.open(tmp_path / "s")
    _, want = formats.read(runs / "bm25-rankvicuna.tsv", "rank-permutations")
    wanted = dict(zip(zip(want.query_ids.to_pylist(), want.document_ids.to_pylist(), strict=True), want.scores.tolist(),
                      strict=True))  # fmt: skip
    found = pairs_in(tmp_path / "s")
    same = sum(found[pair] == score for pair, score in wanted.items())
    assert same > 0.9 * len(wanted)  # the published run of these answers
    assert len(store) == 4300


def test_ranks_from_zero_or_one_are_the_same_teacher(tmp_path: Path) -> None:
    for name, first in (("zero", 0), ("one", 1)):
        (tmp_path / name).write_text(f"q\ta\t{first}\nq\tb\t{first + 1}\n")
        table = formats.read(tmp_path / name, "rank-permutations")[1]
        assert table.scores.tolist() == [-1.0, -2.0], name


# opening


def test_opening_reads_the_list_of_parts_only_for_new_ones(tmp_path: Path) -> None:
    store_of(tmp_path / "s")
    (manifest,) = (ScoreManifest.read(path) for path in (tmp_path / "s" / "snapshots").glob("*.json"))
    listed = tmp_path / "s" / manifest.parts["path"]
    assert manifest.parts["count"] == 1
    good = listed.read_bytes()
    other = b"1" if good[-2:] == b"0\n" else b"0"  # of a checksum, which may end in either
    listed.write_bytes(good[:-2] + other + b"\n")
    assert pairs_in(tmp_path / "s") == PAIRS
    assert [problem.path for problem in scores.verify(tmp_path / "s").problems] == [manifest.parts["path"]]
    more = [["new"], ["d1"], np.array([1.0])]
    with pytest.raises(DataError, match="its bytes differ from the manifest's checksum"):
        scores.write_pairs(tmp_path / "s", TeacherSpec("t"), *more)
    listed.write_bytes(good)
    assert scores.write_pairs(tmp_path / "s", TeacherSpec("t"), *more).lookup(["new"], ["d1"]) == 1.0
    assert not manifest_path(tmp_path / "s", 2).exists()


def test_json_lines_reach_the_block_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_base, "BLOCK_ROWS", 2)
    path = tmp_path / "f"
    path.write_text("".join(f'["q{i}", ["a", {i}], ["b", 0.5]]\n' for i in range(5)))
    blocks = list(formats_json.read_colbert_examples(path))
    assert [len(block) for block in blocks] == [2] * 5 + [0]
    assert blocks[3].lines.tolist() == [4, 4]
