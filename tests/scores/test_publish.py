"""Publishing: the folder opens without the store, other tools read it, and training from it asks no teacher."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from structkd import scores
from structkd.errors import CorruptFileError, DataError, MissingScoreError, TeacherMismatchError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.scores import StoredScorer, TeacherSpec
from structkd.scores.bundle import plain_integers
from structkd.scores.compaction.compact import compact

SPEC = TeacherSpec("org/teacher", revision="abc")
NODES = TeacherSpec("gcn", kind="rows", weights_sha256="w")


def filled(folder: Path, prefix: str = "", count: int = 2000) -> tuple[list[str], list[str], np.ndarray]:
    rng = np.random.default_rng(0)
    keys = rng.choice(50 * 300, count, replace=False)
    queries = [f"{prefix}{1000 + key // 300}" for key in keys]
    documents = [f"{prefix}{key % 300 * 7919}" for key in keys]
    values = (rng.normal(size=count) * 7).astype(np.float32)
    scores.write_pairs(folder, SPEC, queries, documents, values)
    return queries, documents, values


@pytest.mark.parametrize("prefix", ["", "msmarco_"])
def test_a_published_folder_gives_the_same_scores(tmp_path: Path, prefix: str) -> None:
    queries, documents, _ = filled(tmp_path / "store", prefix)
    store = scores.open(tmp_path / "store")
    manifest = scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC-BY-4.0", citation="Us, 2026")
    copy = scores.open(tmp_path / "out", expect=SPEC, verify="sha256")
    np.testing.assert_array_equal(copy.lookup(queries, documents), store.lookup(queries, documents))
    assert len(copy) == len(store) == manifest.counts["rows"]
    assert sorted(copy.query_ids) == sorted(store.query_ids)
    assert copy.list(queries[0])[0] == store.list(queries[0])[0]
    assert scores.verify(tmp_path / "out").ok
    table = pq.read_table(tmp_path / "out" / "data" / "scores-00000.parquet")
    assert table.column_names == ["query_id", "document_ids", "scores"]
    assert str(table.schema.field("document_ids").type.value_type) == ("string" if prefix else "int64")
    row = table.slice(3, 1).to_pylist()[0]
    want = store.lookup([str(row["query_id"])] * len(row["scores"]), [str(d) for d in row["document_ids"]])
    np.testing.assert_array_equal(np.float32(row["scores"]), want)
    assert row["document_ids"] == sorted(row["document_ids"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-4.0\n")
    assert SPEC.fingerprint in text
    assert "Us, 2026" in text


def test_the_encodings_that_keep_it_small_and_readable(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC0-1.0")
    group = pq.ParquetFile(tmp_path / "out" / "data" / "scores-00000.parquet").metadata.row_group(0)
    found = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert found["scores.list.element"].encodings[-1] == "BYTE_STREAM_SPLIT"
    assert found["scores.list.element"].physical_type == "FLOAT"  # DuckDB cannot read split half floats
    assert found["document_ids.list.element"].encodings[-1] == "DELTA_BINARY_PACKED"
    assert {column.compression for column in found.values()} == {"ZSTD"}


def test_students_train_from_it_with_the_texts_the_teacher_read(tmp_path: Path) -> None:
    texts = (["what", "what", "who"], ["body one", "body two", "body one"])
    scores.write_pairs(tmp_path / "s", SPEC, ["q1", "q1", "q2"], ["a", "b", "a"], np.array([3.0, 1.0, 2.0]), *texts)
    scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    teacher = StoredScorer(scores.open(tmp_path / "p"))
    queries, documents = Texts(Ids(["q2", "q1"]), ["who", "what"]), Texts(Ids(["b", "a"]), ["body two", "body one"])
    pairs = Pairs(queries, documents, np.array([0, 1, 1]), np.array([1, 0, 1]))
    assert teacher.score(pairs).tolist() == [2.0, 1.0, 3.0]
    changed = Pairs(queries, Texts(documents.ids, ["body two", "edited"]), np.array([0]), np.array([1]))
    with pytest.raises(MissingScoreError, match="under another text"):
        teacher.score(changed)


def test_node_logits_are_published_exactly(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    scores.write_nodes(tmp_path / "s", NODES, logits, "graph-1")
    scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    copy = scores.open(tmp_path / "p", expect=NODES)
    np.testing.assert_array_equal(copy.logits, logits)
    assert copy.graph_fingerprint == "graph-1"
    assert scores.verify(tmp_path / "p").ok
    scores.publish(tmp_path / "p", to=tmp_path / "again", license="CC0-1.0")
    np.testing.assert_array_equal(scores.open(tmp_path / "again").logits, logits)


def test_publishing_again(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    first = scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC0-1.0")
    assert scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC0-1.0") == first
    with pytest.raises(DataError, match="holds something else"):
        scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC-BY-4.0")
    scores.write_pairs(tmp_path / "store", SPEC, ["new"], ["1"], np.array([1.0]))
    with pytest.raises(DataError, match="holds something else"):
        scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC0-1.0")
    with pytest.raises(UsageError, match="licence is empty"):
        scores.publish(tmp_path / "store", to=tmp_path / "x", license=" ")
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    scores.publish(tmp_path / "store", to=tmp_path / "empty", license="CC0-1.0")
    assert scores.verify(tmp_path / "empty").ok


def test_a_failed_publication_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    filled(tmp_path / "store")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["structkd.scores.publish"], "write_json", full)
    with pytest.raises(OSError, match="No space"):
        scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC0-1.0")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_old_texts_are_not_published(tmp_path: Path) -> None:
    for text, value in (("old", 1.0), ("new", 2.0)):
        scores.write_pairs(tmp_path / "s", SPEC, ["q"], ["d"], np.array([value]), ["query"], [text])
    scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    copy = scores.open(tmp_path / "p")
    assert len(copy) == 1
    assert copy.lookup(["q"], ["d"]) == 2.0


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["7", "10", "0"], [7, 10, 0]),
        (["7", "007"], None),
        (["7", "-1"], None),
        (["7", "7a"], None),
        (["7", "٣"], None),
        (["7", ""], None),
        (["9" * 18], [10**18 - 1]),
        (["9" * 19], None),
        ([], []),
    ],
)
def test_ids_are_numbers_only_when_they_come_back(ids: list[str], numbers: list[int] | None) -> None:
    found = plain_integers(ids)
    assert (None if found is None else found.tolist()) == numbers
    assert found is None or [str(number) for number in found] == ids


def test_an_empty_store_is_published_and_opened(tmp_path: Path) -> None:
    scores.write_pairs(tmp_path / "s", SPEC, [], [], np.empty(0))
    scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    assert len(scores.open(tmp_path / "p")) == 0
    assert scores.verify(tmp_path / "p").ok


# nodes


def test_node_scores_keep_the_logits_as_written(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32) * 1e5
    store = scores.write_nodes(tmp_path, NODES, logits, "graph-1")
    np.testing.assert_array_equal(store.logits, logits)
    assert not store.logits.flags.writeable
    rows = np.random.default_rng(1).integers(0, 1000, 64)
    np.testing.assert_array_equal(store.take(rows), logits[rows])
    for bad in ([-1], [1000]):
        with pytest.raises(MissingScoreError, match=r"1 missing, for example -?\d+. Is it another graph"):
            store.take(np.array(bad))
    store.require_graph("graph-1")
    with pytest.raises(TeacherMismatchError, match="graph_fingerprint: found 'graph-1', expected 'graph-2'"):
        store.require_graph("graph-2")
    with pytest.raises(TeacherMismatchError, match="graph_fingerprint"):
        scores.write_nodes(tmp_path, NODES, logits, "graph-2")
    with pytest.raises(TeacherMismatchError, match="num_nodes"):
        scores.write_nodes(tmp_path, NODES, logits[:-1], "graph-1")
    with pytest.raises(DataError, match="stored before with other logits"):
        scores.write_nodes(tmp_path, NODES, logits + 1, "graph-1")
    assert len(scores.write_nodes(tmp_path, NODES, logits, "graph-1")) == 1000


def test_node_blocks_and_half_floats(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    scores.write_nodes(tmp_path, NODES, logits, "g")
    manifest = compact(tmp_path, dtype="float16", max_rows=300)
    assert [(entry["lo"], entry["hi"]) for entry in manifest.files] == [(0, 300), (300, 600), (600, 900), (900, 1000)]
    store = scores.open(tmp_path)
    rounded = logits.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(store.logits, rounded)
    rows = np.random.default_rng(1).integers(0, 1000, 500)
    np.testing.assert_array_equal(store.take(rows), rounded[rows])
    buffer = np.empty((500, 7), dtype=np.float32)
    assert store.take(rows, buffer) is buffer
    np.testing.assert_array_equal(buffer, rounded[rows])
    with pytest.raises(DataError, match=r"out has shape \(500, 7\).*expected float32 \(499, 7\)"):
        store.take(rows[1:], buffer)
    with pytest.raises(DataError, match="float16 ends at 65504"):
        scores.write_nodes(tmp_path / "big", NODES, logits * 1e6, "g", dtype="float16")


def test_every_finite_half_float_widens_exactly() -> None:
    from structkd.scores.layout._lookup import gather_rows

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 31)  # zeros, denormals, both signs
    rows = np.random.default_rng(0).permutation(len(halves))
    out = np.full(halves.shape, np.nan, dtype=np.float32)
    gather_rows(halves, rows, out)
    np.testing.assert_array_equal(out.view(np.uint32), halves[rows].astype(np.float32).view(np.uint32))


def test_safetensors_reads_the_blocks_and_they_are_aligned(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    logits = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    scores.write_nodes(tmp_path, NODES, logits, "g")
    (path,) = (tmp_path / "data").iterdir()
    np.testing.assert_array_equal(load_file(path)["logits"], logits)
    assert path.read_bytes().index(logits.tobytes()) % 64 == 0
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptFileError, match="the manifest says"):
        scores.open(tmp_path)
    with pytest.raises(CorruptFileError, match="not a readable safetensors"):
        scores.open(tmp_path, verify="off")


def test_node_ranges_are_planned_and_missing_ones_named(tmp_path: Path) -> None:
    from structkd.scores.layout.log import RowLog

    logits = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    log = RowLog.open(tmp_path, NODES, "g", 100, 3)
    plan = log.plan(30)
    assert plan == [(0, 30), (30, 60), (60, 90), (90, 100)]
    for low, high in log.pending(plan, (1, 2)):
        assert log.commit(low, logits[low:high])
    assert not log.commit(30, logits[30:60])
    assert log.pending(plan) == [(0, 30), (60, 90)]
    assert log.missing() == [(0, 30), (60, 90)]
    with pytest.raises(MissingScoreError, match="of 100 nodes: 60 missing, for example 0-29, 60-89"):
        scores.open(tmp_path)
    with pytest.raises(DataError, match="60 of 100 nodes have no logits yet"):
        compact(tmp_path)
    for low, high in log.pending(plan):
        log.commit(low, logits[low:high])
    np.testing.assert_array_equal(scores.open(tmp_path).logits, logits)  # uncompacted
    bad = logits[:30].copy()
    bad[4, 1] = np.inf
    with pytest.raises(DataError, match="1 nodes have logits that are no finite numbers, for example nodes 4"):
        log.commit(0, bad)
    with pytest.raises(DataError, match=r"shape \(30, 2\)"):
        log.commit(0, logits[:30, :2])
    with pytest.raises(DataError, match="holds 100 nodes x 3 classes"):
        log.commit(90, logits[:30])
    assert log.commit(0, logits[:10] + 1)  # another range, other values
    with pytest.raises(DataError, match="scored twice with different logits"):
        compact(tmp_path)


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no node logits"):
        scores.write_nodes(tmp_path, SPEC, np.zeros((2, 2)), "g")
    with pytest.raises(DataError, match="no pair scores"):
        scores.write_pairs(tmp_path, NODES, ["q"], ["d"], np.zeros(1))
    with pytest.raises(DataError, match=r"expected \[nodes, classes\]"):
        scores.write_nodes(tmp_path, NODES, np.zeros(3), "g")


# what others read


def test_duckdb_polars_and_datasets_read_the_parquet(tmp_path: Path) -> None:
    queries, documents, _ = filled(tmp_path / "store")
    scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC0-1.0")
    store = scores.open(tmp_path / "store")
    want = dict(zip(zip(queries, documents, strict=True), store.lookup(queries, documents).tolist(), strict=True))
    pattern = str(tmp_path / "out" / "data" / "*.parquet")
    read = 0
    for tool in ("duckdb", "polars", "datasets"):
        try:
            rows = TOOLS[tool](pattern, tmp_path)
        except ImportError:
            continue
        found = {(str(q), str(d)): s for q, ds, ss in rows for d, s in zip(ds, ss, strict=True)}
        assert found == want, tool
        read += 1
    if not read:
        pytest.skip("none of duckdb, polars, datasets is installed")


def _duckdb(pattern: str, _: Path) -> list:
    import duckdb

    return duckdb.sql(f"select query_id, document_ids, scores from '{pattern}'").fetchall()


def _polars(pattern: str, _: Path) -> list:
    import polars

    return polars.read_parquet(pattern).select("query_id", "document_ids", "scores").rows()


def _datasets(pattern: str, cache: Path) -> list:
    import datasets

    table = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(cache / "hf"))
    return [(row["query_id"], row["document_ids"], row["scores"]) for row in table]


TOOLS = {"duckdb": _duckdb, "polars": _polars, "datasets": _datasets}


def test_the_card_says_what_a_reader_needs(tmp_path: Path) -> None:
    import yaml

    spec = TeacherSpec("org/teacher", revision="abc", prompt="rank: {q}", truncation="longest_first", max_length=512)
    scores.write_pairs(tmp_path / "s", spec, ["q", "q"], ["a", "b"], np.array([1.0, 2.5]))
    manifest = scores.publish(
        tmp_path / "s", to=tmp_path / "p", license="CC-BY-4.0", citation="Us, 2026", title="It's ours: v1"
    )
    text = (tmp_path / "p" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["license"] == "cc-by-4.0"
    assert fields["pretty_name"] == "Teacher scores: It's ours: v1"
    assert fields["task_categories"] == ["text-ranking"]
    assert fields["size_categories"] == ["n<1K"]
    assert fields["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    for said in (
        "| model | `org/teacher` |", "| revision | `abc` |", "| prompt | `rank: {q}` |",
        "| truncation | `longest_first` |", "| head | `not stated` |", "2 scores of (query, document) pairs, 1 queries",
        "| mean | 1.75 |", "| margin mean |",
        f"{manifest.quant_error['rms']:.3g} root mean square", "CC-BY-4.0", "Us, 2026", "structkd scores verify",
        "structkd ranking distill", manifest.teacher_fp,
    ):  # fmt: skip
        assert said in body, said


@pytest.mark.filterwarnings("ignore")
def test_croissant_metadata(tmp_path: Path) -> None:
    import json

    from structkd.files import sha256_file

    filled(tmp_path / "store", "d")
    scores.publish(tmp_path / "store", to=tmp_path / "out", license="CC-BY-4.0", citation="Us, 2026")
    path = tmp_path / "out" / "croissant.json"
    value = json.loads(path.read_text())
    assert value["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    named = {entry["contentUrl"]: entry["sha256"] for entry in value["distribution"]}
    files = [*(tmp_path / "out").rglob("*.parquet")]
    assert named == {file.relative_to(tmp_path / "out").as_posix(): sha256_file(file) for file in files}
    (records,) = value["recordSet"]
    assert [field["name"] for field in records["field"]] == ["query_id", "document_ids", "scores"]
    mlcroissant = pytest.importorskip("mlcroissant", reason="validates the metadata")
    dataset = mlcroissant.Dataset(jsonld=path)
    assert not dataset.metadata.ctx.issues.errors


def test_4_6_bytes_a_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    step = 2_200
    documents = (np.tile(np.arange(100) * step, 2_000) + rng.integers(0, step, 200_000)).astype(str).tolist()
    queries = np.repeat(np.arange(2_000), 100).astype(str).tolist()
    scores.write_pairs(tmp_path / "s", SPEC, queries, documents, rng.normal(0, 7, 200_000))
    manifest = scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    data = sum(entry["bytes"] for entry in manifest.files if entry["path"].startswith("data/"))
    assert data / 200_000 <= 4.6


# the largest logits


def test_the_largest_logits_of_each_node(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(200, 40)) * 3).astype(np.float32)
    scores.write_nodes(tmp_path / "s", NODES, logits, "graph-1")
    scores.publish(tmp_path / "s", to=tmp_path / "all", license="CC0-1.0")
    manifest = scores.publish(tmp_path / "s", to=tmp_path / "top", license="CC0-1.0", top=8)
    copy = scores.open(tmp_path / "top", expect=NODES, verify="sha256")
    assert copy.logits.shape == logits.shape
    assert scores.verify(tmp_path / "top").ok

    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    ours, true = softmax(copy.logits), softmax(logits)
    best = np.argsort(-logits, axis=1)[:, :8]
    np.testing.assert_allclose(np.take_along_axis(ours, best, 1), np.take_along_axis(true, best, 1), rtol=2e-2)
    np.testing.assert_array_equal(copy.logits.argmax(1), logits.argmax(1))
    rest = 1 - np.take_along_axis(true, best, 1).sum(1)
    np.testing.assert_allclose(1 - np.take_along_axis(ours, best, 1).sum(1), rest, rtol=2e-2, atol=1e-3)
    data = sum(entry["bytes"] for entry in manifest.files if entry["path"].startswith("data/"))
    assert data / 200 < 8 * 4 + 4 + 2
    assert "topk_idx" in (tmp_path / "top" / "README.md").read_text()
    for top, message in ((40, "expected 1 to 39"), (0, "expected 1 to 39")):
        with pytest.raises(UsageError, match=message):
            scores.publish(tmp_path / "s", to=tmp_path / "x", license="CC0-1.0", top=top)
    filled(tmp_path / "pairs")
    with pytest.raises(UsageError, match="top is for node logits"):
        scores.publish(tmp_path / "pairs", to=tmp_path / "x", license="CC0-1.0", top=3)
    path = tmp_path / "top" / "data" / "topk-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match="not a file of the largest logits"):
        scores.open(tmp_path / "top", verify="off")
