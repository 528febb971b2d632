"""Stores of pairs: identity, lookups against a slow dict, conflicts, precision, reopening, merging."""

import itertools
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import scores
from structkd.errors import (
    ConflictingScoresError,
    CorruptFileError,
    DataError,
    MissingScoreError,
    TeacherMismatchError,
    UsageError,
)
from structkd.files import write_json
from structkd.ids import Ids, Pairs, Texts
from structkd.scores import CachedScorer, PairScores, StoredScorer, TeacherSpec
from structkd.scores.compaction.compact import compact
from structkd.scores.layout._lookup import find_numba, find_numpy
from structkd.scores.layout.document_rows import PackedRows
from structkd.scores.layout.log import PairLog, Unit
from structkd.scores.layout.parts import split_keys
from structkd.scores.layout.shards import Shards
from structkd.scores.layout.snapshot import Csr, latest, map_csr, write_csr
from structkd.scores.manifest import ScoreManifest, sealed

SPEC = TeacherSpec("teacher", revision="abc", max_length=512)


def random_pairs(count: int, queries: int = 40, documents: int = 200, seed: int = 0):
    """Distinct pairs in random order, with scores, as lists and as the slow dict."""
    rng = np.random.default_rng(seed)
    keys = rng.choice(queries * documents, size=count, replace=False)
    query_ids = [f"q{key // documents}" for key in keys]
    document_ids = [f"d{key % documents}" for key in keys]
    values = (rng.normal(size=count) * 7).astype(np.float32)
    slow = {(q, d): s for q, d, s in zip(query_ids, document_ids, values.tolist(), strict=True)}
    return query_ids, document_ids, values, slow


def pairs_of(queries: dict[str, str], documents: dict[str, str], wanted: list[tuple[str, str]]) -> Pairs:
    q, d = Texts(Ids(queries), list(queries.values())), Texts(Ids(documents), list(documents.values()))
    return Pairs(q, d, q.ids.find(x for x, _ in wanted), d.ids.find(y for _, y in wanted))


class Lengths:
    """A teacher that counts; its score depends on both texts."""

    def __init__(self, spec: TeacherSpec = SPEC) -> None:
        self.spec, self.calls = spec, 0

    def score(self, pairs: Pairs) -> torch.Tensor:
        self.calls += len(pairs)
        return torch.tensor(
            [len(q) * 100.0 + len(d) for q, d in zip(pairs.query_texts, pairs.document_texts, strict=True)]
        )


class Raises(Lengths):
    def score(self, pairs: Pairs) -> torch.Tensor:
        raise AssertionError(f"the teacher was asked for {len(pairs)} pairs")


# identity


def test_fingerprint_is_the_hash_of_canonical_json() -> None:
    import hashlib

    text = b'{"code_version":"1","dtype":"float32","kind":"pairs","max_length":512,"model":"teacher","revision":"abc"}'
    assert SPEC.fingerprint == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "x"},
        {"revision": "x"},
        {"weights_sha256": "x"},
        {"tokenizer_sha256": "x"},
        {"max_length": 256},
        {"truncation": "left"},
        {"prompt": "query: "},
        {"head": "sigmoid"},
        {"dtype": "bfloat16"},
        {"code_version": "2"},
        {"extra": {"adapter": "x"}},
    ],
)
def test_every_field_changes_the_fingerprint_and_is_named_when_refused(tmp_path: Path, change: dict) -> None:
    other = TeacherSpec(**{**SPEC.fields(), **change})
    assert other.fingerprint != SPEC.fingerprint
    scores.write_pairs(tmp_path, SPEC, ["q"], ["d"], np.array([1.0]))
    name = "extra.adapter" if "extra" in change else next(iter(change))
    with pytest.raises(TeacherMismatchError, match=name) as caught:
        scores.open(tmp_path, expect=other)
    assert list(caught.value.fields) == [name]
    with pytest.raises(TeacherMismatchError, match=name):
        scores.write_pairs(tmp_path, other, ["q"], ["d"], np.array([1.0]))
    with pytest.raises(TeacherMismatchError, match=name):
        CachedScorer(Lengths(other), tmp_path)


