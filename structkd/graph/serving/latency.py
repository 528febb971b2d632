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
from structkd.graph.data.sampling import ALL, NeighbourSampler
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask, rows_of
from structkd.graph.models.sampled import SAMPLED, on_blocks, operators
from structkd.graph.models.teacher import Teacher

_CACHE_BYTES = 1 << 27
"Written over before a cold request: more than the last-level cache of most machines."


@dataclass(frozen=True)
class Latency:
    """rows: model, batch, p50_ms, p99_ms, nodes_per_second of warm requests; cold_p50_ms and cold_p99_ms with the
    processor's caches written over before each request; first_ms, the first request of all. speedup: teacher p50 /
    student p50 at the largest batch, warm; cold_speedup the same, cold.
    """

    rows: tuple[dict[str, Any], ...]
    speedup: float
    cold_speedup: float


def latency(
    task: GraphTask,
    teacher: Teacher,
    student: nn.Module,
    batches: Sequence[int] = (1, 10),
    repeats: int = 30,
    seed: int = 0,
    *,
    x: Features | None = None,
    fan_outs: Sequence[int] | None = None,
    cold: int = 5,
) -> Latency:
    """Time both models on the same nodes, one request after the other; neighbour fetch counts for the teacher.

    The nodes are drawn from those that training never saw (hidden ones where the setting hides some, else test nodes).

    Args:
        x: what the student reads, when that is not the task's features.
        fan_outs: neighbours that the teacher reads per layer; None: all of them, as its logits were made.
        cold: requests with cold caches per size, at most `repeats`.

    Raises:
        UsageError: no batch size, one outside [1, nodes], fewer than 2 repeats, or fan-outs for a teacher that cannot
            be sampled.
    """
    if not batches or min(batches) < 1 or max(batches) > task.num_nodes or repeats < 2:
        raise UsageError(
            f"batches {tuple(batches)}, repeats {repeats}: expected sizes in [1, {task.num_nodes}] and 2 repeats up."
        )
    fetch = NeighbourhoodTeacher(teacher, task, fan_outs)
    read = task.x if x is None else x
    student.eval()
    answers: dict[str, Callable[[Tensor], Tensor]] = {
        teacher.config.model: fetch.logits,
        "mlp": lambda rows: student(rows_of(read, rows)),
    }
    unseen = torch.nonzero(task.hidden if bool(task.hidden.any()) else task.test).flatten()
    pool = unseen.numpy() if len(unseen) >= max(batches) else np.arange(task.num_nodes)
    generator, flush = np.random.default_rng(seed), np.zeros(_CACHE_BYTES, dtype=np.uint8)
    rows = []
    for batch in batches:
        asked = [torch.from_numpy(generator.choice(pool, batch, replace=False)) for _ in range(repeats + 1)]
        rows += [_timed(name, answer, batch, asked, min(cold, repeats), flush) for name, answer in answers.items()]
    theirs, ours = rows[-2:]
    cold_speedup = theirs["cold_p50_ms"] / ours["cold_p50_ms"] if cold else float("nan")
    return Latency(tuple(rows), theirs["p50_ms"] / ours["p50_ms"], cold_speedup)


class NeighbourhoodTeacher:
    """A teacher that answers for a few nodes from their neighbourhood alone, exactly as on the whole graph.

    With `fan_outs`, from so many drawn neighbours per layer, the draw fixed per node.
    """

    def __init__(self, teacher: Teacher, task: GraphTask, fan_outs: Sequence[int] | None = None) -> None:
        self.model, self.task = teacher.model.eval(), task
        layers = teacher.config.layers
        assert layers is not None
        self.hops = getattr(self.model, "steps", layers)
        self.sampler = None
        if isinstance(self.model, SAMPLED):
            self.sampler = NeighbourSampler.of(task, fan_outs or [ALL] * layers)
        elif fan_outs is not None:
            raise UsageError(f"teacher {teacher.config.model} cannot be sampled; expected gcn, sage or gat.")
        else:
            self.operator = self.model.prepare(task)  # type: ignore[operator]

    @torch.no_grad()
    def logits(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
        """Logits of some nodes: fetch `hops` rings of neighbours, run the model on them, keep the nodes asked for."""
        if self.sampler is not None:
            asked, place = np.unique(rows.numpy(), return_inverse=True)
            blocks = self.sampler.blocks(asked)
            x = rows_of(self.task.x, torch.from_numpy(blocks[0].sources))
            return on_blocks(self.model, x, operators(self.model, blocks))[torch.from_numpy(place)]
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

    def _local(self, near: Int[np.ndarray, " near"]) -> SparseMatrix:
        """The operator cut to these nodes; values are the whole graph's, so the asked nodes' logits are exact."""
        return SparseMatrix.of(self.operator.scipy[near][:, near])


@torch.no_grad()
def _timed(
    name: str, answer: Callable[[Tensor], Tensor], batch: int, asked: Sequence[Tensor], cold: int, flush: Any
) -> dict[str, Any]:
    first, *warm = [_milliseconds(answer, rows) for rows in asked]
    found = _percentiles(warm)
    out: dict[str, Any] = {"model": name, "batch": batch, **found, "nodes_per_second": batch / found["p50_ms"] * 1e3}
    out["first_ms"] = first
    if cold:
        times = []
        for rows in asked[:cold]:
            flush += 1
            times.append(_milliseconds(answer, rows))
        out |= _percentiles(times, "cold_")
    return out


def _milliseconds(answer: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    started = time.perf_counter()
    answer(rows)
    return (time.perf_counter() - started) * 1e3


def _percentiles(milliseconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    return {f"{prefix}p{share}_ms": float(np.percentile(milliseconds, share)) for share in (50, 99)}
