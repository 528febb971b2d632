"""Dropout on CPU, at the price of one pass: torch draws, keeps and multiplies, and has no fused attention that drops.

Under `HashedDropout` torch's own dropout and attention run here when they drop and are float32 on CPU, whatever model
calls them. Same distribution, other draws: each is a hash of its place and of a seed from torch's random state, so the
backward pass makes them again in place of keeping them, and a training continued from its state draws the same.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from structkd.kernels import seed_of_draws
from structkd.ranking.training import _dropout

_MOST_THREADS = 6
"Beyond, by arithmetic from one thread's times, torch's passes on all threads take no longer than numba's on one."

_BLOCK = 1 << 20
"Attention weights made at once: those of whole texts, in the processor's cache."

Heads = Float[Tensor, "texts heads tokens width"]
Keys = Float[Tensor, "texts heads others width"]
Values = Float[Tensor, "texts heads others values"]
Shares = Float[Tensor, "parts tokens others"]


class HashedDropout(TorchFunctionMode):
    """Inside this context dropout and attention with dropout on CPU draw by hash."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = _OURS.get(function)
        found = None if ours is None else ours(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {})) if found is None else found


def drops_on(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What a training on this device encodes in."""
    return HashedDropout if device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS else nullcontext


def _dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    """functional.dropout, or None where torch's own has to do it."""
    if not training or inplace or not _fits(p, x):
        return None
    out: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """functional.scaled_dot_product_attention, or None where torch's own has to do it."""
    learned = attn_mask is not None and attn_mask.requires_grad
    if is_causal or enable_gqa or learned or query.dim() != 4 or not _fits(dropout_p, query, key, value):
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        attn_mask = None if bool(attn_mask.all()) else query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, least)
    if attn_mask is not None:
        shape = (len(query), query.shape[1], attn_mask.shape[-2], key.shape[2])
        attn_mask = attn_mask.expand(shape)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out: Tensor = _Attention.apply(query, key, value, attn_mask, dropout_p, factor)  # type: ignore[no-untyped-call]
    return out


_OURS: dict[Any, Callable[..., Tensor | None]] = {
    functional.dropout: _dropped,
    functional.scaled_dot_product_attention: _attended,
}


def _fits(p: float, *tensors: Tensor) -> bool:
    return 0 < p < 1 and all(one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)


class _Draws:
    """One call's draws, and the scale of what they keep."""

    def __init__(self, p: float) -> None:
        self.draws, self.scale = seed_of_draws(p), np.float32(1 / (1 - p))

    def drop(self, x: Tensor, out: Tensor, first: int = 0) -> None:
        """Contiguous x -> out (x itself, too)."""
        _dropout.drop(_rows(x), first, *self.draws, self.scale, _rows(out))

    def slope(self, shares: Tensor, gradient: Tensor, first: int) -> None:
        """In place: from dropped soft-max shares to the scores under the soft-max."""
        _dropout.soft_max_slope(_rows(shares), _rows(gradient), first, *self.draws, self.scale)


def _rows(x: Tensor) -> NDArray[np.float32]:
    return x.detach().view(-1, x.shape[-1]).numpy()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.draws, source = _Draws(p), x.contiguous()
        out = torch.empty_like(source)
        ctx.draws.drop(source, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        slope = torch.empty_like(gradient)
        ctx.draws.drop(gradient, slope)
        return slope, None


class _Attention(torch.autograd.Function):
    """drop(softmax(factor q k^T + bias)) v, some texts at a time; the shares are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Heads, k: Keys, v: Values, bias: Tensor | None, p: float, factor: float) -> Tensor:
        ctx.draws, ctx.factor = _Draws(p), factor
        q, k, v = (q * factor).contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, bias)
        # laid out as models read it next: the heads of a token side by side
        out = v.new_empty((len(q), q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
        for block, first in _blocks(q, k):
            shares = _shares(q, k, bias, block)
            ctx.draws.drop(shares, shares, first)
            out[block] = (shares @ v[block].flatten(0, 1)).view(-1, *out.shape[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, bias = ctx.saved_tensors
        slopes = [torch.empty_like(one) for one in (q, k, v)]
        given = gradients[0].contiguous()
        for block, first in _blocks(q, k):
            shares = _shares(q, k, bias, block)
            kept = torch.empty_like(shares)
            ctx.draws.drop(shares, kept, first)
            to_q, to_k, to_v = (one[block].flatten(0, 1) for one in slopes)
            gradient = given[block].flatten(0, 1)
            torch.bmm(kept.transpose(1, 2), gradient, out=to_v)
            torch.bmm(gradient, v[block].flatten(0, 1).transpose(1, 2), out=kept)
            ctx.draws.slope(shares, kept, first)
            torch.bmm(kept, k[block].flatten(0, 1), out=to_q)
            torch.bmm(kept.transpose(1, 2), q[block].flatten(0, 1), out=to_k)
        return slopes[0].mul_(ctx.factor), slopes[1], slopes[2], None, None, None


def _blocks(q: Heads, k: Keys) -> list[tuple[slice, int]]:
    """Texts that are attended to at once, and the number of the first row of shares among all."""
    texts, heads, tokens, _ = q.shape
    step = max(1, _BLOCK // (heads * tokens * k.shape[2]))
    return [(slice(start, start + step), start * heads * tokens) for start in range(0, texts, step)]


def _shares(q: Heads, k: Keys, bias: Tensor | None, block: slice) -> Shares:
    """Soft-max of q k^T + bias, the heads of all texts of a block in a row."""
    left, right = q[block].flatten(0, 1), k[block].flatten(0, 1).transpose(1, 2)
    scores = left @ right if bias is None else torch.baddbmm(bias[block].flatten(0, 1), left, right)
    return torch.softmax(scores, dim=-1)