def test_spec_refuses_what_has_no_identity() -> None:
    with pytest.raises(UsageError, match="model is empty"):
        TeacherSpec("")
    with pytest.raises(UsageError, match="JSON values"):
        TeacherSpec("m", extra={"f": print})
    with pytest.raises(UsageError, match="JSON values"):
        TeacherSpec("m", extra={"x": float("nan")})


# lookups


@pytest.mark.parametrize("compacted", [True, False, "half"])
def test_lookup_equals_a_dict(tmp_path: Path, compacted: bool | str) -> None:
    queries, documents, values, slow = random_pairs(3000)
    log = PairLog.open(tmp_path, SPEC)
    rows = [log.queries.extend(queries, [None] * 3000), log.documents.extend(documents, [None] * 3000)]
    for start in range(0, 3000, 500):
        if compacted == "half" and start == 1500:
            compact(tmp_path, dtype="float32")
        part = slice(start, start + 500)
        unit = log.unit(rows[0][part], rows[1][part])
        order = np.lexsort((rows[1][part], rows[0][part]))
        assert log.commit(unit, values[part][order])
    if compacted is True:
        compact(tmp_path, dtype="float32")
    store = scores.open(tmp_path, expect=SPEC)
    assert len(store) == 3000
    rng = np.random.default_rng(1)
    asked = [(f"q{rng.integers(45)}", f"d{rng.integers(210)}") for _ in range(5000)]
    want = np.array([slow.get(pair, np.nan) for pair in asked], dtype=np.float32)
    got = store.lookup([q for q, _ in asked], [d for _, d in asked], missing="nan")
    np.testing.assert_array_equal(got, want)
    assert np.isnan(want).any()
    assert got.dtype == np.float32
    positions = store.positions(queries, documents)
    assert sorted(positions) == list(range(3000))
    np.testing.assert_array_equal(store.take(positions), values)
    flat = store.pairs()
    assert dict(zip(zip(flat[0], flat[1], strict=True), flat[2].tolist(), strict=True)) == slow
    for query in store.query_ids:
        ids, listed = store.list(query)
        mine = sorted(((-s, d) for (q, d), s in slow.items() if q == query))
        assert ids == [d for _, d in mine]
        np.testing.assert_array_equal(listed, np.array([-s for s, _ in mine], dtype=np.float32))


def test_lookup_keeps_the_shape(tmp_path: Path) -> None:
    store = scores.write_pairs(tmp_path, SPEC, ["a", "a", "b", "b"], ["1", "2", "1", "2"], np.arange(4.0))
    np.testing.assert_array_equal(store.lookup([["a", "b"], ["a", "b"]], [["1", "1"], ["2", "2"]]), [[0, 2], [1, 3]])
    assert store.lookup([], []).shape == (0,)
    with pytest.raises(DataError, match=r"shape \(2,\), document ids of shape \(1,\)"):
        store.lookup(["a", "b"], ["1"])


def test_missing_pairs_are_counted_and_shown(tmp_path: Path) -> None:
    store = scores.write_pairs(tmp_path, SPEC, ["a"], ["1"], np.array([1.0]))
    with pytest.raises(
        MissingScoreError, match=r"of 5 pairs: 4 missing, for example .*'a', '2'.*'b', '1'.*'c', '9'"
    ) as e:
        store.lookup(["a", "a", "b", "c", "d"], ["1", "2", "1", "9", "9"])
    assert e.value.count == 4
    assert e.value.examples == (("a", "2"), ("b", "1"), ("c", "9"))
    with pytest.raises(MissingScoreError, match="lists of queries"):
        store.list("nope")
    for bad in ([-1], [1]):
        with pytest.raises(DataError, match="outside"):
            store.take(np.array(bad))


