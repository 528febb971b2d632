"""FlatIndex against a slow float64 loop and faiss; ties, padding, invariances, memory, borders."""

import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd import index
from structkd.errors import DataError, DeviceError, UsageError
from structkd.index import flat
from structkd.index import vectors as borders
from structkd.index.flat import FlatIndex

METRICS = ["cosine", "ip", "l2"]


def slow_lists(queries: np.ndarray, vectors: np.ndarray, ids: list[str], k: int, metric: str) -> list[list[tuple]]:
    """The definition, one pair at a time in float64 over the float32 values that are stored."""

    def ready(row: np.ndarray) -> list[float]:
        wide = [float(value) for value in row]
        if metric == "cosine":
            norm = np.linalg.norm(np.asarray(wide))
            wide = [float(np.float32(value / norm)) for value in wide]
        return wide

    def score(query: list[float], vector: list[float]) -> float:
        if metric == "l2":
            return float(np.float32(-sum((a - b) ** 2 for a, b in zip(query, vector, strict=True))))
        return float(np.float32(sum(a * b for a, b in zip(query, vector, strict=True))))

    stored = [ready(row) for row in vectors]
    lists = []
    for query in map(ready, queries):
        scored = [(score(query, vector), name) for vector, name in zip(stored, ids, strict=True)]
        lists.append(sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:k])
    return lists


def found_lists(top: index.TopK) -> list[list[tuple]]:
    return [
        [(float(score), name) for score, name in zip(scores, names, strict=True) if name is not None]
        for scores, names in zip(top.scores, top.document_ids(), strict=True)
    ]


def agree(found: list[list[tuple]], expected: list[list[tuple]]) -> None:
    assert [[name for _, name in one] for one in found] == [[name for _, name in one] for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs], rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tile", [8, 24, 64, 4096])
