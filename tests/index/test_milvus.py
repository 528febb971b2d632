"""MilvusIndex on Milvus Lite: the answers of FlatIndex, also over the network and after reopening; clear errors.

The tests of a server run on a real Milvus too, where STRUCTKD_TEST_MILVUS names one (http://host:19530).
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structkd import index
from structkd.cli.app import run
from structkd.errors import CorruptFileError, DataError, MissingExtraError, UsageError
from structkd.index import kinds

pytest.importorskip("milvus_lite", reason="needs the extra 'milvus' (pip install 'structkd[milvus]')")
from milvus_lite.engine.collection import Collection
from milvus_lite.server_manager import server_manager_instance

from structkd.index.approximate import milvus

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((400, 12)).astype(np.float32)
QUERIES = RNG.standard_normal((30, 12)).astype(np.float32)
IDS = [f"dok-{n}-é" for n in RNG.permutation(400)]


def same(found: index.TopK, expected: index.TopK) -> None:
    assert found.document_ids() == expected.document_ids()
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.valid, expected.valid)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_equals_flat(metric: Any, tmp_path: Path) -> None:
    expected = index.build(VECTORS, IDS, kind="flat", metric=metric)
    built = index.build(VECTORS, IDS, kind="milvus", metric=metric, out=tmp_path)
    assert (built.kind, built.metric, built.dim, len(built)) == ("milvus", metric, 12, 400)
    same(built.search(QUERIES, 10), expected.search(QUERIES, 10))
    same(built.search(QUERIES[:2], 500), expected.search(QUERIES[:2], 500))
    out = [[name for name in names[:3] if name] for names in expected.search(QUERIES[:5], 3).document_ids()]
    same(built.search(QUERIES[:5], 4, exclude=out), expected.search(QUERIES[:5], 4, exclude=out))
    assert (built.knn_graph(4, "union", True) != expected.knn_graph(4, "union", True)).nnz == 0
    assert built.search(np.empty((0, 12)), 3).rows.shape == (0, 3)
    same(index.open_vectors(tmp_path).search(QUERIES, 10), expected.search(QUERIES, 10))
    assert index.verify(tmp_path).ok


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_ties_follow_the_rule_however_many_there_are(metric: Any) -> None:
    """Three distinct vectors: every list is cut inside a long tie, far beyond the first candidates."""
    vectors = np.repeat(np.asarray([[1, 0, 1], [1, 1, 0], [0, 1, 1]], np.float32), 70, axis=0)
    ids = [f"{n:03d}" for n in np.random.default_rng(2).permutation(210)]
    expected = index.build(vectors, ids, kind="flat", metric=metric).search(vectors[::50], 5)
    same(index.build(vectors, ids, kind="milvus", metric=metric).search(vectors[::50], 5), expected)


@pytest.fixture(params=["lite", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Milvus Lite as a server of its own, reached by address; a real Milvus."""
    if request.param == "real":
        if not os.environ.get("STRUCTKD_TEST_MILVUS"):
            pytest.skip("needs a Milvus server: STRUCTKD_TEST_MILVUS=http://host:19530")
        yield os.environ["STRUCTKD_TEST_MILVUS"]
        return
    path = str(tmp_path_factory.mktemp("server") / "far.db")
    yield server_manager_instance.start_and_get_uri(path).replace("tcp://", "http://")
    server_manager_instance.release_server(path)


def test_a_server_by_address(server: str, tmp_path: Path) -> None:
    client = milvus.MilvusClient(server)
    others = client.list_collections()  # none on a server of our own
    expected = index.build(VECTORS, IDS, kind="flat").search(QUERIES, 10)
    built = index.build(VECTORS, IDS, kind="milvus", address=server, out=tmp_path)
    same(built.search(QUERIES, 10), expected)
    assert not list(tmp_path.glob("milvus-*"))  # nothing embedded
    first = built.manifest.parameters["collection"]  # type: ignore[attr-defined]
    again = index.build(VECTORS, IDS, kind="milvus", address=server, out=tmp_path)
    second = again.manifest.parameters["collection"]  # type: ignore[attr-defined]
    assert sorted(client.list_collections()) == sorted([*others, second])  # the replaced one is dropped
    assert second != first
    client.close()
    dropped(server, again)
    with pytest.raises(DataError, match=r"holds 0 vectors, expected 400 .*Was it dropped, or is this another server"):
        index.open(tmp_path)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_a_server_answers_as_flat_does(server: str, metric: Any, tmp_path: Path) -> None:
    """Also at ties that are longer than a list."""
    vectors = np.concatenate([VECTORS, np.repeat(VECTORS[:3], 40, axis=0)])
    ids = [*IDS, *(f"copy-{n}" for n in RNG.permutation(120))]
    queries = np.concatenate([QUERIES, VECTORS[:3]])
    expected = index.build(vectors, ids, kind="flat", metric=metric)
    built = index.build(vectors, ids, kind="milvus", metric=metric, address=server, out=tmp_path)
    try:
        same(built.search(queries, 10), expected.search(queries, 10))
        same(index.open_vectors(tmp_path).search(queries, 10), expected.search(queries, 10))
        assert (built.knn_graph(4, "union", True) != expected.knn_graph(4, "union", True)).nnz == 0
    finally:
        dropped(server, built)