@pytest.mark.parametrize("seed", range(5))
def test_both_kernels_equal_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 6, size=7)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    documents = np.concatenate([np.sort(rng.choice(9, size, replace=False)) for size in sizes]).astype(np.uint32)
    slots = np.array([0, -1, 1, 2, 3, 4, 5, 6, -1], dtype=np.int32)
    queries, wanted = rng.integers(-2, 12, 400), rng.integers(-2, 12, 400)
    slow = np.full(400, -1)
    for i, (q, d) in enumerate(zip(queries, wanted, strict=True)):
        if 0 <= q < len(slots) and slots[q] >= 0:
            for at in range(offsets[slots[q]], offsets[slots[q] + 1]):
                if documents[at] == d:
                    slow[i] = 100 + at
    packed = PackedRows.of(documents)
    assert isinstance(packed, PackedRows)
    for find, rows in itertools.product((find_numba, find_numpy), (documents, packed)):
        out = np.full(400, -1, dtype=np.int64)
        find(slots, offsets, rows, queries, wanted, 100, out)
        np.testing.assert_array_equal(out, slow)
    empty = np.full(3, -1, dtype=np.int64)
    for find in (find_numba, find_numpy):
        none = np.empty(0, np.uint32)
        find(np.empty(0, np.int32), np.zeros(1, np.int32), none, np.arange(3), np.arange(3), 0, empty)
        assert (empty == -1).all()


@pytest.mark.parametrize("largest", [0, 0xFFFF, 0x10000, (1 << 24) - 1, 1 << 24, (1 << 32) - 1])
def test_document_rows_take_three_bytes_where_they_fit(tmp_path: Path, largest: int) -> None:
    """And four beside, in one file; each is found and read back."""
    documents = np.unique(np.array([0, 5, 0x0100FF, largest, max(0, largest - 1)], dtype=np.uint32))
    documents = documents[documents <= largest]
    size = len(documents)
    offsets = np.array([0, size], dtype=np.int32)
    like = Csr(np.array([3], np.uint32), offsets, documents, np.arange(size, dtype=np.float16))
    csr = map_csr(write_csr(tmp_path, "csr-00000", like))
    assert isinstance(csr.documents, PackedRows) == (largest < 1 << 24)
    np.testing.assert_array_equal(csr.documents[:], documents)
    shards = Shards([csr])
    wanted = documents.astype(np.int64)
    np.testing.assert_array_equal(shards.positions(np.full(size, 3), wanted), np.arange(size))
    absent = np.setdiff1d(np.array([1, 0x0000FF, 0x010005]), wanted)
    assert (shards.positions(np.full(len(absent), 3), absent) == -1).all()
    np.testing.assert_array_equal(shards.list_rows(3)[0], documents)


def test_a_worker_gets_the_files_and_not_the_arrays(tmp_path: Path) -> None:
    queries, documents, values, _ = random_pairs(3000)
    store = scores.write_pairs(tmp_path, SPEC, queries, documents, values)
    assert len(pickle.dumps(store)) < 1000
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(store)).lookup(queries, documents), store.lookup(queries, documents)
    )


# precision


def test_float16_where_it_is_enough_and_float32_where_it_is_not(tmp_path: Path) -> None:
    queries, documents, values, _ = random_pairs(3000)
    store = scores.write_pairs(tmp_path / "logits", SPEC, queries, documents, values)
    assert store.dtype == "float16"
    got = store.lookup(queries, documents)
    np.testing.assert_array_equal(got, values.astype(np.float16).astype(np.float32))
    error = np.abs(values.astype(np.float64) - got)
    assert store.manifest.quant_error == pytest.approx({"max": error.max(), "rms": np.sqrt((error**2).mean())})
    for name, scaled, why in (
        ("splade", values * 1e5 + 2e6, "float16 ends at 65504"),
        ("dot", values / 7 + 100, "noise"),
    ):
        store = scores.write_pairs(tmp_path / name, SPEC, queries, documents, scaled)
        assert store.dtype == "float32"
        np.testing.assert_array_equal(store.lookup(queries, documents), scaled.astype(np.float32))
        assert why in store.manifest.notes[0]
    with pytest.raises(DataError, match="float16 ends at 65504"):
        compact(tmp_path / "splade", dtype="float16")
    assert compact(tmp_path / "dot", dtype="float16").dtype == "float16"
    assert compact(tmp_path / "dot", dtype="float32").snapshot == 2


