"""PreTT against one masked pass over the whole sequence; the original's position defect; stored layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, DistilBertConfig, DistilBertModel

from structkd.errors import DataError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data import tokens
from structkd.ranking.models.prett import PrettScorer
from structkd.ranking.models.prett_model import PrettConfig, PrettModel
from structkd.ranking.models.prett_store import DocumentStates
from structkd.ranking.models.scorer import quiet_loading
from structkd.ranking.models.students import load_student, student


@pytest.fixture(scope="module")
def scorer(tiny: str) -> PrettScorer:
    return PrettScorer.fresh(tiny, PrettConfig(query_length=12, document_length=40), seed=3).eval()


def slow(scorer: PrettScorer, query: str, document: str, offset: int, padding: int = 0) -> float:
    """One pass over `[CLS] q [SEP] (padding) d [SEP]`: a block-diagonal mask in the lower layers, a full one above.

    `padding` places between query and document, as a batch with a longer query has them.
    """
    body, config, tokenizer = scorer.model.body, scorer.model.config, scorer.tokenizer
    first = tokenizer(query, add_special_tokens=False)["input_ids"][: config.query_length - 2]
    second = tokenizer(document, add_special_tokens=False)["input_ids"][: config.document_length - 1]
    query_ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id]
    document_ids = [*second, tokenizer.sep_token_id]
    part = torch.tensor([0] * len(query_ids) + [-1] * padding + [1] * len(document_ids))
    ids = torch.tensor([query_ids + [tokenizer.pad_token_id] * padding + document_ids])
    positions = torch.cat([torch.arange(len(query_ids) + padding), offset + torch.arange(len(document_ids))])[None]
    apart = (part[:, None] == part[None, :]) | torch.eye(len(part), dtype=torch.bool)
    together = (part[None, :] >= 0).expand(len(part), -1)
    states = body.embeddings(input_ids=ids, position_ids=positions, token_type_ids=(part == 1).long()[None])
    for number, layer in enumerate(body.encoder.layer):
        mask = apart if number < config.split else together
        closed = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        states = layer(states, closed)
    return float(states[0, 0] @ scorer.model.head.weight[0])


@torch.no_grad()
def test_scores_are_one_masked_pass_over_the_joined_sequence(scorer: PrettScorer, pairs: Pairs) -> None:
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    expected = [slow(scorer, query, document, offset=12) for query, document in texts]
    np.testing.assert_allclose(scorer.score(pairs).numpy(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_originals_offset_ties_a_score_to_its_batch_and_a_constant_one_does_not(scorer: PrettScorer) -> None:
    """In the original a document starts at the padded query length: the longest query of the batch decides."""
    query, document = "alpha beta", "gamma alpha delta beta"
    own = len(scorer.tokenizer(query)["input_ids"])
    original = [slow(scorer, query, document, offset=own + padding, padding=padding) for padding in (0, 3, 7)]
    assert max(original) - min(original) > 1e-3
    constant = [slow(scorer, query, document, offset=12, padding=padding) for padding in (0, 3, 7)]
    np.testing.assert_allclose(constant, constant[0], atol=1e-5)
    queries = Texts(Ids(["short", "long"]), [query, " ".join(["epsilon"] * 10)])
    documents = Texts(Ids(["d"]), [document])
    alone = scorer.score(Pairs(queries, documents, np.array([0]), np.array([0])))
    beside = scorer.score(Pairs(queries, documents, np.array([0, 1]), np.array([0, 0])))
    torch.testing.assert_close(beside[:1], alone, rtol=1e-5, atol=1e-6)
    assert float(alone[0]) == pytest.approx(constant[0], abs=1e-5)


def test_scores_depend_on_no_other_pair(scorer: PrettScorer, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    together = scorer.score(pairs)
    alone = torch.cat([scorer.score(pairs.take([i])) for i in range(len(pairs))])  # batches of one keep their axis
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer(pairs), together, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(tokens, "_CPU_BUDGET", 1)
    monkeypatch.setattr("structkd.ranking.models.prett._DOCUMENTS_AT_ONCE", 2)
    torch.testing.assert_close(scorer.score(pairs), together, rtol=1e-4, atol=1e-5)


def test_the_lower_layers_run_once_per_text_and_everything_learns(tiny: str, pairs: Pairs) -> None:
    scorer = PrettScorer.fresh(tiny, PrettConfig(query_length=12, document_length=40)).train()
    scorer(pairs).square().sum().backward()
    assert scorer.encoded == len(np.unique(pairs.query_rows)) + len(np.unique(pairs.document_rows))
    names = {name for name, p in scorer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"model.head.weight", "model.body.embeddings.word_embeddings.weight"} <= names
    assert scorer.model.head.bias is None


def test_stored_layers_give_the_same_scores_without_running_them_again(
    scorer: PrettScorer, pairs: Pairs, tmp_path: Path
) -> None:
    scores = scorer.score(pairs)
    for dtype, tolerance, width in (("float32", 1e-5, 4), ("float16", 5e-3, 2)):
        stored = scorer.store(pairs.documents, tmp_path / dtype, dtype)
        counts = [len(ids) for ids in scorer._documents.get(list(pairs.documents.texts))]
        assert stored.bytes_per_document == np.mean(counts) * 32 * width
        before = scorer.encoded
        again = scorer.use(DocumentStates(tmp_path / dtype)).score(pairs)
        assert scorer.encoded - before == len(np.unique(pairs.query_rows))  # queries alone
        torch.testing.assert_close(again, scores, rtol=tolerance, atol=tolerance)
        scorer.documents = None


def test_a_changed_or_new_document_is_not_read_from_the_store(
    scorer: PrettScorer, pairs: Pairs, tmp_path: Path
) -> None:
    changed = Texts(pairs.documents.ids, [*pairs.documents.texts[:1], *[f"{t} rho" for t in pairs.documents.texts[1:]]])
    other = Pairs(pairs.queries, changed, pairs.query_rows, pairs.document_rows)
    expected = scorer.score(other)
    found = scorer.use(scorer.store(pairs.documents, tmp_path / "states", "float32")).score(other)
    scorer.documents = None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_other_weights_and_broken_folders_are_refused(
    scorer: PrettScorer, tiny: str, pairs: Pairs, tmp_path: Path
) -> None:
    scorer.store(pairs.documents, tmp_path / "states")
    with pytest.raises(DataError, match="made by another model"):
        PrettScorer.fresh(tiny, scorer.model.config, seed=4).use(DocumentStates(tmp_path / "states"))
    with pytest.raises(UsageError, match="dtype 'int8' is unknown"):
        scorer.store(pairs.documents, tmp_path / "other", "int8")
    (tmp_path / "states" / "states.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        DocumentStates(tmp_path / "states")


def test_a_saved_student_scores_the_same(scorer: PrettScorer, pairs: Pairs, tmp_path: Path) -> None:
    scorer.save(tmp_path / "prett")
    again = load_student(tmp_path / "prett")
    assert isinstance(again, PrettScorer)
    assert torch.equal(again.score(pairs), scorer.score(pairs))
    assert again.identity == scorer.identity
    assert isinstance(student("prett", tmp_path / "prett"), PrettScorer)
    (tmp_path / "prett" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        load_student(tmp_path / "prett")


def test_distilbert_the_papers_body_works(tiny: str, pairs: Pairs) -> None:
    config = DistilBertConfig(vocab_size=300, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    with quiet_loading():
        body = DistilBertModel(config)
    scorer = PrettScorer(
        PrettModel(body, PrettConfig(query_length=12, document_length=40)),
        PrettScorer.fresh(tiny, PrettConfig(query_length=12, document_length=40)).tokenizer,
    ).eval()
    assert scorer.model.config.split == 2
    alone = torch.cat([scorer.score(pairs.take([i])) for i in range(8)])
    torch.testing.assert_close(alone, scorer.score(pairs.take(slice(8))), rtol=1e-4, atol=1e-5)


def test_an_empty_document_has_a_score_of_its_own(scorer: PrettScorer) -> None:
    texts = Texts(Ids(["e", "f"]), ["", "alpha"])
    scores = scorer.score(Pairs(texts, texts, np.array([0, 1, 1]), np.array([0, 0, 1])))
    assert torch.isfinite(scores).all()
    assert scores[1] != scores[2]


def test_errors_name_what_does_not_fit(tiny: str) -> None:
    with pytest.raises(UsageError, match="does not fit the body's 64 positions; at most 34"):
        PrettScorer.fresh(tiny)
    with pytest.raises(UsageError, match="split 2 leaves no layer on one side"):
        PrettModel(AutoModel.from_pretrained(tiny), PrettConfig(split=2, query_length=12, document_length=40))
    with pytest.raises(UsageError, match="needs starting weights"):
        student("prett")


def test_states_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    documents = Texts(Ids(["d", "e"]), ["alpha", "beta"])
    blocks = [[np.zeros((2, 3), dtype=np.float32), np.full((1, 3), 1e6, dtype=np.float32)]]
    with pytest.raises(DataError, match="document 'e': its states do not fit float16; use float32"):
        DocumentStates.write(tmp_path / "states", "me", documents, blocks, 3)
    assert not (tmp_path / "states").exists()
    assert DocumentStates.write(tmp_path / "states", "me", documents, blocks, 3, "float32").bytes_per_document == 18
