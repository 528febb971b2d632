"""Exact MaxSim against a slow float64 loop; blocks, ties, padding, reopening, borders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structkd import index
from structkd.errors import DataError, UsageError
from structkd.index import kinds, multivector
from structkd.index.candidates import estimated

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.standard_normal((n, 6)) for n in RNG.integers(1, 9, 50)]
QUERIES = [RNG.standard_normal((n, 6)) for n in (1, 4, 7)]
IDS = [f"{n:02d}" for n in RNG.permutation(50)]


def slow(query: np.ndarray, document: np.ndarray, metric: str) -> float:
    total = 0.0
    for q in query:
        best = -np.inf
        for d in document:
            length = np.linalg.norm(q) * np.linalg.norm(d) if metric == "cosine" else 1.0
            best = max(best, float(q @ d) / length)
        total += best
    return total


@pytest.mark.parametrize("metric", ["cosine", "ip"])
@pytest.mark.parametrize("tokens", [1, 7, 16384])
def test_equals_the_definition(metric: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multivector._TOKENS, "cpu", tokens)
    monkeypatch.setattr(multivector, "_QUERIES", 2)
    top = index.build_multi(DOCUMENTS, IDS, metric=metric).search(QUERIES, 8)
    for place, query in enumerate(QUERIES):
        expected = sorted(((-slow(query, d, metric), name) for d, name in zip(DOCUMENTS, IDS, strict=True)))[:8]
        assert top.document_ids()[place] == [name for _, name in expected]
        np.testing.assert_allclose(top.scores[place], [-score for score, _ in expected], rtol=1e-5)


def test_one_vector_each_is_flat_search() -> None:
    vectors = RNG.standard_normal((80, 6)).astype(np.float32)
    flat = index.build(vectors, kind="flat").search(vectors[:5], 80)
    multi = index.build_multi(vectors[:, None]).search(list(vectors[:5, None]), 80)
    np.testing.assert_array_equal(multi.rows, flat.rows)
    np.testing.assert_array_equal(multi.scores, flat.scores)


def test_order_of_vectors_does_not_matter_and_equals_tie() -> None:
    twins = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0][::-1].copy()]
    top = index.build_multi(twins, ["z", "m", "a"]).search([DOCUMENTS[0]], 3)
    assert top.document_ids() == [["a", "z", "m"]]
    assert top.scores[0, 0] == top.scores[0, 1]


def test_padding_exclusion_and_empty_queries() -> None:
    built = index.build_multi(DOCUMENTS[:3], ["a", "b", "c"])
    assert built.search(QUERIES, 5).valid.sum(axis=1).tolist() == [3, 3, 3]
    assert built.search([np.empty((0, 6))], 3).document_ids() == [["a", "b", "c"]]
    assert "b" not in built.search(QUERIES, 2, exclude=[["b"]] * 3).ids
    assert built.search([], 2).rows.shape == (0, 2)


def test_reopened_is_the_same(tmp_path: Path) -> None:
    first = index.build_multi(DOCUMENTS, IDS, out=tmp_path)
    second = index.open(tmp_path)
    assert isinstance(second, index.MultiVectorIndex)
    assert len(second) == 50
    np.testing.assert_array_equal(first.search(QUERIES, 9).rows, second.search(QUERIES, 9).rows)
    assert index.verify(tmp_path).ok
    with pytest.raises(DataError, match="found a multi-vector index, which holds many vectors per document"):
        index.open_vectors(tmp_path)


def test_bad_documents() -> None:
    with pytest.raises(DataError, match="document at row 1: it has no vectors"):
        index.build_multi([np.ones((2, 3)), np.empty((0, 3))])
    with pytest.raises(DataError, match="found 1 ids for 2 vectors"):
        index.build_multi([np.ones((2, 3))] * 2, ["a"])
    with pytest.raises(DataError, match="queries: found 5 dimensions, expected 3"):
        index.build_multi([np.ones((2, 3))]).search([np.ones((1, 5))], 1)
    with pytest.raises(UsageError, match="metric 'l2' has no MaxSim; expected cosine or ip"):
        index.build_multi([np.ones((2, 3))], metric="l2")


@pytest.fixture
def clustered() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents and queries whose vectors lie around 40 words' directions."""
    rng = np.random.default_rng(5)
    words = rng.standard_normal((40, 24))

    def texts(count: int, longest: int) -> list[np.ndarray]:
        sizes = rng.integers(3, longest, count)
        return [words[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, 24)) for n in sizes]

    return texts(600, 20), texts(40, 9)


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_the_fast_engine_reaches_its_recall_and_scores_exactly(
    metric: Any, clustered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "FAST_FROM", 1000)
    documents, queries = clustered
    exact = index.build_multi(documents, metric=metric).search(queries, 600)
    fast = index.build_multi(documents, metric=metric, recall=0.9, out=tmp_path)
    assert fast.manifest.recall is not None
    assert fast.manifest.recall["value"] >= 0.9
    assert fast.manifest.parameters["fast"]["keep"] < 600
    found = fast.search(queries, 10)
    shares = []
    for place in range(len(queries)):
        score_of = dict(zip(exact.rows[place].tolist(), exact.scores[place].tolist(), strict=True))
        rows = found.rows[place].tolist()
        assert found.scores[place].tolist() == [score_of[row] for row in rows]
        assert found.scores[place].tolist() == sorted(found.scores[place].tolist(), reverse=True)
        shares.append(len(set(rows) & set(exact.rows[place, :10].tolist())) / 10)
    assert np.mean(shares) >= 0.85
    again = index.open(tmp_path)
    assert isinstance(again, index.MultiVectorIndex)
    np.testing.assert_array_equal(again.search(queries, 10).rows, found.rows)
    out = [[name for name in one if name is not None] for one in found.document_ids()]
    refilled = fast.search(queries, 10, exclude=out)
    assert refilled.valid.all()
    assert not any(set(one) & set(names) for one, names in zip(refilled.document_ids(), out, strict=True))
    assert index.verify(tmp_path).ok


