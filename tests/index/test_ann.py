"""FaissIndex: measured recall, exact scores of what it finds, -1, the global faiss setting, broken installations."""

import importlib.metadata
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from structkd import index
from structkd.errors import CorruptFileError, DataError, MissingExtraError, UsageError
from structkd.index import kinds
from structkd.index.approximate import faiss_index
from structkd.index.approximate.faiss_index import FaissIndex

KINDS = ["faiss-flat", "ivf-sq8", "ivf-pq", "hnsw"]


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray]:
    """Documents around 60 centres, and queries from the same mixture."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 32))
    near = centres[rng.integers(0, 60, 3300)] + 0.7 * rng.standard_normal((3300, 32))
    return near[:3000].astype(np.float32), near[3000:].astype(np.float32)


def overlap(found: index.TopK, truth: index.TopK) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.rows, truth.rows, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_recall_is_measured_and_holds_for_new_queries(kind: str, metric: str, clustered: Any, tmp_path: Path) -> None:
    documents, queries = clustered
    built = index.build(documents, kind=kind, metric=metric, out=tmp_path, recall=0.9)
    assert isinstance(built, FaissIndex)
    measured = built.manifest.recall
    assert measured is not None
    assert measured["k"] == 10
    assert measured["sample"] == 400
    assert measured["value"] >= 0.9
    truth = index.build(documents, kind="flat", metric=metric).search(queries, 10)
    found = built.search(queries, 10)
    assert overlap(found, truth) > (0.9999 if kind == "faiss-flat" else 0.85)
    again = index.open_vectors(tmp_path)
    np.testing.assert_array_equal(again.search(queries, 10).rows, found.rows)


def test_recall_is_measured_with_given_queries(clustered: Any) -> None:
    """Queries from elsewhere are harder: what reaches the recall among documents falls short of it for them."""
    documents, _ = clustered
    elsewhere = np.random.default_rng(7).standard_normal((150, 32))
    truth = index.build(documents, kind="flat").search(elsewhere, 10)
    own = index.build(documents, kind="ivf-sq8", recall=0.9)
    asked = index.build(documents, kind="ivf-sq8", recall=0.9, queries=elsewhere)
    assert isinstance(own, FaissIndex)
    assert isinstance(asked, FaissIndex)
    assert own.manifest.recall is not None
    assert own.manifest.recall["queries"] == "indexed vectors"
    said = asked.manifest.recall
    assert said is not None
    assert (said["queries"], said["sample"], said["k"]) == ("given", 150, 10)
    assert overlap(own.search(elsewhere, 10), truth) < 0.9
    assert overlap(asked.search(elsewhere, 10), truth) == pytest.approx(said["value"], abs=1e-4)
    assert said["value"] >= 0.9
    assert asked.manifest.parameters["nprobe"] > own.manifest.parameters["nprobe"]


def test_bad_queries_to_measure_with_are_refused() -> None:
    with pytest.raises(DataError, match="queries: found 2 dimensions, expected 3 as in the index"):
        index.build(np.eye(3), kind="hnsw", queries=np.ones((1, 2)))
    with pytest.raises(DataError, match="queries: found none to measure recall with"):
        index.build(np.eye(3), kind="hnsw", queries=np.ones((0, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_order_are_those_of_flat(kind: str, clustered: Any) -> None:
    """Codes only propose: every returned (document, score) is what exact search says about that pair."""
    documents, queries = clustered
    exact = index.build(documents, kind="flat").search(queries[:20], len(documents))
    found = index.build(documents, kind=kind, recall=0.5).search(queries[:20], 25)
    for place in range(20):
        score_of = dict(zip(exact.rows[place].tolist(), exact.scores[place].tolist(), strict=True))
        rank_of = {row: rank for rank, row in enumerate(exact.rows[place].tolist())}
        rows = found.rows[place][found.valid[place]].tolist()
        assert found.scores[place][found.valid[place]].tolist() == [score_of[row] for row in rows]
        assert [rank_of[row] for row in rows] == sorted(rank_of[row] for row in rows)


def test_ties_follow_the_rule() -> None:
    vectors = np.repeat(np.random.default_rng(1).standard_normal((30, 8)), 4, axis=0)
    ids = [f"{n:03d}" for n in np.random.default_rng(2).permutation(120)]
    flat = index.build(vectors, ids, kind="flat").search(vectors[::4], 4).document_ids()
    assert index.build(vectors, ids, kind="faiss-flat").search(vectors[::4], 4).document_ids() == flat


def test_places_that_faiss_leaves_open_are_invalid_and_never_an_id(clustered: Any, tmp_path: Path) -> None:
    documents, queries = clustered
    built = index.build(documents, kind="ivf-sq8", out=tmp_path, recall=0.1)
    assert isinstance(built, FaissIndex)
    built.apply({"nprobe": 1, "factor": 1})
    found = built.search(queries, 2000)
    assert 0 < found.valid.mean() < 0.9
    assert (found.rows[~found.valid] == -1).all()
    assert np.isneginf(found.scores[~found.valid]).all()
    assert all(name is None for name in found.ids[~found.valid])
    assert (np.sort(~found.valid, axis=1) == ~found.valid).all()  # open places stand last
    for documents_of, _ in found.run([str(n) for n in range(len(queries))]).lists.values():
        assert len(set(documents_of)) == len(documents_of)


def test_exclusions_are_refilled(clustered: Any) -> None:
    documents, queries = clustered
    built = index.build(documents, kind="hnsw", recall=0.9)
    first = built.search(queries[:5], 10).document_ids()
    names = [[name for name in one if name is not None] for one in first]
    found = built.search(queries[:5], 10, exclude=names)
    assert found.valid.all()
    for one, out in zip(found.document_ids(), names, strict=True):
        assert not set(one) & set(out)


def test_more_places_than_documents() -> None:
    found = index.build(np.eye(4), kind="hnsw", metric="ip").search(np.ones((1, 4)), 9)
    assert found.valid.tolist() == [[True] * 4 + [False] * 5]


@pytest.mark.parametrize("kind", ["faiss-flat", "ivf-sq8", "hnsw"])
def test_one_vector(kind: str) -> None:
    assert index.build(np.ones((1, 3)), kind=kind).search(np.ones((1, 3)), 1).rows.tolist() == [[0]]


def test_product_codes_need_enough_vectors() -> None:
    with pytest.raises(DataError, match=r"ivf-pq needs at least 16 vectors, found 3\. Use the kind 'flat'"):
        index.build(np.eye(3), kind="ivf-pq")


@pytest.mark.parametrize("dim", [1, 5, 16, 37, 130])
def test_product_codes_take_any_dimension(dim: int) -> None:
    vectors = np.random.default_rng(3).standard_normal((500, dim))
    built = index.build(vectors, kind="ivf-pq", metric="l2", recall=0.9)
    assert isinstance(built, FaissIndex)
    assert built.manifest.recall is not None
    assert built.manifest.recall["value"] >= 0.9


@pytest.fixture
def threshold() -> Iterator[int]:
    before = faiss.cvar.distance_compute_blas_threshold
    yield before
    faiss.cvar.distance_compute_blas_threshold = before


def test_the_faiss_setting_is_restored(threshold: int) -> None:
    with faiss_index.blas_from_small_batches(64):
        assert faiss.cvar.distance_compute_blas_threshold == 800 * faiss.omp_get_max_threads()
    assert faiss.cvar.distance_compute_blas_threshold == threshold
    with pytest.raises(KeyError), faiss_index.blas_from_small_batches(64):
        raise KeyError
    assert faiss.cvar.distance_compute_blas_threshold == threshold
    with faiss_index.blas_from_small_batches(3):
        assert faiss.cvar.distance_compute_blas_threshold == threshold


def test_the_faiss_setting_survives_threads(threshold: int, clustered: Any) -> None:
    documents, queries = clustered
    built = index.build(documents, kind="faiss-flat")
    expected = built.search(queries, 10).rows
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(10):
            if not (built.search(queries, 10).rows == expected).all():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert faiss.cvar.distance_compute_blas_threshold == threshold


def test_the_setting_is_restored_when_a_search_fails(
    threshold: int, clustered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, queries = clustered
    built = index.build(documents, kind="faiss-flat")
    assert isinstance(built, FaissIndex)

    class Broken:
        def search(self, *_: Any) -> None:
            assert faiss.cvar.distance_compute_blas_threshold != threshold
            raise RuntimeError("faiss gave up")

    monkeypatch.setattr(built, "_engine", Broken())
    with pytest.raises(RuntimeError, match="faiss gave up"):
        built.search(queries, 10)
    assert faiss.cvar.distance_compute_blas_threshold == threshold


def test_two_faiss_distributions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"faiss-cpu": "1.15.1", "faiss-gpu-cu12": "1.15.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UsageError, match=r"found faiss-cpu 1\.15\.1 and faiss-gpu-cu12 1\.15\.1.*pip uninstall"):
        faiss_index.check_one_faiss()
    del installed["faiss-gpu-cu12"]
    faiss_index.check_one_faiss()


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = kinds.importlib.util.find_spec
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None if name == "faiss" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'structkd\[cpu\]'"):
        index.build(np.eye(3), kind="hnsw")


def test_a_broken_engine_file_is_named(clustered: Any, tmp_path: Path) -> None:
    index.build(clustered[0], kind="ivf-sq8", out=tmp_path, recall=0.5)
    path = next(tmp_path.glob("faiss-*"))
    data = bytearray(path.read_bytes())
    data[:4] = b"XXXX"
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match="faiss cannot read it"):
        index.open(tmp_path)


def test_the_build_repeats_itself(clustered: Any) -> None:
    documents, queries = clustered
    first, second = (index.build(documents, kind="ivf-pq", recall=0.8, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.search(queries, 10).rows, second.search(queries, 10).rows)