def test_equals_the_definition(metric: Any, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flat._TILE, "cpu", tile)
    monkeypatch.setitem(flat._QUERIES, "cpu", 7)
    rng = np.random.default_rng(1)
    vectors, queries = rng.standard_normal((101, 9)) * 3, rng.standard_normal((20, 9))
    ids = [f"d{number}" for number in rng.permutation(101)]
    top = index.build(vectors, ids, kind="flat", metric=metric).search(queries, 7)
    agree(found_lists(top), slow_lists(queries.astype(np.float32), vectors.astype(np.float32), ids, 7, metric))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_definition_on_small_integers(data: st.DataObject) -> None:
    """Few distinct values: ties everywhere, also at the k-th place and across tiles."""
    metric = data.draw(st.sampled_from(METRICS))
    dim, count, queries, k, tile = (data.draw(st.integers(1, top)) for top in (3, 40, 5, 12, 20))
    draw = st.integers(-2, 2)
    numbers = data.draw(st.lists(st.lists(draw, min_size=dim, max_size=dim), min_size=count, max_size=count))
    asked = data.draw(st.lists(st.lists(draw, min_size=dim, max_size=dim), min_size=queries, max_size=queries))
    shift = 3.0 if metric == "cosine" else 0.0  # no zero rows under cosine
    vectors, wanted = np.asarray(numbers, np.float32) + shift, np.asarray(asked, np.float32) + shift
    ids = data.draw(st.permutations([f"{n}" for n in range(count)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flat._TILE, "cpu", tile)
        top = index.build(vectors, ids, kind="flat", metric=metric).search(wanted, k)
    agree(found_lists(top), slow_lists(wanted, vectors, ids, k, metric))


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_equals_faiss(metric: Any) -> None:
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((5000, 64), dtype=np.float32)
    queries = rng.standard_normal((300, 64), dtype=np.float32)
    theirs = faiss.IndexFlatIP(64) if metric == "ip" else faiss.IndexFlatL2(64)
    theirs.add(vectors)
    scores, rows = theirs.search(queries, 50)
    top = index.build(vectors, kind="flat", metric=metric).search(queries, 50)
    np.testing.assert_allclose(top.scores, scores if metric == "ip" else -scores, rtol=1e-4, atol=1e-4)
    assert (top.rows == rows).mean() > 0.999  # float32 may swap near-ties


def test_identical_documents_tie_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector under many ids, in every column of the tile: equal scores, ascending ids, for any block shape."""
    monkeypatch.setitem(flat._TILE, "cpu", 104)
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((1000, 37), dtype=np.float32)
    same = rng.choice(1000, 300, replace=False)
    vectors[same] = vectors[same[0]]
    ids = [f"{n:04d}" for n in rng.permutation(1000)]
    built = index.build(vectors, ids, kind="flat", metric="cosine")
    top = built.search(vectors[same[:1]], 200)
    assert len(np.unique(top.scores)) == 1
    assert top.document_ids()[0] == sorted(ids[row] for row in same)[:200]


def test_everything_equal_stays_exact() -> None:
    """All scores tie: the lists of survivors overflow in every tile and are settled exactly."""
    vectors = np.ones((9001, 5), np.float32)
    ids = [f"{n:05d}" for n in np.random.default_rng(0).permutation(9001)]
    top = index.build(vectors, ids, kind="flat", metric="l2").search(np.zeros((3, 5)), 4)
    assert top.document_ids() == [["00000", "00001", "00002", "00003"]] * 3
    assert (top.scores == -5).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_does_not_depend_on_company(metric: Any) -> None:
    rng = np.random.default_rng(4)
    vectors, queries = rng.standard_normal((5000, 48), np.float32), rng.standard_normal((40, 48), np.float32)
    built = index.build(vectors, kind="flat", metric=metric)
    together = built.search(queries, 20)
    alone = [built.search(queries[i : i + 1], 20) for i in range(40)]
    np.testing.assert_array_equal(together.rows, np.concatenate([top.rows for top in alone]))
    np.testing.assert_array_equal(together.scores, np.concatenate([top.scores for top in alone]))
    again = index.build(vectors[::-1].copy(), [str(n) for n in range(4999, -1, -1)], kind="flat", metric=metric)
    assert again.search(queries, 20).document_ids() == together.document_ids()
    np.testing.assert_array_equal(again.search(queries, 20).scores, together.scores)


def test_cosine_does_not_see_length() -> None:
    rng = np.random.default_rng(5)
    vectors, queries = rng.standard_normal((200, 16)), rng.standard_normal((5, 16))
    lengths = np.exp2(rng.integers(-60, 60, (200, 1)))
    plain = index.build(vectors, kind="flat").search(queries, 10)
    scaled = index.build(vectors * lengths, kind="flat").search(queries * 1e-30, 10)
    np.testing.assert_array_equal(plain.rows, scaled.rows)
    np.testing.assert_allclose(plain.scores, scaled.scores, rtol=3e-7)
    assert index.build(vectors, kind="flat").manifest.normalized
    assert np.abs(plain.scores).max() <= 1 + 1e-6


def test_more_places_than_documents() -> None:
    vectors = np.eye(3, dtype=np.float32)
    top = index.build(vectors, ["c", "a", "b"], kind="flat", metric="ip").search(np.ones((2, 3)), 5)
    assert top.valid.tolist() == [[True] * 3 + [False] * 2] * 2
    assert top.rows.tolist() == [[1, 2, 0, -1, -1]] * 2
    assert top.document_ids() == [["a", "b", "c", None, None]] * 2
    assert top.ids.tolist() == top.document_ids()
    assert np.isneginf(top.scores[:, 3:]).all()
    run = top.run(["q1", "q2"])
    assert run.lists["q1"][0] == ["a", "b", "c"]
    assert run.lists["q2"][1].tolist() == [1.0, 1.0, 1.0]


def test_no_queries() -> None:
    top = index.build(np.eye(3), kind="flat").search(np.empty((0, 3)), 2)
    assert top.rows.shape == top.scores.shape == top.valid.shape == (0, 2)
    assert top.run([]).lists == {}


def test_long_lists_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """k far above the tile: the threshold only appears after several tiles."""
    monkeypatch.setitem(flat._TILE, "cpu", 16)
    rng = np.random.default_rng(6)
    vectors, queries = rng.standard_normal((700, 6), np.float32), rng.standard_normal((3, 6), np.float32)
    top = index.build(vectors, kind="flat", metric="ip").search(queries, 300)
    expected = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1, kind="stable")[:, :300]
    np.testing.assert_array_equal(top.rows, expected)


def test_large_and_tiny_norms_under_l2() -> None:
    """|q|^2 - 2 q x + |x|^2 in float32 cancels to noise here; the float64 scores do not."""
    rng = np.random.default_rng(7)
    near = 1000 + rng.standard_normal((500, 8)) * 1e-3
    near = near.astype(np.float32)
    top = index.build(near, kind="flat", metric="l2").search(near[:50], 3)
    assert top.rows[:, 0].tolist() == list(range(50))
    wide = near.astype(np.float64)
    expected = -((wide[:50, None] - wide[None]) ** 2).sum(-1)
    np.testing.assert_allclose(top.scores, np.sort(expected, axis=1)[:, ::-1][:, :3], rtol=1e-6)


def test_exclusions_are_refilled() -> None:
    rng = np.random.default_rng(8)
    vectors, queries = rng.standard_normal((60, 4), np.float32), rng.standard_normal((3, 4), np.float32)
    built = index.build(vectors, kind="flat", metric="ip")
    full = built.search(queries, 60).document_ids()
    exclude = [full[0][:5], [], [*full[2][1:40], "unknown"]]
    found = built.search(queries, 10, exclude=exclude).document_ids()
    assert found[0] == full[0][5:15]
    assert found[1] == full[1][:10]
    assert found[2] == [full[2][0], *full[2][40:49]]
    assert built.search(queries[:1], 10, exclude=[full[0][:55]]).valid.sum() == 5
    with pytest.raises(DataError, match="exclude has 1 lists for 3 queries"):
        built.search(queries, 10, exclude=[[]])


def test_half_precision_and_integer_vectors() -> None:
    rng = np.random.default_rng(9)
    small = rng.integers(-5, 6, (50, 4))
    ours = index.build(small, kind="flat", metric="ip").search(small[:3], 50)
    expected = (small[:3] @ small.T)[np.arange(3)[:, None], ours.rows]
    np.testing.assert_array_equal(ours.scores, expected)
    half = torch.from_numpy(small).to(torch.bfloat16)
    np.testing.assert_array_equal(index.build(half, kind="flat", metric="ip").search(half[:3], 50).rows, ours.rows)


@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (1, 640), (4, 100), (2, 192)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_survivors_of_a_tile_are_the_true_places(shape: tuple[int, int], share: float) -> None:
    scores = torch.rand(shape)
    least = torch.full((shape[0], 1), 1.0) - share * torch.rand(shape[0], 1)
    owner, column, found = flat._at_least(scores, least)
    assert torch.stack([owner, column], dim=1).tolist() == (scores >= least).nonzero().tolist()
    assert torch.equal(found, scores[scores >= least])


@pytest.mark.parametrize(
    ("vectors", "ids", "error", "message"),
    [
        (
            [[1.0, 0.0], [np.nan, 1.0]],
            ["a", "b"],
            DataError,
            "document 'b': the vector holds a value that is not finite",
        ),
        ([[np.inf, 0.0]], ["a"], DataError, "document 'a': the vector holds a value that is not finite (1 such rows)"),
        ([[1.0, 0.0], [0.0, 0.0]], ["a", "z"], DataError, "document 'z': the vector is zero, and cosine has no value"),
        ([[1.0, 0.0], [0.0, 0.0]], None, DataError, "document at row 1: the vector is zero"),
        ([[1.0, 0.0]], ["a", "b"], DataError, "found 2 ids for 1 vectors; give one id per vector"),
        ([[1.0, 0.0], [0.0, 1.0]], ["a", "a"], DataError, "document id 'a' occurs twice"),
        (np.empty((0, 3)), None, DataError, "found no vectors; an index needs at least one"),
        (np.empty((3, 0)), None, DataError, "found no vectors; an index needs at least one"),
        ([1.0, 2.0], None, DataError, "found shape [2], expected two dimensions [rows, dim]"),
        ([["a", "b"]], None, DataError, "expected real numbers"),
    ],
)
def test_bad_vectors_are_refused(vectors: Any, ids: Any, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=re.escape(message)):
        index.build(np.asarray(vectors), ids, kind="flat", out=tmp_path / "i")
    assert not (tmp_path / "i" / "index.json").exists()


def test_bad_queries_are_refused() -> None:
    built = index.build(np.eye(4), kind="flat")
    with pytest.raises(DataError, match="queries: found 3 dimensions, expected 4 as in the index"):
        built.search(np.ones((2, 3)), 1)
    with pytest.raises(DataError, match="query at row 1: the vector holds a value that is not finite"):
        built.search(np.asarray([[1, 1, 1, 1], [1, np.nan, 1, 1]]), 1)
    with pytest.raises(DataError, match="query at row 0: the vector is zero"):
        built.search(np.zeros((1, 4)), 1)
    for k in (0, -1):
        with pytest.raises(UsageError, match=f"k is {k}; expected a whole number of at least 1"):
            built.search(np.ones((1, 4)), k)
    huge = index.build(np.full((2, 4), 1e30), kind="flat", metric="ip")
    with pytest.raises(DataError, match="overflows float32"):
        huge.search(np.full((1, 4), 1e30), 1)


def test_run_needs_one_distinct_id_per_query() -> None:
    top = index.build(np.eye(2), kind="flat").search(np.eye(2), 1)
    with pytest.raises(DataError, match="1 query ids for 2 result lists"):
        top.run(["a"])
    with pytest.raises(DataError, match="1 query ids occur twice"):
        top.run(["a", "a"])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="kind 'flatt' is unknown for vectors; expected one of auto, flat"):
        index.build(np.eye(2), kind="flatt")
    with pytest.raises(UsageError, match="metric 'dot' is unknown; expected one of cosine, ip, l2"):
        index.build(np.eye(2), metric="dot")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device 'gpu' is unknown"):
        index.build(np.eye(2), kind="flat", device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_missing_gpu_is_an_error_and_never_a_fallback() -> None:
    with pytest.raises(DeviceError, match="device 'cuda' was asked for and 0 CUDA devices are there"):
        index.build(np.eye(2), kind="flat", device="cuda")


class Crowded:
    """A device with room for `room` documents and `most` queries a product: on more torch.mm runs out of memory."""

    def __init__(self, room: int, most: int = 1000) -> None:
        self.room, self.most, self.multiply, self.tiles = room, most, torch.mm, []

    def mm(self, queries: torch.Tensor, documents: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.tiles.append(documents.shape[1])
        if documents.shape[1] > self.room or len(queries) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.multiply(queries, documents, out=out)


def test_out_of_memory_halves_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    vectors = rng.standard_normal((9000, 8), np.float32)
    built = index.build(vectors, kind="flat", metric="ip")
    expected = built.search(vectors[:5], 20)
    device = Crowded(room=1000)
    monkeypatch.setattr(torch, "mm", device.mm)
    found = built.search(vectors[:5], 20)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert device.tiles[:4] == [4096, 2048, 1024, 512]


def test_no_room_for_the_smallest_tile_halves_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(10).standard_normal((300, 8), np.float32)
    built = index.build(vectors, kind="flat", metric="ip")
    expected = built.search(vectors[:11], 20)
    monkeypatch.setattr(torch, "mm", Crowded(room=1000, most=3).mm)
    found = built.search(vectors[:11], 20)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_too_little_memory_for_any_tile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    built = index.build(np.eye(100), kind="flat", metric="ip")
    monkeypatch.setattr(torch, "mm", Crowded(room=3).mm)
    with pytest.raises(DeviceError, match="cpu: out of memory at one query and 64 documents at a time"):
        built.search(np.eye(100)[:2], 3)


def test_cosine_takes_what_float64_holds_and_products_what_float32_holds() -> None:
    """Squares of 1e300 overflow float64, those of 1e-300 are zero there."""
    vectors = np.asarray([[3.0, 4.0], [4.0, 3.0]])
    expected = index.build(vectors, kind="flat").search(vectors, 2)
    for scale in (1e300, 1e39, 1e-300):
        found = index.build(vectors * scale, kind="flat").search(vectors * scale, 2)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    for metric in ("ip", "l2"):
        with pytest.raises(DataError, match=r"document 'a': the vector holds a value beyond float32's 3\.4e38"):
            index.build(vectors * 1e39, ["a", "b"], kind="flat", metric=metric)


def test_distance_zero_is_zero_without_a_sign() -> None:
    scores = index.build(np.eye(3), kind="flat", metric="l2").search(np.eye(3), 1).scores
    assert (scores == 0).all()
    assert not np.signbit(scores).any()


@pytest.mark.parametrize("metric", METRICS)
def test_exact_scores_are_symmetric(metric: Any) -> None:
    vectors = borders.prepare(torch.randn(50, 33), metric, str, "document")
    everyone = torch.arange(50).expand(50, 50)
    scores = borders.exact_scores(vectors, borders.picker(vectors), everyone, metric)
    assert torch.equal(scores, scores.T)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_gpu_equals_cpu(metric: Any, tmp_path: Path) -> None:
    vectors, queries = np.random.default_rng(0).standard_normal((2, 70_000, 64), np.float32)
    on_cpu = index.build(vectors, kind="flat", metric=metric, device="cpu", out=tmp_path)
    on_gpu = index.open(tmp_path, device="cuda")
    assert isinstance(on_gpu, FlatIndex)
    np.testing.assert_array_equal(on_cpu.search(queries[:300], 100).rows, on_gpu.search(queries[:300], 100).rows)
    np.testing.assert_array_equal(on_cpu.search(queries[:300], 100).scores, on_gpu.search(queries[:300], 100).scores)


def test_vectors_that_do_not_fit_on_the_gpu_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preflight: tiles are then sent one by one, and a whole copy is never tried."""
    built = index.build(np.random.default_rng(0).standard_normal((100, 8)), kind="flat")
    assert isinstance(built, FlatIndex)
    sent: list[str] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, *_: sent.append(str(device)) or tensor)
    monkeypatch.setattr(built, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4000, 10_000))
    assert built.vectors is built._stored.vectors
    assert sent == []
    del built.__dict__["vectors"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6000, 10_000))
    built.vectors
    assert sent == ["cuda"]
