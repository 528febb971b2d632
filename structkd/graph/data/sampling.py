"""Neighbour sampling: the few rows that a batch of nodes needs, layer by layer, from a graph of any size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from structkd.errors import DataError, UsageError
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask
from structkd.graph.kernels import _sample

Rows = Int[np.ndarray, " rows"]

ALL = -1
"Fan-out that takes every neighbour."


@dataclass(frozen=True, eq=False)
class Block:
    """Edges of one layer, from source rows to target rows; the targets are the first of the sources.

    Attributes:
        starts, columns: per target, local numbers of the neighbours drawn for it.
        sources: rows of the graph behind the local numbers.
        degrees: number of neighbours of each source in the whole graph.
    """

    starts: Int[np.ndarray, " targets_plus_one"]
    columns: Int[np.ndarray, " drawn"]
    sources: Int[np.ndarray, " sources"]
    degrees: Int[np.ndarray, " sources"]

    @property
    def num_targets(self) -> int:
        """Rows that come out."""
        return len(self.starts) - 1

    def edges(self) -> Int[Tensor, "2 drawn"]:
        """Local [source, target] pairs, as torch_geometric's bipartite layers take them; no self-loops."""
        targets = np.repeat(np.arange(self.num_targets), np.diff(self.starts))
        return torch.from_numpy(np.stack([self.columns, targets]))

    def operator(self, self_loops: float, normalisation: Literal["symmetric", "row"]) -> SparseMatrix:
        """The rows of `spectral.propagation` for these targets, estimated from the neighbours drawn.

        A target with k of its d neighbours drawn weighs each by d / k, so the propagated signal is unbiased; with
        every neighbour drawn it is exact.
        """
        count, drawn = self.num_targets, np.diff(self.starts)
        sums = self.degrees + self_loops
        safe = np.where(sums > 0, sums, 1.0)
        targets = np.repeat(np.arange(count), drawn)
        shared = self.degrees[:count] / np.maximum(drawn, 1)
        symmetric = normalisation == "symmetric"
        scale = 1.0 / (np.sqrt(safe[targets] * safe[self.columns]) if symmetric else safe[targets])
        rows = np.arange(count)
        columns, values = self.columns, shared[targets] * scale
        starts = self.starts
        if self_loops:  # the loop is the first entry of each row
            columns = np.insert(columns, starts[:-1], rows)
            values = np.insert(values, starts[:-1], self_loops / safe[:count])
            starts = starts + np.arange(count + 1)
        return SparseMatrix(
            torch.from_numpy(starts), torch.from_numpy(columns), torch.from_numpy(values.astype(np.float32)),
            len(self.sources),
        )  # fmt: skip


class NeighbourSampler:
    """Draws the blocks of a batch; `fan_outs` run from the input layer to the last, ALL (-1) takes every neighbour.

    Neighbours are drawn uniformly without replacement, by (seed, node, layer) alone: the same batch gives the same
    blocks, and a node draws the same neighbours whatever stands beside it. The kernels release the GIL; one sampler
    serves one thread at a time, since it keeps a scratch row per node.
    """

    def __init__(
        self, starts: Int[np.ndarray, " nodes_plus_one"], columns: Int[np.ndarray, " edges"], fan_outs: Sequence[int]
    ) -> None:
        if not fan_outs or any(fan_out != ALL and fan_out < 1 for fan_out in fan_outs):
            raise UsageError(
                f"fan-outs {tuple(fan_outs)}: expected one number per layer, each 1 or more, or {ALL} for every one."
            )
        if len(starts) < 1 or int(starts[-1]) != len(columns):
            raise DataError(f"compressed rows end at {int(starts[-1])}, but there are {len(columns)} columns.")
        self.starts, self.columns, self.fan_outs = starts, columns, tuple(fan_outs)
        self._place = np.full(len(starts) - 1, -1, dtype=np.int64)

    @classmethod
    def of(cls, task: GraphTask, fan_outs: Sequence[int]) -> "NeighbourSampler":
        """Over a task's own edges; nothing is copied."""
        return cls(task.adjacency.starts.numpy(), task.adjacency.columns.numpy(), fan_outs)

    def blocks(self, rows: Rows, seed: int = 0) -> list[Block]:
        """One block per layer, input side first; the last block's targets are `rows`.

        Raises:
            DataError: a row outside the graph, or one asked for twice.
        """
        targets = np.ascontiguousarray(rows, dtype=np.int64)
        nodes = len(self.starts) - 1
        if len(targets) and (targets.min() < 0 or targets.max() >= nodes):
            raise DataError(f"rows {targets.min()} to {targets.max()} asked for; the graph has rows 0 to {nodes - 1}.")
        if len(np.unique(targets)) != len(targets):
            raise DataError(f"{len(targets)} rows asked for, some of them twice; a batch holds each node once.")
        blocks: list[Block] = []
        for layer in reversed(range(len(self.fan_outs))):
            blocks.append(self._block(targets, self.fan_outs[layer], seed * len(self.fan_outs) + layer))
            targets = blocks[-1].sources
        return blocks[::-1]

    def _block(self, targets: Rows, fan_out: int, seed: int) -> Block:
        starts = np.empty(len(targets) + 1, dtype=np.int64)
        _sample.block_starts(self.starts, targets, fan_out, starts)
        drawn = np.empty(int(starts[-1]), dtype=np.int64)
        _sample.draw(self.starts, self.columns, targets, seed, starts, drawn)
        sources = np.empty(min(len(self._place), len(targets) + len(drawn)), dtype=np.int64)
        sources = sources[: _sample.renumber(targets, drawn, self._place, sources)].copy()
        return Block(starts, drawn, sources, self.starts[sources + 1] - self.starts[sources])
