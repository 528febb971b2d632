"""Teachers on part of a graph: the rows that a batch needs, sampled neighbourhoods, whole-graph answers in blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, elu

from structkd.errors import UsageError
from structkd.graph.data.sampling import ALL, Block, NeighbourSampler
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask, chunks, rows_of
from structkd.graph.evaluate import validation
from structkd.graph.models.networks import Appnp, Gat, Gcn, Sage, relu_dropout
from structkd.graph.spectral import propagated
from structkd.progress import track

Logits = Float[Tensor, "nodes classes"]
Operator = SparseMatrix | tuple[Tensor, int]

SAMPLED = (Gcn, Sage, Gat)
"Models that run layer by layer on blocks."


def operators(model: nn.Module, blocks: Sequence[Block]) -> list[Operator]:
    """What each layer of a model multiplies by: rows of its propagation, or edges and the number of targets.

    Raises:
        UsageError: a model that does not run on sampled neighbourhoods.
    """
    if isinstance(model, Gcn | Sage):
        normalisation: Any = model.normalisation
        return [block.operator(model.self_loops, normalisation) for block in blocks]
    if isinstance(model, Gat):
        return [(block.edges(), block.num_targets) for block in blocks]
    raise UsageError(f"teacher {type(model).__name__.lower()} cannot be sampled; expected gcn, sage or gat.")


def on_blocks(model: Any, x: Features, layers: Sequence[Operator]) -> Logits:
    """Logits of the last block's targets; x holds the features of the first block's sources."""
    out: Any = x
    for depth, operator in enumerate(layers):
        if isinstance(operator, SparseMatrix):
            if depth:
                out = relu_dropout(out, model.dropout, model.training)
            out = _convolved(model.layers[depth], out, operator)
        else:
            edges, targets = operator
            mapped = model.mapped(depth, out)
            out = model.attention[depth]((mapped, mapped[:targets]), edges)
            if depth < len(layers) - 1:
                out = elu(out)
    assert isinstance(out, Tensor)
    return out


def _convolved(layer: Any, x: Features, operator: SparseMatrix) -> Tensor:
    """operator @ x @ weight + bias, in the order that multiplies less."""
    if isinstance(x, SparseMatrix):
        out = operator.product(x.product(layer.weight))
    else:
        inputs, outputs = layer.weight.shape
        entries, (rows, columns) = len(operator.values), operator.shape
        map_first = columns * inputs * outputs + entries * outputs < rows * inputs * outputs + entries * inputs
        out = operator.product(x @ layer.weight) if map_first else operator.product(x) @ layer.weight
    return out if layer.bias is None else out + layer.bias


def restricted(
    model: nn.Module, seen: GraphTask, rows: Int[Tensor, " rows"], whole: Callable[[], Any]
) -> Callable[[], Logits]:
    """Logits of some nodes by every neighbour of theirs, exactly as on the whole graph; the part is cut out once.

    Where nearly the whole graph is within reach, or the model does not run on blocks, `whole` gives its operator.
    """
    if isinstance(model, Gcn | Sage):
        sampler = NeighbourSampler.of(seen, [ALL] * len(model.layers))
        blocks = sampler.blocks(rows.numpy())
        if sum(block.num_targets for block in blocks) < 0.75 * seen.num_nodes * len(blocks):
            x, layers = rows_of(seen.x, torch.from_numpy(blocks[0].sources)), operators(model, blocks)
            return lambda: on_blocks(model, x, layers)
    return lambda: model(seen.x, whole())[rows]


@dataclass(frozen=True, eq=False)
class SampledTraining:
    """The teacher's loss and validation from sampled neighbourhoods; every training node once per epoch.

    Attributes:
        fan_outs: neighbours drawn per layer, input side first.
        batch: target nodes per step.
    """

    model: nn.Module
    seen: GraphTask
    fan_outs: tuple[int, ...]
    batch: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch."""
        return -(-int(self.seen.train.sum()) // self.batch)

    def loss_of(self) -> Callable[[int], Tensor]:
        """epoch -> cross-entropy of the next batch of training nodes."""
        sampler, train = NeighbourSampler.of(self.seen, self.fan_outs), torch.nonzero(self.seen.train).flatten()
        state: dict[str, Any] = {"epoch": 0, "parts": []}

        def loss(epoch: int) -> Tensor:
            if epoch != state["epoch"] or not state["parts"]:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(train))
                state.update(epoch=epoch, parts=np.array_split(order, self.steps)[::-1])
            rows = train[state["parts"].pop()]
            seed = (self.seed * 100_003 + epoch) * 1009 + len(state["parts"])
            return cross_entropy(self._logits(sampler, rows, seed), self.seen.y[rows])

        return loss

    def validate(self) -> Callable[[], tuple[float, float]]:
        """Metric and cross-entropy on validation nodes from sampled neighbourhoods, the same in every epoch."""
        sampler, rows = NeighbourSampler.of(self.seen, self.fan_outs), torch.nonzero(self.seen.valid).flatten()

        def answers() -> Tensor:
            return torch.cat([self._logits(sampler, rows[part], self.seed) for part in chunks(len(rows), self.batch)])

        return validation(self.seen, answers)

    def _logits(self, sampler: NeighbourSampler, rows: Tensor, seed: int) -> Tensor:
        blocks = sampler.blocks(rows.numpy(), seed)
        x = rows_of(self.seen.x, torch.from_numpy(blocks[0].sources))
        return on_blocks(self.model, x, operators(self.model, blocks))


