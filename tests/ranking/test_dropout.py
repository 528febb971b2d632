"""Dropout by hash: the distribution, the gradient, the same draws again, and attention against a slow one."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel

from structkd.ranking.training import dropout
from structkd.ranking.training.dropout import HashedDropout

P = 0.3


def heads(texts: int = 3, count: int = 2, tokens: int = 5, width: int = 5) -> list[Tensor]:
    """Query, key and value as models hand them over, with gradient."""
    torch.manual_seed(0)
    return [torch.randn(texts, tokens, count, width).transpose(1, 2).requires_grad_() for _ in range(3)]


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    with HashedDropout():
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=P)


def test_it_drops_the_share_it_should_and_scales_the_rest() -> None:
    x = torch.rand(400, 500) + 1
    with HashedDropout():
        out = functional.dropout(x, P)
    kept = out != 0
    assert abs(1 - float(kept.float().mean()) - P) < 4 * math.sqrt(P * (1 - P) / x.numel())
    torch.testing.assert_close(out[kept], x[kept] / (1 - P))
    # no row or column is special, and neighbours know nothing of each other
    for axis in (0, 1):
        shares = kept.float().mean(axis)
        assert float(shares.std()) < 1.15 * math.sqrt(P * (1 - P) / x.shape[axis])
    rows = kept.flatten().double().numpy()
    for step in (1, 2, 499, 500, 501):
        assert abs(np.corrcoef(rows[step:], rows[:-step])[0, 1]) < 4 / math.sqrt(len(rows))


def test_the_gradient_stops_where_the_value_was_dropped() -> None:
    x = torch.randn(7, 11, 5).transpose(0, 1).requires_grad_()
    with HashedDropout():
        out = functional.dropout(x, P)
        out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, out.detach() / x.detach())


def test_a_seed_gives_the_same_draws_and_each_call_its_own() -> None:
    x = torch.ones(50, 50)
    with HashedDropout():
        torch.manual_seed(3)
        first, second = functional.dropout(x, P), functional.dropout(x, P)
        torch.manual_seed(3)
        again = functional.dropout(x, P)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("masked", ["no", "all seen", "padding", "rows", "additive"])
@pytest.mark.parametrize("block", [1 << 20, 1])
def test_attention_and_its_gradients_equal_a_slow_one_with_the_same_draws(
    masked: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropout, "_BLOCK", block)
    q, k, v = heads()
    seen = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    if masked in ("padding", "additive"):
        seen[1, :, :, 3:], seen[2, :, :, 1:] = False, False
    mask: Tensor | None = seen
    if masked == "rows":
        mask = torch.ones(5, 5).tril().bool()
    elif masked == "additive":
        mask = torch.zeros(seen.shape).masked_fill(~seen, -1e4)
    elif masked == "no":
        mask = None
    # values that are the unit vectors show the dropped shares themselves
    kept = attended(q, k, torch.eye(5).expand(3, 2, 5, 5), mask).detach() != 0
    slow = [one.detach().double().requires_grad_() for one in (q, k, v)]
    scores = slow[0] @ slow[1].transpose(2, 3) / math.sqrt(5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    expected = (scores.softmax(-1) * kept / (1 - P)) @ slow[2]
    found = attended(q, k, v, mask)
    weights = torch.randn(found.shape)
    expected.backward(weights.double())
    found.backward(weights)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip((q, k, v), slow, strict=True):
        torch.testing.assert_close(one.grad, other.grad.float(), atol=1e-5, rtol=1e-5)


def test_over_many_draws_attention_is_that_without_dropout() -> None:
    q, k, v = (one.detach() for one in heads())
    mean = torch.stack([attended(q, k, v, seed=seed) for seed in range(3000)]).mean(0)
    torch.testing.assert_close(mean, functional.scaled_dot_product_attention(q, k, v), atol=0.08, rtol=0)


def test_what_does_not_drop_or_is_not_float32_is_torchs_own() -> None:
    q, k, v = (one.detach() for one in heads())
    calls = [
        lambda: functional.dropout(q, P, training=False),
        lambda: functional.dropout(q, 0.0),
        lambda: functional.dropout(q, 1.0),
        lambda: functional.dropout(q.double(), P),
        lambda: functional.dropout(q.bfloat16(), P),
        lambda: functional.dropout(q.clone(), P, inplace=True),
        lambda: functional.scaled_dot_product_attention(q, k, v),
        lambda: functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), dropout_p=P),
        lambda: functional.scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True),
        lambda: functional.scaled_dot_product_attention(q[0], k[0], v[0], dropout_p=P),
    ]
    for call in calls:
        torch.manual_seed(0)
        expected = call()
        torch.manual_seed(0)
        with HashedDropout():
            assert torch.equal(call(), expected)


def test_a_transformer_trains_under_it_and_answers_as_before() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model, ids = BertModel(config), torch.randint(1, 50, (4, 9))
    mask = torch.ones_like(ids)
    mask[1:, 6:] = 0
    model.eval()
    plain = model(ids, attention_mask=mask).last_hidden_state
    with HashedDropout():
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, plain)
        model.train()
        torch.manual_seed(1)
        first = model(ids, attention_mask=mask).last_hidden_state
        torch.manual_seed(1)
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, first)
        assert not torch.equal(first, plain)
        first.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
