"""Scorers: each text encoded once gives what naive encoding gives, value and gradient; saved folders score the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from structkd.errors import DataError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data import tokens
from structkd.ranking.data.collection import Collection
from structkd.ranking.models import encoders
from structkd.ranking.models.encoders import BiScorer, CrossScorer, StaticScorer, TokenCache, open_scorer, student


def make(kind: str, tiny: str, small: Collection) -> encoders.NeuralScorer:
    return student(kind, None if kind == "static" else tiny, documents=small.documents)


@pytest.mark.parametrize("kind", ["dot", "cat", "static"])
def test_distinct_encoding_equals_naive_encoding_in_value_and_gradient(
    kind: str, tiny: str, small: Collection, pairs: Pairs
) -> None:
    scorer, pairs = make(kind, tiny, small).eval(), pairs.take(slice(-8, None))
    weights = torch.randn(len(pairs))
    scores = scorer(pairs)
    (scores * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad()
    naive = torch.stack([_naive(scorer, q, d) for q, d in zip(pairs.query_texts, pairs.document_texts, strict=True)])
    (naive * weights).sum().backward()
    torch.testing.assert_close(scores, naive, rtol=1e-4, atol=1e-5)
    found = {name: p.grad for name, p in scorer.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)


def _naive(scorer: encoders.NeuralScorer, query: str, document: str) -> torch.Tensor:
    """One pair through the library's own preprocessing and forward, nothing shared, nothing padded."""
    if isinstance(scorer, CrossScorer):
        return scorer.model(scorer.model.preprocess([(query, document)]))["scores"].reshape(())
    assert isinstance(scorer, BiScorer)
    vectors = [scorer.model(scorer.model.preprocess([text]))["sentence_embedding"][0] for text in (query, document)]
    if scorer.similarity == "cosine":
        vectors = [torch.nn.functional.normalize(vector, dim=-1) for vector in vectors]
    return vectors[0] @ vectors[1]


def forget(scorer: encoders.NeuralScorer) -> None:
    """Make a bi-encoder encode again what it remembers."""
    if isinstance(scorer, BiScorer):
        scorer._kept.clear()