@pytest.mark.parametrize("milvus_index", ["IVF_FLAT", "IVF_SQ8", "HNSW"])
def test_approximate_indexes_of_a_server(server: str, milvus_index: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"address": server, "milvus_index": milvus_index}
    built = index.build(VECTORS, IDS, kind="milvus", out=tmp_path, recall=0.95, **settings)
    try:
        expected = index.build(VECTORS, IDS, kind="flat").search(QUERIES, 10)
        shared = [np.intersect1d(a, b) for a, b in zip(built.search(QUERIES, 10).rows, expected.rows, strict=True)]
        assert built.manifest.recall["value"] >= 0.95  # type: ignore[attr-defined]
        assert sum(map(len, shared)) >= 0.95 * expected.rows.size
    finally:
        dropped(server, built)


def dropped(address: str, built: Any) -> None:
    """Leave a server that is not the test's own as it was."""
    client = milvus.MilvusClient(address)
    client.drop_collection(built.manifest.parameters["collection"])
    client.close()


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9: no Milvus answers"):
        index.build(VECTORS, kind="milvus", address="http://127.0.0.1:9", out=tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_approximate_indexes_say_their_recall() -> None:
    built = index.build(VECTORS, kind="milvus", milvus_index="HNSW", recall=0.9)
    manifest = built.manifest  # type: ignore[attr-defined]
    assert manifest.recall["value"] >= 0.9
    assert manifest.recall["sample"] == 400
    assert manifest.parameters["search"]["ef"] >= 32
    with pytest.raises(UsageError, match="Milvus index 'TREE' is unknown; expected one of FLAT, IVF_FLAT"):
        index.build(VECTORS, kind="milvus", milvus_index="TREE")


def test_a_lost_database_is_named(tmp_path: Path) -> None:
    index.build(VECTORS, kind="milvus", out=tmp_path)
    place = next(tmp_path.glob("milvus-*"))
    server_manager_instance.release_server(str(place / "milvus.db"))
    shutil.rmtree(place)
    with pytest.raises(CorruptFileError, match=r"milvus\.db/.*: the file is missing"):
        index.open(tmp_path)


def test_the_embedded_database_is_checked_and_searching_leaves_it_as_it_was(tmp_path: Path) -> None:
    built = index.build(VECTORS, kind="milvus", out=tmp_path)
    for _ in range(2):
        assert index.open_vectors(tmp_path).search(QUERIES, 30).valid.all()
        assert index.verify(tmp_path).ok
    files = [path for path in tmp_path.glob("milvus-*/**/*") if path.is_file() and path.stat().st_size]
    assert len(files) >= 4
    assert built.manifest.bytes > sum(path.stat().st_size for path in files)  # type: ignore[attr-defined]
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:-3] + bytes([good[-3] ^ 8]) + good[-2:])
        assert [name for name, _ in index.verify(tmp_path).problems] == [str(path.relative_to(tmp_path))]
        path.write_bytes(good)
    assert index.verify(tmp_path).ok


def test_a_new_build_replaces_the_old_one(tmp_path: Path) -> None:
    before = index.build(VECTORS, IDS, kind="milvus", out=tmp_path)
    expected = before.search(QUERIES[:2], 3)
    index.build(VECTORS[:50], IDS[:50], kind="milvus", out=tmp_path)
    assert len(index.open_vectors(tmp_path)) == 50
    assert len(list(tmp_path.iterdir())) == 3  # manifest, ids, the new database
    assert expected.valid.all()


def test_what_milvus_lite_still_writes_after_a_build_is_awaited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its index files appear in the background: a slow disk made sizes in the manifest those of half-written files."""
    index_in_time = Collection._bg_compact_and_index

    def late(collection: Collection) -> None:
        time.sleep(0.5)
        index_in_time(collection)

    monkeypatch.setattr(Collection, "_bg_compact_and_index", late)
    built = index.build(VECTORS, IDS, kind="milvus", out=tmp_path)
    listed = {file.path for file in built.manifest.files}  # type: ignore[attr-defined]
    time.sleep(1)
    written = [path for path in tmp_path.glob("milvus-*/**/*.idx") if path.stat().st_size]
    assert written
    assert {str(path.relative_to(tmp_path)) for path in written} <= listed
    assert index.verify(tmp_path).ok


def test_long_lists_are_refused_and_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "_LARGEST_LIST", 100)
    built = index.build(VECTORS, kind="milvus")
    assert built.search(QUERIES[:2], 100).valid.all()
    with pytest.raises(UsageError, match="k is 101; Milvus gives at most 100 documents per query"):
        built.search(QUERIES[:2], 101)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    folder, found = tmp_path / "i", tmp_path / "r"
    assert run(["index", "build", "--vectors", str(tmp_path / "v.npy"), "--kind", "milvus", "--out", str(folder)]) == 0
    assert run(["index", "search", str(folder), "--queries", str(tmp_path / "v.npy"), "--out", str(found)]) == 0
    assert found.read_text().startswith("0 Q0 0 1 1.0")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = kinds.importlib.util.find_spec
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None if name == "pymilvus" else find(name))
    with pytest.raises(MissingExtraError, match=r"needs pymilvus, .*pip install 'structkd\[milvus\]'"):
        index.build(VECTORS, kind="milvus")
