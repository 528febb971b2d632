"""What an answer costs: a graph teacher fetches the neighbourhood of the nodes asked for, an MLP reads their rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.graph.data import GraphTask
from structkd.graph.distillation import rows_of
from structkd.graph.sparse import SparseMatrix
from structkd.graph.teacher import Teacher


@dataclass(frozen=True)
class Latency:
    """rows: model, batch, p50_ms, p99_ms, nodes_per_second; speedup: teacher p50 / student p50 at the largest batch."""

    rows: tuple[dict[str, Any], ...]
    speedup: float


def latency(
    task: GraphTask,
    teacher: Teacher,
    student: nn.Module,
    batches: Sequence[int] = (1, 10),
    repeats: int = 30,
    seed: int = 0,
) -> Latency:
    """Time both models on the same random nodes, one request after the other; neighbour fetch counts for the teacher.

    The first request of each model is shown as "cold" and left out of the percentiles.

    Raises:
        UsageError: no batch size, one outside [1, nodes], or fewer than 2 repeats.
    """
    if not batches or min(batches) < 1 or max(batches) > task.num_nodes or repeats < 2:
        raise UsageError(
            f"batches {tuple(batches)}, repeats {repeats}: expected sizes in [1, {task.num_nodes}] and 2 repeats up."
        )
    fetch = NeighbourhoodTeacher(teacher, task)
    student.eval()
    answers: dict[str, Callable[[Tensor], Tensor]] = {
        teacher.config.model: fetch.logits,
        "mlp": lambda rows: student(rows_of(task.x, rows)),
    }
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch in batches:
        asked = [torch.randperm(task.num_nodes, generator=generator)[:batch] for _ in range(repeats + 1)]
        rows += [_timed(name, answer, batch, asked) for name, answer in answers.items()]
    return Latency(tuple(rows), rows[-2]["p50_ms"] / rows[-1]["p50_ms"])


class NeighbourhoodTeacher:
    """A teacher that answers for a few nodes from their neighbourhood alone, exactly as on the whole graph."""

    def __init__(self, teacher: Teacher, task: GraphTask) -> None:
        self.model, self.task = teacher.model.eval(), task
        self.operator = self.model.prepare(task)  # type: ignore[operator]
        layers = teacher.config.layers
        assert layers is not None
        self.hops = getattr(self.model, "steps", layers)

    @torch.no_grad()
    def logits(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
        """Logits of some nodes: fetch `hops` rings of neighbours, run the model on them, keep the nodes asked for."""
        near = self.neighbourhood(rows.numpy())
        place = np.searchsorted(near, rows.numpy())
        x = rows_of(self.task.x, torch.from_numpy(near))
        out: Tensor = self.model(x, self._local(near))
        return out[torch.from_numpy(place)]

    def neighbourhood(self, rows: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " near"]:
        """Sorted nodes within `hops` steps."""
        adjacency = self.task.adjacency
        starts, columns = adjacency.starts.numpy(), adjacency.columns.numpy()
        near = frontier = np.unique(rows)
        for _ in range(self.hops):
            reached = [columns[starts[node] : starts[node + 1]] for node in frontier]
            found = np.unique(np.concatenate([*reached, near]))
            frontier = np.setdiff1d(found, near, assume_unique=True)
            near = found
            if not len(frontier):
                break
        return near

    def _local(self, near: Int[np.ndarray, " near"]) -> SparseMatrix | Tensor:
        """The operator cut to these nodes; values are the whole graph's, so the asked nodes' logits are exact."""
        if isinstance(self.operator, SparseMatrix):
            return SparseMatrix.of(self.operator.scipy[near][:, near])
        cut = self.task.adjacency.scipy[near][:, near].tocoo()
        return torch.from_numpy(np.stack([cut.row, cut.col]).astype(np.int64))


@torch.no_grad()
def _timed(name: str, answer: Callable[[Tensor], Tensor], batch: int, asked: Sequence[Tensor]) -> dict[str, Any]:
    milliseconds = []
    for rows in asked:
        started = time.perf_counter()
        answer(rows)
        milliseconds.append((time.perf_counter() - started) * 1e3)
    cold, *warm = milliseconds
    middle = float(np.percentile(warm, 50))
    return {
        "model": name,
        "batch": batch,
        "p50_ms": middle,
        "p99_ms": float(np.percentile(warm, 99)),
        "nodes_per_second": batch / middle * 1e3,
        "cold_ms": cold,
    }