def test_the_fast_engine_is_measured_with_given_queries(clustered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "FAST_FROM", 1000)
    documents, queries = clustered
    truth = index.build_multi(documents).search(queries, 10)
    fast = index.build_multi(documents, recall=0.9, queries=queries)
    found = fast.search(queries, 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found.rows.tolist(), truth.rows.tolist(), strict=True)]
    said = fast.manifest.recall
    assert said is not None
    assert (said["queries"], said["sample"]) == ("given", 40)
    assert said["value"] == pytest.approx(np.mean(shares), abs=1e-4)
    with pytest.raises(DataError, match="queries: found none to measure recall with"):
        index.build_multi(documents, recall=0.9, queries=[])


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_stand_ins_for_queries_are_short_and_moved(metric: Any) -> None:
    document = 3 * torch.nn.functional.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    made = multivector._like_query(document, metric, np.random.default_rng(0))
    assert made.shape == (8, 64)
    unit = torch.nn.functional.normalize(made, dim=1)
    nearest = (unit @ torch.nn.functional.normalize(document, dim=1).T).amax(dim=1)
    assert ((nearest > 0.55) & (nearest < 0.85)).all()  # moved by a length at about a right angle: 1 / sqrt(2)
    lengths = made.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(8)) if metric == "cosine" else bool((lengths > 3).all())
    assert len(multivector._like_query(document[:3], metric, np.random.default_rng(0))) == 3


def test_the_fast_engine_knows_queries_without_vectors_and_long_lists(
    clustered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "FAST_FROM", 1000)
    documents, queries = clustered
    fast = index.build_multi(documents, recall=0.5)
    found = fast.search([np.empty((0, 24)), queries[0]], 300)
    assert found.scores[0].tolist() == [0.0] * 300
    assert found.valid[1].sum() >= 290  # twice as many documents are scored as asked for


def test_few_vectors_stay_exact_and_a_strange_recall_is_refused() -> None:
    built = index.build_multi(DOCUMENTS, IDS, recall=0.5)
    assert built.manifest.recall is None
    with pytest.raises(UsageError, match=r"recall is 1\.5; expected more than 0 and at most 1"):
        index.build_multi(DOCUMENTS, IDS, recall=1.5)


def test_estimates_are_the_sums_of_the_best_found_or_the_worst_found() -> None:
    """By hand: document 0 has vectors 0 and 1, document 1 vector 2, document 2 vector 3."""
    owner = torch.tensor([0, 0, 1, 2])
    found = torch.tensor([[0, 1, 2], [3, 2, -1]])
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, -torch.inf]])
    # document 0: 0.9 + 0.6 (worst of the second) = 1.5; document 1: 0.1 + 0.6 = 0.7; document 2: 0.1 + 0.7 = 0.8
    assert estimated(found, scores, owner, 3).tolist() == [0, 2, 1]
    assert estimated(found, scores, owner, 2).tolist() == [0, 2]
    assert estimated(torch.full((2, 3), -1), torch.full((2, 3), -torch.inf), owner, 2).tolist() == []