@pytest.mark.parametrize("file_rows", [400, 1000])  # a sorted piece a file, and pieces spooled into one file
def test_files_split_by_query_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_rows: int) -> None:
    from structkd.scores.compaction import pairs as compact_pairs

    queries, documents, values, slow = random_pairs(3000)
    scores.write_pairs(tmp_path, SPEC, queries, documents, values)
    log = PairLog.open(tmp_path, SPEC)
    more = log.queries.extend(["late"], [None]), log.documents.extend(["d1"], [None])
    log.commit(log.unit(*more), np.array([0.5]))
    monkeypatch.setattr(compact_pairs, "FILE_ROWS", file_rows)
    manifest = compact(tmp_path, dtype="float32", max_rows=400)
    assert len(manifest.files) > 3000 // file_rows
    assert max(entry["rows"] for entry in manifest.files) <= file_rows
    assert not list(tmp_path.rglob(".tmp-*"))
    bounds = [(entry["lo"], entry["hi"]) for entry in manifest.files]
    assert all(low[1] <= high[0] for low, high in pairwise(bounds))
    store = PairScores.open(tmp_path)
    want = np.array([slow[pair] for pair in zip(queries, documents, strict=True)], dtype=np.float32)
    np.testing.assert_array_equal(store.lookup(queries, documents), want)
    assert store.lookup(["late"], ["d1"]) == 0.5
    csr = map_csr(tmp_path / manifest.files[0]["path"])
    for start, end in zip(csr.offsets[:-1], csr.offsets[1:], strict=True):
        assert (np.diff(csr.documents[start:end].astype(int)) > 0).all()