def parsed_fan_outs(text: str, layers: int) -> tuple[int, ...]:
    """Fan-outs from "5,5", one per layer, input side first; "all" or -1 takes every neighbour.

    Raises:
        UsageError: not one whole number per layer.
    """
    try:
        found = tuple(ALL if part.strip() == "all" else int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"fan-out {text!r}: expected whole numbers, as in 5,5.") from None
    if len(found) != layers:
        raise UsageError(
            f"fan-out {text!r}: {len(found)} numbers for a teacher of {layers} layers; give one per layer."
        )
    return found


@torch.no_grad()
def layerwise_logits(model: nn.Module, task: GraphTask, batch: int = 1 << 14) -> Logits:
    """Logits of every node with full neighbourhoods, one layer at a time over blocks of nodes.

    Holds two [nodes, width] signals and one block's work; equal to the model on the whole graph but for rounding.
    """
    model.eval()
    if isinstance(model, Gcn | Sage):
        return _layerwise_convolutions(model, task, batch)
    if isinstance(model, Gat):
        return _layerwise_attention(model, task, batch)
    if isinstance(model, Appnp):
        start = _by_rows(model.predict, task.x, batch)
        out = start
        for _ in range(model.steps):
            out = propagated(task, out).mul_(1 - model.restart).add_(start, alpha=model.restart)
        return out
    whole: Tensor = model(task.x, model.prepare(task))  # type: ignore[operator]
    return whole


def _layerwise_convolutions(model: Gcn | Sage, task: GraphTask, batch: int) -> Tensor:
    out: Features = task.x
    normalisation: Any = model.normalisation
    layers: list[Any] = list(model.layers)
    for depth, layer in enumerate(layers):
        inputs, outputs = layer.weight.shape
        if isinstance(out, Tensor) and inputs < outputs:
            out = propagated(task, out, model.self_loops, normalisation)
            out = _by_rows(layer, out, batch)
        else:
            out = _by_rows(partial(_mapped, layer.weight), out, batch)
            out = propagated(task, out, model.self_loops, normalisation)
            if layer.bias is not None:
                out += layer.bias
        if depth < len(model.layers) - 1:
            out.relu_()
    assert isinstance(out, Tensor)
    return out


def _mapped(weight: Tensor, x: Features) -> Tensor:
    return x.product(weight) if isinstance(x, SparseMatrix) else x @ weight


def _layerwise_attention(model: Gat, task: GraphTask, batch: int) -> Tensor:
    sampler = NeighbourSampler.of(task, [ALL])
    out: Features = task.x
    for depth, attention in enumerate(model.attention):
        mapped = _by_rows(partial(model.mapped, depth), out, batch)
        parts = []
        for rows in track(chunks(task.num_nodes, batch), "layer, blocks of nodes", late=True):
            (block,) = sampler.blocks(np.arange(rows.start, rows.stop))
            near = mapped[torch.from_numpy(block.sources)]
            parts.append(attention((near, near[: block.num_targets]), block.edges()))
        out = torch.cat(parts)
        if depth < len(model.attention) - 1:
            out = elu(out)
    assert isinstance(out, Tensor)
    return out


def _by_rows(function: Callable[[Any], Tensor], x: Features, batch: int) -> Tensor:
    """A function of rows over blocks of them, into one tensor."""
    out = None
    for rows in chunks(x.shape[0], batch):
        part = function(x[rows] if isinstance(x, Tensor) else rows_of(x, torch.arange(rows.start, rows.stop)))
        out = part.new_empty(x.shape[0], part.shape[1]) if out is None else out
        out[rows] = part
    assert out is not None
    return out
