import math
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import objectives
from structkd.errors import DataError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.models.encoders import NeuralScorer, open_scorer, student
from structkd.ranking.models.tk import MU, TkConfig, TkModel, TkScorer, kernel_sums, positions, words_of

SMALL = TkConfig(dimension=16, heads=2, feed_forward=16, layers=1, buckets=8)
DOCUMENTS = ["Red boats on the sea", "the sea, the blue sea!", "cars", "", "red_cars and boats and cars and the sea"]
QUERIES = ["red boats", "sea", "", "unknownword blue"]


def texts(values: list[str]) -> Texts:
    return Texts(Ids(map(str, range(len(values)))), values)


def all_pairs() -> Pairs:
    rows = np.indices((len(QUERIES), len(DOCUMENTS))).reshape(2, -1)
    return Pairs(texts(QUERIES), texts(DOCUMENTS), rows[0], rows[1])


@pytest.fixture
def scorer() -> TkScorer:
    return TkScorer(TkModel.fresh(texts(DOCUMENTS), SMALL))


def test_kernels_of_the_reference() -> None:
    cosines = torch.tensor([[[1.0, 0.2]]], dtype=torch.float64)
    found = kernel_sums(cosines, torch.tensor([[True, True]]), torch.tensor(MU, dtype=torch.float64), 0.1)
    expected = [1, 0.6065, 0.0111, 0.0111, 0.6065, 0.6065, 0.0111]
    assert found[0, 0, :7].tolist() == pytest.approx(expected, abs=6e-5)
    assert (found[0, 0, 7:] < 1e-5).all()


def test_score_is_the_slow_loop(scorer: TkScorer) -> None:
    model = scorer.model.double()
    tokens, mask = model.tokenise(["red boats", "sea"], 30)
    other, other_mask = model.tokenise(["the blue sea", "red cars and boats"], 200)
    with torch.no_grad():
        q, d = model.represent(tokens, mask, 0), model.represent(other, other_mask, 500)
        factors = torch.nn.functional.softplus(model.factors).tolist()
        weights, expected = model.weights.tolist(), []
        for pair in range(2):
            total = 0.0
            for i in range(tokens.shape[1]):
                for k, centre in enumerate(MU):
                    if not mask[pair, i]:
                        continue
                    kernel = sum(
                        math.exp(-(((q[pair, i] @ d[pair, j]).item() - centre) ** 2) / (2 * 0.1**2))
                        for j in range(other.shape[1])
                        if other_mask[pair, j]
                    )
                    total += weights[k] * math.log(max(factors[k] * kernel, 1e-10))
            expected.append(total)
    scorer.model.float()
    assert scorer.model(tokens, mask, other, other_mask).tolist() == pytest.approx(expected, abs=2e-4)


def test_positions_are_sines_then_cosines() -> None:
    found = positions(500, torch.zeros(3, 8, dtype=torch.float64))
    scales = [1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3), 1e-4]
    for step in range(3):
        angles = [(500 + step) * scale for scale in scales]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        assert found[step].tolist() == pytest.approx(expected, abs=1e-4)


