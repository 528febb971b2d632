"""Exact MaxSim against a slow float64 loop; blocks, ties, padding, reopening, borders; the fast engine's codes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structkd import index
from structkd.errors import DataError, UsageError
from structkd.index import kinds
from structkd.index.multi_vector import _maxsim, candidates, late_interaction
from structkd.index.multi_vector.candidates import Coded, mean_errors
from structkd.index.multi_vector.codebooks import two_codebooks

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
    monkeypatch.setitem(late_interaction._TOKENS, "cpu", tokens)
    monkeypatch.setattr(late_interaction, "_QUERIES", 2)
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
    assert fast.manifest.parameters["scored"] <= 300
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


def test_the_fast_engine_is_measured_with_given_queries(
    clustered: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kinds, "FAST_FROM", 1000)
    documents, queries = clustered
    index.build_multi(documents, recall=0.9)
    assert (
        "recall is measured with stand-ins made from documents; real queries (--queries) say" in capsys.readouterr().err
    )
    truth = index.build_multi(documents).search(queries, 10)
    fast = index.build_multi(documents, recall=0.9, queries=queries)
    assert "stand-ins" not in capsys.readouterr().err
    found = fast.search(queries, 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found.rows.tolist(), truth.rows.tolist(), strict=True)]
    measured = [share for place, share in enumerate(shares) if place % 3]  # every third calibrated the estimates
    said = fast.manifest.recall
    assert said is not None
    assert (said["queries"], said["sample"]) == ("given", 26)
    assert said["value"] == pytest.approx(np.mean(measured), abs=1e-4)
    few = index.build_multi(documents, recall=0.9, queries=queries[:12])  # too few to calibrate with: all measure
    assert few.manifest.recall is not None
    assert few.manifest.recall["sample"] == 12
    assert not few._coded.offsets.any()
    with pytest.raises(DataError, match="queries: found none to measure recall with"):
        index.build_multi(documents, recall=0.9, queries=[])


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_stand_ins_for_queries_are_short_and_moved(metric: Any) -> None:
    document = 3 * torch.nn.functional.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    made = late_interaction._like_query(document, metric, np.random.default_rng(0))
    assert made.shape == (8, 64)
    unit = torch.nn.functional.normalize(made, dim=1)
    nearest = (unit @ torch.nn.functional.normalize(document, dim=1).T).amax(dim=1)
    assert ((nearest > 0.55) & (nearest < 0.85)).all()  # moved by a length at about a right angle: 1 / sqrt(2)
    lengths = made.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(8)) if metric == "cosine" else bool((lengths > 3).all())
    assert len(late_interaction._like_query(document[:3], metric, np.random.default_rng(0))) == 3
    filled = late_interaction._like_query(document, metric, np.random.default_rng(0), 24)
    assert torch.equal(filled[:8], made)
    copies = torch.nn.functional.normalize(filled[8:], dim=1)
    alike = copies @ copies.T
    assert filled.shape == (32, 64)
    assert 0.7 < alike[~torch.eye(24, dtype=torch.bool)].mean() < 0.9  # NFCorpus' padded queries: .80


def test_the_fast_engine_knows_queries_without_vectors_and_long_lists(
    clustered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "FAST_FROM", 1000)
    documents, queries = clustered
    fast = index.build_multi(documents, recall=0.5)
    found = fast.search([np.empty((0, 24)), queries[0]], 300)
    assert found.scores[0].tolist() == [0.0] * 300
    assert found.valid[1].all()  # twice as many documents are scored as asked for


def test_few_vectors_stay_exact_and_a_strange_recall_is_refused() -> None:
    built = index.build_multi(DOCUMENTS, IDS, recall=0.5)
    assert built.manifest.recall is None
    with pytest.raises(UsageError, match=r"recall is 1\.5; expected more than 0 and at most 1"):
        index.build_multi(DOCUMENTS, IDS, recall=1.5)


def coded_example(query_vectors: int = 5) -> tuple[Coded, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    starts = torch.tensor([0, 1, 4, 4 + 9, 20])
    coded = Coded(
        codebooks=torch.randn(2, 6, 8, generator=generator),
        codes=torch.randint(0, 6, (20, 2), generator=generator).to(torch.int16),
        starts=starts,
        offsets=torch.tensor([0.5, -1.0, 0.0, 2.0]),
    )
    return coded, torch.randn(query_vectors, 8, generator=generator)


def test_estimates_are_maxsim_over_sums_of_two_centroids_and_the_offset() -> None:
    coded, query = coded_example()
    books, starts = coded.codebooks.double().numpy(), coded.starts.tolist()
    expected = []
    for document, offset in enumerate(coded.offsets.tolist()):
        codes = coded.codes[starts[document] : starts[document + 1]].tolist()
        vectors = [books[0, coarse] + books[1, fine] for coarse, fine in codes]
        expected.append(slow(query.double().numpy(), np.stack(vectors), "ip") + offset)
    found = coded.estimates(query, torch.device("cpu"))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert coded.best(query, 2, torch.device("cpu")).tolist() == np.argsort(expected)[::-1][:2].tolist()
    assert len(coded.best(query, 9, torch.device("cpu"))) == 4


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_the_torch_twin_equals_the_kernel(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_VECTORS", block)
    coded, query = coded_example(7)
    table = torch.matmul(coded.codebooks, query.T)
    kernel = torch.empty(4)
    _maxsim.coded_maxsim(coded.codes.numpy(), coded.starts.numpy(), table.numpy(), kernel.numpy())
    assert torch.allclose(candidates.coded_maxsim_of(coded.codes, coded.starts, table), kernel, atol=1e-5)


def test_errors_that_queries_share_are_taken_off() -> None:
    """Every exact score is the estimate and a number of the document: that number is found."""
    coded, _ = coded_example()
    plain = Coded(coded.codebooks, coded.codes, coded.starts, torch.zeros(4))
    hidden = torch.tensor([0.3, -0.2, 4.0, 0.0])
    queries = list(torch.randn(11, 3, 8, generator=torch.Generator().manual_seed(1)))

    def exact(group: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([plain.estimates(query, torch.device("cpu")) + hidden for query in group])

    assert mean_errors(plain, queries, exact).tolist() == pytest.approx(hidden.tolist(), abs=1e-5)
    assert mean_errors(plain, [], exact).tolist() == [0.0] * 4


def test_two_codebooks_name_the_nearest_centroids_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structkd.index.multi_vector.codebooks._BLOCK", 100)
    vectors = torch.randn(900, 12, generator=torch.Generator().manual_seed(0))
    books, codes = two_codebooks(vectors, seed=4)
    assert books.shape == (2, 32, 12)  # the largest power of two up to twice the root of 900
    assert codes.dtype == torch.int16
    left = vectors.double()
    for place in range(2):
        distances = torch.cdist(left, books[place].double())
        assert torch.equal(distances.argmin(dim=1), codes[:, place].long())
        before, left = left, left - books[place].double()[codes[:, place].long()]
        assert (left**2).sum() < 0.9 * (before**2).sum()
    again = two_codebooks(vectors, seed=4)
    assert torch.equal(again[0], books)
    assert torch.equal(again[1], codes)
    assert len(two_codebooks(vectors[:5], seed=0)[1]) == 5  # fewer vectors than centroids


def test_calibrated_estimates_find_documents_that_queries_of_one_kind_ask_for(
    clustered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries padded with near copies of one vector (as ColBERT's): one error of the codes counts many times."""
    monkeypatch.setattr(kinds, "FAST_FROM", 1000)
    documents, queries = clustered
    generator = np.random.default_rng(2)
    padding = generator.standard_normal(24)
    padded = [np.concatenate([q[:2], padding + 0.3 * generator.standard_normal((24, 24))]) for q in queries * 2]
    truth = index.build_multi(documents).search(padded[1::3], 10).rows
    fast = index.build_multi(documents, recall=0.9, queries=padded)
    monkeypatch.setattr(fast, "_scored", 60)

    def recall() -> float:
        found = fast.search(padded[1::3], 10).rows
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))

    calibrated = recall()
    fast._coded.offsets.zero_()
    assert calibrated > recall() + 0.05


def test_where_half_of_all_documents_would_be_scored_all_are(
    clustered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kinds, "FAST_FROM", 100)
    documents, queries = clustered
    built = index.build_multi(documents[:60], recall=0.99, out=tmp_path)
    assert "index: recall 0.99 takes " in capsys.readouterr().err
    assert built.manifest.recall is None
    assert "scored" not in built.manifest.parameters
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("codes", "offsets"))]
    np.testing.assert_array_equal(
        built.search(queries, 10).rows, index.build_multi(documents[:60]).search(queries, 10).rows
    )


def test_torchs_threads_stay_as_they_were() -> None:
    """In a process of its own: numba sets OpenMP's threads once."""
    code = (
        "import numpy as np, torch; torch.set_num_threads(1); assert torch.get_num_threads() == 1\n"
        "from structkd.index.multi_vector._maxsim import coded_maxsim; out = np.empty(2, np.float32)\n"
        "coded_maxsim(np.zeros((2, 2), np.int16), np.arange(3), np.ones((2, 1, 3), np.float32), out)\n"
        "assert out.tolist() == [6, 6] and torch.get_num_threads() == 1, (out, torch.get_num_threads())"
    )
    environment = os.environ | {"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
