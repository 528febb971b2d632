"""ColBERT: MaxSim against loops, whatever the padding; both variants against the paper's formula; equal in MVE."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from structkd.errors import UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data import tokens
from structkd.ranking.data.collection import Collection
from structkd.ranking.models import maxsim as late
from structkd.ranking.models.maxsim import Ragged, maxsim
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.prett import PrettScorer
from structkd.ranking.models.prett_model import PrettConfig
from structkd.ranking.models.scorer import NeuralScorer
from structkd.ranking.models.students import load_student, student

VARIANTS = ["stanford", "matchmaker"]


def ragged(lengths: list[int], seed: int, dimension: int = 5) -> Ragged:
    """Random vectors; texts lie in the flat table in reverse order, as sorting by length may leave them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = np.asarray(lengths)
    vectors = torch.randn(int(sizes.sum()), dimension, dtype=torch.float64, generator=generator)
    ends = np.cumsum(sizes[::-1])[::-1]
    return Ragged(vectors, ends - sizes, sizes)


def slow(queries: Ragged, documents: Ragged, query: int, document: int) -> float:
    """The formula, with loops."""
    total = 0.0
    for i in range(queries.lengths[query]):
        best = None
        for j in range(documents.lengths[document]):
            left = queries.vectors[queries.starts[query] + i]
            right = documents.vectors[documents.starts[document] + j]
            product = sum(float(a) * float(b) for a, b in zip(left, right, strict=True))
            best = product if best is None else max(best, product)
        total += 0.0 if best is None else best
    return total