def test_padding_and_batch_change_nothing(scorer: TkScorer) -> None:
    model = scorer.model.eval()
    pairs = all_pairs()
    together = scorer.score(pairs)
    alone = torch.cat([scorer.score(pairs.take([i])) for i in range(len(pairs))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    tokens, mask = model.tokenise(["red boats"], 30)
    other, other_mask = model.tokenise(["the blue sea"], 200)
    wide = torch.nn.functional.pad(other, (0, 40)), torch.nn.functional.pad(other_mask, (0, 40))
    long = torch.nn.functional.pad(tokens, (0, 9)), torch.nn.functional.pad(mask, (0, 9))
    torch.testing.assert_close(model(*long, *wide), model(tokens, mask, other, other_mask), rtol=1e-4, atol=1e-5)


def test_score_is_forward_and_restores_the_mode(scorer: TkScorer) -> None:
    pairs = all_pairs()
    scorer.train()
    torch.testing.assert_close(scorer.score(pairs), scorer(pairs).detach(), rtol=1e-4, atol=1e-5)
    assert scorer.training
    assert len(scorer.score(pairs.take([]))) == 0


def test_texts_without_words_are_finite(scorer: TkScorer) -> None:
    pairs = all_pairs()
    scores = scorer(pairs)
    assert torch.isfinite(scores).all()
    assert (scores[pairs.query_rows == 2] == 0).all()  # no query word, nothing to add
    scores.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in scorer.parameters())


def test_no_factor_is_stuck_at_the_floor(scorer: TkScorer) -> None:
    """A plain c_k below 0 would be clamped and get no gradient."""
    with torch.no_grad():
        scorer.model.factors.fill_(-5.0)
    scorer(all_pairs()).sum().backward()
    assert (scorer.model.factors.grad.abs() > 0).any()  # type: ignore[union-attr]


def test_each_text_is_encoded_once(scorer: TkScorer) -> None:
    scorer(all_pairs())
    assert scorer.encoded == len(QUERIES) + len(DOCUMENTS)


def test_saved_and_loaded(scorer: TkScorer, tmp_path: Path) -> None:
    scorer.save(tmp_path / "tk")
    again = TkScorer.open(tmp_path / "tk")
    assert torch.equal(again.score(all_pairs()), scorer.score(all_pairs()))
    assert again.spec == scorer.spec
    with torch.no_grad():
        scorer.model.mixing += 0.1
    assert again.spec.fingerprint != scorer.spec.fingerprint
    (tmp_path / "tk" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read"):
        TkModel.load(tmp_path / "tk")
    (tmp_path / "tk" / "structkd.json").write_text('{"kind": "prett"}')
    with pytest.raises(DataError, match='expected "kind": "tk"'):
        TkModel.load(tmp_path / "tk")


def test_vocabulary_and_words() -> None:
    model = TkModel.fresh(texts(DOCUMENTS), SMALL)
    assert model.words == ("sea", "the", "and", "cars", "boats", "red")
    assert list(words_of("open_http(URL), 3x  Œuvre")) == ["open", "http", "url", "3x", "œuvre"]
    tokens, mask = model.tokenise(["sea unheard", "sea", "red red red"], 2)
    assert tokens[:, 0].tolist() == [9, 9, 14]
    assert 1 <= tokens[0, 1] <= 8
    assert mask.tolist() == [[True, True], [True, False], [True, True]]
    assert TkModel.fresh(texts(DOCUMENTS), TkConfig(vocabulary=2)).words == ("sea", "the")
    with pytest.raises(DataError, match="hold no word twice"):
        TkModel.fresh(texts(["a b"]))
    with pytest.raises(UsageError, match="dimension 10 must be a multiple"):
        TkConfig(dimension=10)


def test_same_seed_same_weights() -> None:
    before = torch.get_rng_state()
    one, two = (TkModel.fresh(texts(DOCUMENTS), SMALL, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    other = TkModel.fresh(texts(DOCUMENTS), SMALL, seed=4)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_it_learns_a_teachers_order(scorer: TkScorer) -> None:
    pairs = all_pairs().take(list(range(10)))  # two queries, five documents
    teacher = torch.tensor([[5.0, 1, 0, -1, 3], [1, 5, 0, -1, 3]])
    optimiser = torch.optim.Adam(scorer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = objectives.kl(scorer(pairs).reshape(2, 5), teacher)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert (scorer.score(pairs).reshape(2, 5).argmax(1) == teacher.argmax(1)).all()


def test_it_is_a_student_and_opens_from_its_folder(tmp_path: Path) -> None:
    fresh = student("tk", documents=texts(DOCUMENTS), max_length=50, seed=1)
    assert isinstance(fresh, NeuralScorer)
    assert (fresh.kind, fresh.bounded, fresh.model.config.document_length) == ("tk", False, 50)
    fresh.save(tmp_path / "tk")
    again = open_scorer(tmp_path / "tk")
    assert torch.equal(again.score(all_pairs()), fresh.score(all_pairs()))
    assert torch.equal(student("tk", tmp_path / "tk").score(all_pairs()), fresh.score(all_pairs()))
    with pytest.raises(UsageError, match="needs documents to count its vocabulary in"):
        student("tk")
