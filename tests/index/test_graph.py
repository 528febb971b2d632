"""kNN graphs: the definition, symmetry, self-loops, duplicates; the same from exact and approximate kinds."""

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from structkd import index
from structkd.errors import UsageError
from structkd.index import neighbours

VECTORS = np.random.default_rng(0).standard_normal((90, 5), np.float32)


def slow_neighbours(vectors: np.ndarray, k: int, metric: str) -> dict[tuple[int, int], float]:
    wide = vectors.astype(np.float64)
    if metric == "cosine":
        wide = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    edges = {}
    for row in range(len(wide)):
        score = -((wide - wide[row]) ** 2).sum(1) if metric == "l2" else wide @ wide[row]
        others = sorted((o for o in range(len(wide)) if o != row), key=lambda o: (-np.float32(score[o]), str(o)))
        edges |= {(row, other): score[other] for other in others[:k]}
    return edges


def edges_of(graph: csr_array) -> dict[tuple[int, int], float]:
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    return {(int(r), int(c)): float(v) for r, c, v in zip(rows, graph.indices, graph.data, strict=True)}


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("symmetric", ["none", "mutual", "union"])
def test_equals_the_definition(metric: Any, symmetric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_GRAPH_QUERIES", 32)
    found = edges_of(index.build(VECTORS, kind="flat", metric=metric).knn_graph(4, symmetric=symmetric))
    expected = slow_neighbours(VECTORS, 4, metric)
    if symmetric == "mutual":
        expected = {edge: value for edge, value in expected.items() if edge[::-1] in expected}
    if symmetric == "union":
        expected = expected | {edge[::-1]: value for edge, value in expected.items()}
    assert found.keys() == expected.keys()
    for edge, value in expected.items():
        assert found[edge] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("symmetric", ["mutual", "union"])
def test_symmetric_graphs_are_symmetric_to_the_bit(symmetric: Any) -> None:
    graph = index.build(VECTORS, kind="flat").knn_graph(6, symmetric=symmetric)
    assert (graph != graph.T).nnz == 0


def test_self_loops() -> None:
    built = index.build(VECTORS, kind="flat", metric="ip")
    plain, looped = edges_of(built.knn_graph(3)), edges_of(built.knn_graph(3, self_loops=True))
    assert not any(row == column for row, column in plain)
    loops = {edge: value for edge, value in looped.items() if edge[0] == edge[1]}
    assert looped == plain | loops
    np.testing.assert_allclose([loops[n, n] for n in range(90)], (VECTORS.astype(np.float64) ** 2).sum(1), rtol=1e-6)


def test_many_equal_vectors_never_name_themselves() -> None:
    """With more equals than k, a vector may be missing from its own k + 1 best: still k others."""
    graph = index.build(np.ones((20, 3)), kind="flat").knn_graph(4)
    assert np.diff(graph.indptr).tolist() == [4] * 20
    assert not any(row == column for row, column in edges_of(graph))


def test_negative_scores_survive_the_union() -> None:
    vectors = np.asarray([[1.0, 0.0], [-1.0, 0.01], [-1.0, -0.01]])
    graph = index.build(vectors, kind="flat").knn_graph(2, symmetric="union")
    assert graph.nnz == 6
    assert graph[0, 1] < -0.99


def test_a_zero_distance_is_an_edge() -> None:
    graph = index.build(np.ones((2, 2)), kind="flat", metric="l2").knn_graph(1)
    assert graph.nnz == 2
    assert graph.data.tolist() == [0, 0]


def test_fewer_vectors_than_neighbours() -> None:
    graph = index.build(VECTORS[:3], kind="flat").knn_graph(10)
    assert np.diff(graph.indptr).tolist() == [2, 2, 2]
    assert index.build(VECTORS[:1], kind="flat").knn_graph(2).nnz == 0


@pytest.mark.parametrize("kind", ["faiss-flat", "hnsw"])
def test_other_kinds_give_nearly_the_same(kind: str) -> None:
    expected = edges_of(index.build(VECTORS, kind="flat").knn_graph(5, self_loops=True))
    found = edges_of(index.build(VECTORS, kind=kind, recall=0.99).knn_graph(5, self_loops=True))
    assert len(expected.keys() & found.keys()) / len(expected) > 0.97
    assert all(found[edge] == expected[edge] for edge in expected.keys() & found.keys())


def test_bad_calls() -> None:
    built = index.build(VECTORS, kind="flat")
    with pytest.raises(UsageError, match="symmetric 'both' is unknown; expected one of none, mutual, union"):
        built.knn_graph(3, symmetric="both")
    with pytest.raises(UsageError, match="k is 0"):
        built.knn_graph(0)