def test_arrow_reads_the_snapshot_without_us(tmp_path: Path) -> None:
    import pyarrow as pa

    scores.write_pairs(tmp_path, SPEC, ["a", "a", "b"], ["2", "1", "1"], np.array([1.0, 2.0, 3.0]), dtype="float16")
    (path,) = (tmp_path / "data").glob("*.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.schema.names == ["q", "doc", "doc_high", "score"]
    types = [pa.uint32(), pa.list_(pa.uint16()), pa.list_(pa.uint8()), pa.list_(pa.float16())]
    assert table.schema.types == types
    assert table.to_pydict() == {
        "q": [0, 1], "doc": [[0, 1], [1]], "doc_high": [[0, 0], [0]], "score": [[1.0, 2.0], [3.0]]
    }  # fmt: skip


def test_few_new_parts_become_a_file_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    keys = rng.permutation(40 * 100)[:3000]
    queries, documents = [f"q{key // 100}" for key in keys], [f"d{key % 100}" for key in keys]
    values = rng.normal(size=3000) * 5
    for folder in ("grown", "whole"):
        scores.write_pairs(tmp_path / folder, SPEC, queries[:2000], documents[:2000], values[:2000])
    for low, high in ((2000, 2400), (2350, 3000)):  # the overlap is scored twice, with equal scores
        log = PairLog.open(tmp_path / "grown", SPEC)
        rows = log.queries.extend(queries[low:high], [None] * (high - low))
        unit = log.unit(rows, log.documents.extend(documents[low:high], [None] * (high - low)))
        place = {(q, d): v for q, d, v in zip(queries, documents, values, strict=True)}
        names = [(log.queries.ids[q], log.documents.ids[d]) for q, d in zip(*unit_rows(unit), strict=True)]
        log.commit(unit, np.array([place[name] for name in names]))
        manifest = compact(tmp_path / "grown")
    scores.write_pairs(tmp_path / "whole", SPEC, queries, documents, values)
    whole = compact(tmp_path / "whole", full=True)
    assert len(manifest.files) == 3
    assert manifest.files[0] == ScoreManifest.read(tmp_path / "grown" / "snapshots" / "00000000.json").files[0]
    assert (manifest.counts["rows"], manifest.counts["queries"]) == (3000, 40)
    assert manifest.counts["duplicates_dropped"] == 50
    grown, store = scores.open(tmp_path / "grown"), scores.open(tmp_path / "whole")
    np.testing.assert_array_equal(grown.lookup(queries, documents), store.lookup(queries, documents))
    assert grown.list("q7")[0] == store.list("q7")[0]
    for name in ("min", "max", "mean", "std"):
        assert manifest.stats[name] == pytest.approx(whole.stats[name], rel=1e-3)
    assert manifest.stats["margin"]["mean"] == pytest.approx(whole.stats["margin"]["mean"], rel=1e-3)
    assert manifest.quant_error["rms"] == pytest.approx(whole.quant_error["rms"], rel=1e-2)
    assert scores.verify(tmp_path / "grown").ok
    merged = compact(tmp_path / "grown", full=True)
    assert len(merged.files) == 1
    assert merged.counts["rows"] == 3000
    again = scores.open(tmp_path / "grown")
    np.testing.assert_array_equal(again.lookup(queries, documents), store.lookup(queries, documents))


def unit_rows(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    return unit.query_rows, unit.document_rows


# conflicts


def two_parts(folder: Path, first: float, second: float, spec: TeacherSpec = SPEC) -> list[str]:
    """One pair in two units; returns the units' names sorted."""
    log = PairLog.open(folder, spec)
    q, d = log.queries.extend(["q"], [None]), log.documents.extend(["d", "e", "f"], [None] * 3)
    units = [log.unit(np.repeat(q, 2), d[[0, other]]) for other in (1, 2)]
    for unit, value in zip(units, (first, second), strict=True):
        assert log.commit(unit, np.array([value, 9.0]))
    return [unit.name for unit in units]


def test_two_values_for_one_pair(tmp_path: Path) -> None:
    names = two_parts(tmp_path, 1.0, 2.0)
    for call in (compact, scores.open):
        with pytest.raises(ConflictingScoresError, match=r"'q', 'd'"):
            call(tmp_path)
    assert compact(tmp_path, on_conflict="mean").counts["duplicates_dropped"] == 1
    assert scores.open(tmp_path).lookup(["q"], ["d"]) == 1.5
    other = tmp_path / "first"
    two_parts(other, 1.0, 2.0)
    compact(other, on_conflict="first")
    assert scores.open(other).lookup(["q"], ["d"]) == (1.0 if names[0] < names[1] else 2.0)


def test_tolerance_follows_the_compute_dtype(tmp_path: Path) -> None:
    two_parts(tmp_path / "same", 10.0, 10.0005)
    compact(tmp_path / "same")
    two_parts(tmp_path / "float32", 10.0, 10.0625)
    with pytest.raises(ConflictingScoresError, match="not deterministic"):
        compact(tmp_path / "float32")
    two_parts(tmp_path / "bf16", 10.0, 10.0625, TeacherSpec("t", dtype="bfloat16"))
    compact(tmp_path / "bf16")
    with pytest.raises(ConflictingScoresError, match=r"largest difference 0\.0625"):
        compact(tmp_path / "float32", tol=0.05)
    compact(tmp_path / "float32", tol=0.07)


def test_a_newer_part_that_contradicts_the_snapshot(tmp_path: Path) -> None:
    scores.write_pairs(tmp_path, SPEC, ["q", "q"], ["d", "x"], np.array([1.0, 5.0]))
    log = PairLog.open(tmp_path, SPEC)
    unit = log.unit(log.queries.find(["q", "q"]), log.documents.find(["d", "x"])[::-1].copy())
    assert not log.commit(unit, np.array([1.0, 5.0]))  # the same pairs are the same unit
    unit = log.unit(log.queries.find(["q"]), log.documents.find(["d"]))
    assert log.commit(unit, np.array([4.0]))
    with pytest.raises(ConflictingScoresError, match="than in the snapshot, for example"):
        scores.open(tmp_path)


def test_writing_again(tmp_path: Path) -> None:
    queries, documents, values, _ = random_pairs(500)
    scores.write_pairs(tmp_path, SPEC, queries, documents, values)
    assert len(scores.write_pairs(tmp_path, SPEC, queries, documents, values)) == 500
    assert latest(tmp_path).snapshot == 0  # nothing new, no new snapshot
    with pytest.raises(ConflictingScoresError, match="stored before with another score"):
        scores.write_pairs(tmp_path, SPEC, queries, documents, values + 1)
    store = scores.write_pairs(tmp_path, SPEC, ["new"], ["d0"], np.array([3.0]))
    assert len(store) == 501
    assert latest(tmp_path).snapshot == 1
    assert latest(tmp_path).parent == 0
    with pytest.raises(ConflictingScoresError, match="repeated pairs differ"):
        scores.write_pairs(tmp_path / "x", SPEC, ["q", "q"], ["d", "d"], np.array([1.0, 2.0]))
    assert len(scores.write_pairs(tmp_path / "y", SPEC, ["q", "q"], ["d", "d"], np.array([1.0, 1.0]))) == 1


def test_not_a_number_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 scores that are no finite numbers, for example \('q', 'e'\)"):
        scores.write_pairs(tmp_path, SPEC, ["q", "q"], ["d", "e"], np.array([1.0, np.nan]))
    assert list(tmp_path.rglob("parts/*")) == []
    with pytest.raises(DataError, match="shape"):
        scores.write_pairs(tmp_path, SPEC, ["q"], ["d"], np.array([1.0, 2.0]))
    with pytest.raises(DataError, match="2 document_ids"):
        scores.write_pairs(tmp_path, SPEC, ["q"], ["d", "e"], np.array([1.0]))
    with pytest.raises(DataError, match="non-empty string"):
        scores.write_pairs(tmp_path, SPEC, [""], ["d"], np.array([1.0]))


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no cache\.json there"):
        scores.open(tmp_path)
    write_json(tmp_path / "cache.json", {"format": "other"})
    with pytest.raises(DataError, match="not a file of structkd scores"):
        scores.open(tmp_path)
    write_json(tmp_path / "cache.json", {"format": "structkd-scores", "version": 2})
    with pytest.raises(DataError, match="Update structkd"):
        scores.open(tmp_path)
    write_json(tmp_path / "cache.json", {"format": "structkd-scores", "version": 1, "json_sha256": "0"})
    with pytest.raises(CorruptFileError, match="differs from its own checksum"):
        scores.open(tmp_path)
    forged = {"format": "structkd-scores", "version": 1, "teacher": SPEC.fields(), "teacher_fp": "0" * 64}
    write_json(tmp_path / "cache.json", sealed(forged))
    with pytest.raises(CorruptFileError, match="teacher_fp does not fit"):
        scores.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        PairLog.open(tmp_path / "file", SPEC)


# scorers


def test_fill_then_a_teacher_that_raises(tmp_path: Path) -> None:
    queries = {f"q{i}": "x" * i for i in range(1, 6)}
    documents = {f"d{i}": "y" * i for i in range(1, 30)}
    wanted = [(q, d) for q in queries for d in documents]
    teacher = CachedScorer(Lengths(), tmp_path, unit_rows=17)
    some = pairs_of(queries, documents, wanted[:60])
    np.testing.assert_array_equal(teacher.score(some), Lengths().score(some))
    assert (teacher.asked, teacher.found, teacher.scorer.calls) == (60, 0, 60)
    again = CachedScorer(Raises(), tmp_path)
    np.testing.assert_array_equal(again.score(some), Lengths().score(some))
    assert (again.asked, again.found) == (0, 60)
    mixture = pairs_of(queries, documents, wanted[40:100][::-1])
    np.testing.assert_array_equal(teacher.score(mixture), Lengths().score(mixture))
    assert (teacher.asked, teacher.found) == (100, 20)
    store = teacher.store()
    assert len(store) == 100
    np.testing.assert_array_equal(
        StoredScorer(store).score(mixture), Lengths().score(mixture).numpy().astype(store.dtype)
    )
    np.testing.assert_array_equal(CachedScorer(Raises(), tmp_path).score(some), Lengths().score(some))


def test_a_pair_asked_twice_at_once_is_scored_once(tmp_path: Path) -> None:
    teacher = CachedScorer(Lengths(), tmp_path)
    pairs = pairs_of({"q": "x"}, {"a": "same", "b": "same", "c": "other text"}, [("q", d) for d in "abcab"])
    np.testing.assert_array_equal(teacher.score(pairs), Lengths().score(pairs))
    assert (teacher.asked, teacher.found) == (2, 3)
    later = pairs_of({"q": "x"}, {"d": "same"}, [("q", "d")])  # an old text under a new id
    np.testing.assert_array_equal(teacher.score(later), Lengths().score(later))
    assert teacher.asked == 2


def test_changed_text_under_an_old_id_is_asked_again(tmp_path: Path) -> None:
    old, new = {"d": "old"}, {"d": "newer"}
    teacher = CachedScorer(Lengths(), tmp_path)
    first, second = (pairs_of({"q": "x"}, documents, [("q", "d")]) for documents in (old, new))
    assert teacher.score(first).item() == 103
    assert teacher.score(second).item() == 105
    assert teacher.score(first).item() == 103
    assert teacher.asked == 2
    store = teacher.store()
    assert store.lookup(["q"], ["d"]) == 105
    assert store.pairs()[1:][1].tolist() == [105]
    assert StoredScorer(store).score(first).item() == 103
    unseen = pairs_of({"q": "x"}, {"d": "third"}, [("q", "d")])
    with pytest.raises(MissingScoreError, match="1 of them are there under another text"):
        StoredScorer(store).score(unseen)
    assert StoredScorer(store, match="id").score(unseen).item() == 105


def test_ids_without_texts_match_any_text(tmp_path: Path) -> None:
    store = scores.write_pairs(tmp_path, SPEC, ["q"], ["d"], np.array([2.0]))
    pairs = pairs_of({"q": "any"}, {"d": "text"}, [("q", "d")])
    assert StoredScorer(store).score(pairs).item() == 2.0
    with pytest.raises(MissingScoreError, match=r"1 missing, for example \('q', 'x'\)"):
        StoredScorer(store).score(pairs_of({"q": "any"}, {"x": "text"}, [("q", "x")]))


def test_a_teacher_that_gives_nonsense_keeps_nothing(tmp_path: Path) -> None:
    class Nan(Lengths):
        def score(self, pairs: Pairs) -> torch.Tensor:
            return torch.full((len(pairs),), float("nan"))

    class Short(Lengths):
        def score(self, pairs: Pairs) -> torch.Tensor:
            return torch.zeros(1)

    pairs = pairs_of({"q": "x"}, {"d": "y", "e": "zz"}, [("q", "d"), ("q", "e")])
    with pytest.raises(DataError, match="2 of 2 scores that are no finite numbers"):
        CachedScorer(Nan(), tmp_path).score(pairs)
    with pytest.raises(DataError, match=r"shape \(1,\) for 2 pairs"):
        CachedScorer(Short(), tmp_path).score(pairs)
    assert len(CachedScorer(Lengths(), tmp_path).store()) == 0


def test_scorers_fit_the_protocol(tmp_path: Path) -> None:
    cached = CachedScorer(Lengths(), tmp_path)
    for scorer in (Lengths(), cached, StoredScorer(cached.store())):
        assert isinstance(scorer, scores.Scorer)
    assert StoredScorer(cached.store()).spec == SPEC


# plans


def test_a_plan_is_frozen_and_sharded(tmp_path: Path) -> None:
    queries, documents, values, _ = random_pairs(1000)
    scores.write_pairs(tmp_path, SPEC, queries[:100], documents[:100], values[:100])
    log = PairLog.open(tmp_path, SPEC)
    rows = log.queries.extend(queries, [None] * 1000), log.documents.extend(documents, [None] * 1000)

    def scored(q: np.ndarray, d: np.ndarray) -> np.ndarray:
        return PairScores.open(tmp_path).positions_of_rows(q, d) >= 0

    plan = log.plan(*rows, scored, unit_rows=64)
    assert sum(len(unit) for unit in plan) == 900
    parts = [log.pending(plan, (rank, 3)) for rank in range(3)]
    assert sorted(unit.name for part in parts for unit in part) == sorted(unit.name for unit in plan)
    for unit in parts[1]:
        log.commit(unit, np.ones(len(unit)))
    assert log.pending(plan, (1, 3)) == []
    shuffled = np.random.default_rng(0).permutation(1000)
    again = PairLog.open(tmp_path, SPEC).plan(rows[0][shuffled], rows[1][shuffled], scored, unit_rows=64)
    assert [unit.name for unit in again] == [unit.name for unit in plan]
    assert {unit.name for unit in log.pending(again)} == {u.name for part in (parts[0], parts[2]) for u in part}


def test_unit_names_depend_on_content_alone(tmp_path: Path) -> None:
    names = []
    for folder, ids in (("a", ["x", "y", "z"]), ("b", ["z", "x", "y"])):  # interned in another order
        log = PairLog.open(tmp_path / folder, SPEC)
        log.queries.extend(["q"], [None])
        log.documents.extend(ids, [b"0" * 16] * 3)
        rows = log.documents.find_texts(["x", "y"], [b"0" * 16] * 2)
        names.append(log.unit(np.zeros(2, np.int64), rows).name)
    assert names[0] == names[1]
    assert len(names[0]) == 16
    other = PairLog.open(tmp_path / "c", TeacherSpec("other"))
    other.queries.extend(["q"], [None])
    other.documents.extend(["x", "y"], [b"0" * 16] * 2)
    assert other.unit(np.zeros(2, np.int64), np.arange(2)).name != names[0]
    with pytest.raises(DataError, match="occurs twice in one unit"):
        log.unit(np.zeros(2, np.int64), np.zeros(2, np.int64))


def test_split_keys() -> None:
    keys = (np.array([0, 5, 2**32 - 1], dtype=np.uint64) << np.uint64(32)) | np.array(
        [7, 2**32 - 1, 0], dtype=np.uint64
    )
    queries, documents = split_keys(keys)
    assert queries.tolist() == [0, 5, 2**32 - 1]
    assert documents.tolist() == [7, 2**32 - 1, 0]


def test_one_text_table_on_both_sides_keeps_its_sides_apart(tmp_path: Path) -> None:
    texts = Texts(Ids(["a", "b", "c"]), ["one", "two!", "three"])
    pairs = Pairs(texts, texts, np.asarray([2, 0, 1]), np.asarray([1, 2, 2]))
    cached = CachedScorer(Lengths(), tmp_path)
    expected = Lengths().score(pairs)
    np.testing.assert_array_equal(cached.score(pairs), expected)
    np.testing.assert_array_equal(CachedScorer(Raises(), tmp_path).score(pairs), expected)