@pytest.mark.parametrize("kind", ["dot", "cat", "static"])
def test_scores_do_not_depend_on_batch_budget_or_order(
    kind: str, tiny: str, small: Collection, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make(kind, tiny, small)
    together = scorer.score(pairs)
    order = np.random.default_rng(2).permutation(len(pairs))
    forget(scorer)
    torch.testing.assert_close(scorer.score(pairs.take(order)), together[order], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(tokens, "TOKEN_BUDGET", 1)
    forget(scorer)
    torch.testing.assert_close(scorer.score(pairs), together, rtol=1e-5, atol=1e-6)
    assert together[0] == together[-1]  # the pair that occurs twice


@pytest.mark.parametrize("kind", ["dot", "static"])
def test_a_saved_student_loads_as_sentence_transformer_with_equal_scores(
    kind: str, tiny: str, small: Collection, pairs: Pairs, tmp_path: Path
) -> None:
    scorer = make(kind, tiny, small)
    scores = scorer.score(pairs)
    scorer.save(tmp_path / "student")
    model = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    queries = model.encode_query(pairs.query_texts, convert_to_tensor=True)
    documents = model.encode_document(pairs.document_texts, convert_to_tensor=True)
    torch.testing.assert_close(model.similarity_pairwise(queries, documents), scores, rtol=1e-4, atol=1e-5)
    again = open_scorer(tmp_path / "student")
    torch.testing.assert_close(again.score(pairs), scores)
    assert again.spec.weights_sha256 == scorer.spec.weights_sha256


def test_a_student_that_read_short_texts_is_saved_to_read_short_texts(tiny: str, tmp_path: Path) -> None:
    scorer = BiScorer(tiny, query_length=5, document_length=7)
    before = scorer.model.max_seq_length
    scorer.save(tmp_path / "student")
    assert SentenceTransformer(str(tmp_path / "student"), device="cpu").max_seq_length == 7
    assert scorer.model.max_seq_length == before


def test_a_saved_cross_encoder_loads_with_equal_logits(tiny: str, pairs: Pairs, tmp_path: Path) -> None:
    scorer = CrossScorer(tiny, max_length=24)
    scores = scorer.score(pairs)
    scorer.save(tmp_path / "cat")
    model = CrossEncoder(str(tmp_path / "cat"), device="cpu")
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    np.testing.assert_allclose(model.predict(texts), scores.numpy(), rtol=1e-4, atol=1e-5)
    again = open_scorer(tmp_path / "cat")
    assert isinstance(again, CrossScorer)
    assert again.spec.fields() == scorer.spec.fields() | {"model": again.name}
    assert again.max_length == 24


def test_a_model_without_pooling_gets_the_first_token_and_dot_product(tiny: str, pairs: Pairs) -> None:
    scorer = BiScorer(tiny).eval()
    assert scorer.similarity == "dot"
    assert not scorer.bounded
    features = scorer.model.preprocess([pairs.query_texts[0]])
    with torch.no_grad():
        first = scorer.model[0].auto_model(**{k: v for k, v in features.items() if torch.is_tensor(v)})[0][0, 0]
    np.testing.assert_allclose(scorer.encode([pairs.query_texts[0]], "query")[0], first.numpy(), rtol=1e-4, atol=1e-5)


def test_texts_are_tokenised_once_and_encoded_once_per_call(tiny: str, pairs: Pairs) -> None:
    scorer = BiScorer(tiny)
    scorer.score(pairs)
    distinct = len(set(pairs.query_texts)) + len(set(pairs.document_texts))
    made = scorer._queries.made + scorer._documents.made
    assert made == distinct
    assert scorer.encoded == len(np.unique(pairs.query_rows)) + len(np.unique(pairs.document_rows))
    encoded = scorer.encoded
    scorer.score(pairs)
    assert scorer._queries.made + scorer._documents.made == made
    assert scorer.encoded == encoded  # frozen weights: vectors are remembered
    with torch.no_grad():
        next(scorer.parameters()).mul_(2.0)
    changed = scorer.score(pairs)
    assert scorer.encoded == 2 * encoded
    fresh = BiScorer(tiny)
    fresh.load_state_dict(scorer.state_dict())
    torch.testing.assert_close(changed, fresh.score(pairs))


def test_token_cache_forgets_when_full_and_still_answers() -> None:
    cache = TokenCache(lambda keys: [np.asarray([int(key)], dtype=np.int32) for key in keys], capacity=3)
    assert [int(ids[0]) for ids in cache.get(["1", "2"])] == [1, 2]
    assert [int(ids[0]) for ids in cache.get(["2", "3", "4"])] == [2, 3, 4]
    assert cache.made == 5
    assert [int(ids[0]) for ids in cache.get(["3", "3"])] == [3, 3]
    assert cache.made == 5


def test_identity_follows_the_weights_not_the_folder_or_the_use(tiny: str, pairs: Pairs, tmp_path: Path) -> None:
    scorer = BiScorer(tiny)
    before = scorer.spec.fingerprint
    scorer.score(pairs)
    assert scorer.spec.fingerprint == before
    assert BiScorer(tiny).spec.fingerprint == before
    with torch.no_grad():
        next(scorer.parameters()).add_(1.0)
    assert scorer.spec.fingerprint != before
    assert BiScorer(tiny, document_length=8).spec.fingerprint != before


def test_lengths_cut_queries_and_documents_apart(tiny: str, small: Collection) -> None:
    scorer = BiScorer(tiny, query_length=4, document_length=6)
    long = max(small.documents.texts, key=len)
    assert [len(ids) for ids in scorer._queries.get([long])] == [4]
    assert [len(ids) for ids in scorer._documents.get([long])] == [6]


@pytest.mark.parametrize("kind", ["dot", "static"])
def test_an_empty_document_has_a_finite_score(kind: str, tiny: str, small: Collection) -> None:
    scorer = make(kind, tiny, small)
    texts = Texts(Ids(["e", "f"]), ["", "alpha"])
    scores = scorer.score(Pairs(texts, texts, np.array([1, 1, 0]), np.array([0, 1, 0])))
    assert torch.isfinite(scores).all()


def test_fresh_static_students_start_as_weighted_word_overlap_and_depend_on_the_seed_alone(small: Collection) -> None:
    first, same, other = (StaticScorer.fresh(small.documents, seed=seed) for seed in (0, 0, 1))
    pair = Pairs(small.documents, small.documents, np.array([0, 0]), np.array([0, 1]))
    torch.testing.assert_close(first.score(pair)[0], torch.tensor(1.0))
    assert torch.equal(first.score(pair), same.score(pair))
    assert not torch.equal(first.score(pair), other.score(pair))
    assert first.spec.tokenizer_sha256 == other.spec.tokenizer_sha256


def test_real_weights_give_sentence_transformers_own_scores(minilm: str, small: Collection) -> None:
    scorer = BiScorer(minilm)
    assert scorer.bounded
    pairs = Pairs(small.queries, small.documents, np.array([0, 1]), np.array([0, 0]))
    model = SentenceTransformer(minilm, device="cpu")
    expected = model.similarity_pairwise(*(model.encode(texts) for texts in (pairs.query_texts, pairs.document_texts)))
    torch.testing.assert_close(scorer.score(pairs), expected, rtol=1e-4, atol=1e-5)


def test_errors_name_what_is_wrong(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="student 'lstm' is unknown; expected one of dot, colbert, "):
        student("lstm", tiny)
    with pytest.raises(UsageError, match="needs starting weights"):
        student("dot")
    for kind in ("dot", "cat", "colbert"):  # the tiny body has 64 positions
        assert student(kind, tiny, max_length=64).kind == kind
        with pytest.raises(UsageError, match=r"max_length 65: .* knows 64 positions; give 64 or less"):
            student(kind, tiny, max_length=65)
    with pytest.raises(UsageError, match="max_length 2: expected 3 tokens or more"):
        student("dot", tiny, max_length=2)
    with pytest.raises(UsageError, match="needs documents"):
        student("static")
    with pytest.raises(UsageError, match=r"static' is token vectors without attention, .* is a transformer"):
        student("static", tiny)
    with pytest.raises(DataError, match="holds no model"):
        open_scorer(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_scorer(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no model"):
        student("dot", tmp_path)
    with pytest.raises(DataError, match="hold no words"):
        StaticScorer.fresh(Texts(Ids(["a"]), [""]))