@pytest.fixture
def some_pairs() -> tuple[Ragged, Ragged, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    queries, documents = ragged([3, 1, 0, 4], 1), ragged([2, 7, 0, 1, 5, 3], 2)
    return queries, documents, generator.integers(0, 4, 40), generator.integers(0, 6, 40)


def test_maxsim_is_the_formula_and_a_text_without_vectors_scores_zero(some_pairs: tuple) -> None:
    queries, documents, query_of, document_of = some_pairs
    expected = [slow(queries, documents, int(q), int(d)) for q, d in zip(query_of, document_of, strict=True)]
    found = maxsim(queries, documents, query_of, document_of)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    assert not found[torch.from_numpy((query_of == 2) | (document_of == 2))].any()


def test_maxsim_does_not_depend_on_blocks(some_pairs: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = maxsim(*some_pairs)
    monkeypatch.setattr(late, "_BLOCK", 1)
    torch.testing.assert_close(maxsim(*some_pairs), whole, rtol=0, atol=1e-13)


def test_negative_similarities_never_lose_to_padding() -> None:
    """Libraries that mask by multiplication give 0 here: padding wins over every real vector."""
    queries = Ragged(torch.tensor([[1.0, 0.0]]), np.array([0]), np.array([1]))
    documents = Ragged(torch.tensor([[-3000.0, 0.0], [-2.0, 1.0], [-5.0, 1.0]]), np.array([0, 1]), np.array([1, 2]))
    found = maxsim(queries, documents, np.array([0, 0]), np.array([0, 1]))
    assert found.tolist() == [-3000.0, -2.0]  # -3000 lies below the fillers -1000 and -9999 * 0.1 of others too


def test_maxsim_has_the_right_gradient(some_pairs: tuple) -> None:
    queries, documents, query_of, document_of = some_pairs

    def score(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        own = Ragged(left, queries.starts, queries.lengths), Ragged(right, documents.starts, documents.lengths)
        return maxsim(*own, query_of, document_of)

    inputs = queries.vectors.clone().requires_grad_(), documents.vectors.clone().requires_grad_()
    assert torch.autograd.gradcheck(score, inputs)


def test_no_pairs_and_no_vectors_leave_zero_gradients() -> None:
    vectors = torch.zeros(0, 4, requires_grad=True)
    nothing = Ragged(vectors, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    maxsim(nothing, nothing, np.array([0]), np.array([0])).sum().backward()
    assert vectors.grad is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_the_formula_over_the_librarys_own_token_vectors(variant: str, tiny: str, pairs: Pairs) -> None:
    scorer = MultiVectorScorer(tiny, variant=variant)
    scores = scorer.score(pairs)
    for position in range(0, len(pairs), 7):
        query = scorer.model.encode_query([pairs.query_texts[position]])[0]
        document = scorer.model.encode_document([pairs.document_texts[position]])[0]
        expected = sum(max(float(q @ d) for d in document) for q in query)
        assert float(scores[position]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_stanford_variant_has_the_papers_shape(tiny: str) -> None:
    scorer = MultiVectorScorer(tiny).eval()
    names = scorer.model.tokenizer.convert_ids_to_tokens(scorer._queries.get(["alpha beta"])[0][0])
    assert names[:5] == ["[CLS]", "[Q]", "alpha", "beta", "[SEP]"]
    assert names[5:] == ["[MASK]"] * 27
    assert scorer._queries.get(["alpha beta"])[0][1].tolist() == [1] * 5 + [0] * 27  # scored, not attended to
    assert scorer.model.tokenizer.convert_ids_to_tokens(scorer._documents.get(["alpha"])[0][0])[1] == "[D]"
    (query,), (document,) = scorer.encode_multi(["alpha"], "query"), scorer.encode_multi(["alpha"], "document")
    assert query.shape == (32, 128)
    assert document.shape == (4, 128)
    np.testing.assert_allclose(np.linalg.norm(query, axis=1), 1, atol=1e-5)
    head = scorer.model[1].linear
    assert (head.bias, tuple(head.weight.shape)) == (None, (128, 32))


def test_matchmaker_variant_is_as_wide_as_the_encoder_and_not_normalised(tiny: str) -> None:
    scorer = MultiVectorScorer(tiny, variant="matchmaker").eval()
    (query,) = scorer.encode_multi(["alpha"], "query")
    assert query.shape == (16, 32)
    assert scorer._queries.get(["alpha"])[0][1].all()
    assert np.linalg.norm(query, axis=1).std() > 1e-3
    assert scorer.model[1].linear.bias is not None


def test_punctuation_of_documents_is_read_but_not_scored(minilm: str) -> None:
    scorer = MultiVectorScorer(minilm)
    (plain,), (marked,) = (scorer.encode_multi([text], "document") for text in ("a fine day", "a fine day !!!"))
    assert len(plain) == len(marked) == 3 + 3  # [CLS] [D] and [SEP] are scored
    assert np.abs(plain - marked).max() > 1e-3
    names = scorer.model.tokenizer.convert_ids_to_tokens(scorer._queries.get(["hello"])[0][0])
    assert names[:2] == ["[CLS]", "[unused0]"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_depend_on_no_other_pair(variant: str, tiny: str, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = MultiVectorScorer(tiny, variant=variant)
    together = scorer.score(pairs)
    alone = torch.cat([scorer.score(pairs.take([i])) for i in range(len(pairs))])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(tokens, "_CPU_BUDGET", 1)
    torch.testing.assert_close(scorer.score(pairs), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer.eval()(pairs), together, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("structkd.ranking.models.multi_vector._DOCUMENTS_AT_ONCE", 3)
    torch.testing.assert_close(scorer.score(pairs), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_student_loads_as_multi_vector_encoder_with_equal_scores(
    variant: str, tiny: str, pairs: Pairs, tmp_path: Path
) -> None:
    scorer = student("colbert", tiny, variant=variant, seed=5)
    scores = scorer.score(pairs)
    scorer.save(tmp_path / "student")
    model = MultiVectorEncoder(str(tmp_path / "student"), device="cpu")
    queries, documents = model.encode_query(pairs.query_texts), model.encode_document(pairs.document_texts)
    torch.testing.assert_close(model.similarity_pairwise(queries, documents), scores, rtol=1e-4, atol=1e-4)
    again = load_student(tmp_path / "student")
    assert isinstance(again, MultiVectorScorer)
    torch.testing.assert_close(again.score(pairs), scores)
    assert again.spec.fields() == scorer.spec.fields() | {"model": again.name}
    assert isinstance(student("colbert", tmp_path / "student"), MultiVectorScorer)


def test_fresh_projection_depends_on_the_seed_alone(tiny: str) -> None:
    first, same, other = (MultiVectorScorer(tiny, seed=seed).spec.weights_sha256 for seed in (0, 0, 1))
    assert first == same != other


def test_training_moves_every_part_and_encodes_each_text_once(tiny: str, pairs: Pairs) -> None:
    scorer = MultiVectorScorer(tiny).train()
    scorer(pairs).sum().backward()
    assert scorer.encoded == len(np.unique(pairs.query_rows)) + len(np.unique(pairs.document_rows))
    moved = {name for name, p in scorer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("linear" in name for name in moved)
    assert any("encoder.layer.0" in name for name in moved)


@pytest.mark.parametrize("kind", ["colbert", "prett"])
def test_gradient_caching_changes_no_gradient(kind: str, tiny: str, pairs: Pairs) -> None:
    """With dropout: a batch that is run again draws the same masks."""
    found = []
    for recompute in (False, True):
        scorer = _small_student(kind, tiny).train()
        scorer.recompute = recompute
        torch.manual_seed(4)
        scorer(pairs).square().sum().backward()
        found.append({name: p.grad for name, p in scorer.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def _small_student(kind: str, tiny: str) -> NeuralScorer:
    if kind == "colbert":
        return MultiVectorScorer(tiny)
    return PrettScorer.fresh(tiny, PrettConfig(query_length=12, document_length=40))


def test_an_empty_document_and_a_query_of_masks_have_finite_scores(tiny: str) -> None:
    texts = Texts(Ids(["e", "f"]), ["", "alpha"])
    for variant in VARIANTS:
        scores = MultiVectorScorer(tiny, variant=variant).score(Pairs(texts, texts, np.array([0, 1]), np.array([0, 0])))
        assert torch.isfinite(scores).all()


def test_length_is_cut_and_mean_maxsim_is_refused(tiny: str, small: Collection) -> None:
    scorer = MultiVectorScorer(tiny, document_length=6)
    assert [pair.shape[1] for pair in scorer._documents.get([max(small.documents.texts, key=len)])] == [6]
    scorer.model.similarity_fn_name = "meanmaxsim"
    with pytest.raises(UsageError, match="'meanmaxsim' is not supported; expected maxsim"):
        MultiVectorScorer(scorer.model)
