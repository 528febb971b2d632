"""Micro-batches: gathered token vectors and gradient caching give the gradients of one plain pass."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from structkd.ids import Pairs
from structkd.ranking.data import tokens as tokens_module
from structkd.ranking.data.tokens import in_batches, token_budget, token_embedding
from structkd.ranking.models.encoders import BiScorer, CrossScorer, NeuralScorer


def gradients(student: NeuralScorer, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and gradients of their squares, with dropout drawn from a fixed seed."""
    student.train()
    student.zero_grad()
    torch.manual_seed(3)
    scores = student(pairs)
    (scores**2).sum().backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return scores.detach(), found


@pytest.mark.parametrize("make", [BiScorer, CrossScorer])
@pytest.mark.parametrize("budget", [40, 10_000])
def test_gathered_rows_and_gradient_caching_change_no_gradient(
    make: Callable[[str], NeuralScorer], budget: int, tiny: str, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_CPU_BUDGET", budget)
    student = make(tiny)
    with monkeypatch.context() as plainly:
        plainly.setattr(tokens_module, "token_embedding", lambda model: None)
        scores, expected = gradients(student, pairs)
    for recompute in (False, True):
        student.recompute = recompute
        again, found = gradients(student, pairs)
        torch.testing.assert_close(again, scores, rtol=1e-6, atol=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert any("word_embeddings" in name and gradient.abs().sum() > 0 for name, gradient in expected.items())


def test_gradient_caching_keeps_the_activations_of_one_batch_only(tiny: str, pairs: Pairs) -> None:
    student = BiScorer(tiny).train()
    kept = {}
    for recompute in (False, True):
        student.recompute, sizes = recompute, []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            student(pairs)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.1 * kept[False]


def test_an_id_that_was_not_gathered_is_looked_up_in_the_whole_table(tiny: str) -> None:
    model = BiScorer(tiny).model
    embedding = token_embedding(model)
    assert embedding is not None

    def encode(batch: list[np.ndarray]) -> Tensor:
        return embedding(torch.tensor([[int(batch[0][0]), 7]])).sum((1, 2))  # 7 is in no sequence

    tokens = [np.array([3], dtype=np.int32), np.array([5], dtype=np.int32)]
    expected = torch.stack([embedding.weight[[int(ids[0]), 7]].sum() for ids in tokens])
    torch.testing.assert_close(in_batches(tokens, 1, encode, model=model), expected)
    assert "forward" not in embedding.__dict__


def test_an_embedding_that_does_more_than_look_up_is_left_alone(tiny: str) -> None:
    model = BiScorer(tiny).model
    found = token_embedding(model)
    assert found is not None
    found.max_norm = 1.0
    assert token_embedding(model) is None
    assert token_embedding(nn.Linear(2, 2)) is None


def test_a_gpu_takes_larger_batches() -> None:
    assert token_budget(torch.device("cuda")) > token_budget(torch.device("cpu")) == token_budget()
