"""Distillation losses against the naive per-edge gather, as ratios in one process (one thread, CPU time).

python benchmarks/bench_graph_losses.py --data-root DATA amazon:Photo coauthor:CS
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from origin import RESULTS, commit, machine
from torch import Tensor
from torch.nn.functional import log_softmax

from structkd import graph
from structkd.graph import losses

TEMPERATURE = 1.5


def naive_low(student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """Mean over directed edges with self-loops of KL(t_j || s_i), gathered per edge every step."""
    loops = torch.arange(len(student))
    i, j = torch.cat([edges, torch.stack([loops, loops])], dim=1)
    wanted = log_softmax(teacher[j], dim=1)
    return (wanted.exp() * (wanted - log_softmax(student[i], dim=1))).sum(dim=1).mean()


def naive_high(student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """Mean over directed edges of KL between softened absolute differences, gathered per edge every step."""
    i, j = edges
    wanted = log_softmax((teacher[i] - teacher[j]).abs() / TEMPERATURE, dim=1)
    mine = log_softmax((student[i] - student[j]).abs() / TEMPERATURE, dim=1)
    return (wanted.exp() * (wanted - mine)).sum(dim=1).mean()


def step(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[float, Tensor]:
    value = loss(student)
    (gradient,) = torch.autograd.grad(value, student)
    return float(value.detach()), gradient


def milliseconds(loss: Callable[[Tensor], Tensor], student: Tensor, repeats: int) -> list[float]:
    step(loss, student)
    times = []
    for _ in range(repeats):
        started = time.process_time()
        step(loss, student)
        times.append((time.process_time() - started) * 1e3)
    return times


def compare(dataset: str, root: str | None, repeats: int) -> dict:
    task = graph.load(dataset, root, "random")
    generator = torch.Generator().manual_seed(0)
    shape = (task.num_nodes, task.classes)
    wide = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    out = {"dataset": dataset, "nodes": shape[0], "directed_edges": task.edge_index.shape[1], "classes": shape[1]}
    for dtype in (torch.float64, torch.float32):
        student, teacher = wide[0].to(dtype).requires_grad_(), wide[1].to(dtype)
        low = losses.soft_targets(teacher, losses.neighbour_weights(task))
        high = losses.difference_targets(teacher, task.edge_index, TEMPERATURE)

        def naive_both(s: Tensor, t: Tensor = teacher) -> Tensor:
            return naive_low(s, t, task.edge_index) + naive_high(s, t, task.edge_index)

        def ours_both(s: Tensor, a=low, b=high) -> Tensor:
            return losses.low_frequency(s, a) + losses.high_frequency(s, b)

        pairs = {
            "low": (lambda s, t=teacher: naive_low(s, t, task.edge_index), lambda s, a=low: losses.low_frequency(s, a)),
            "both": (naive_both, ours_both),
        }
        for name, (naive, ours) in pairs.items():
            if dtype == torch.float64:
                (a, gradient_a), (b, gradient_b) = step(naive, student), step(ours, student)
                out[f"{name}_value_difference"] = abs(a - b)
                out[f"{name}_gradient_difference"] = float((gradient_a - gradient_b).abs().max())
                continue
            slow, fast = milliseconds(naive, student, repeats), milliseconds(ours, student, repeats)
            out[f"{name}_naive_ms"] = statistics.median(slow)
            out[f"{name}_ms"] = statistics.median(fast)
            out[f"{name}_spread_ms"] = max(fast) - min(fast)
            out[f"{name}_speedup"] = statistics.median(slow) / statistics.median(fast)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(dataset, arguments.data_root, arguments.repeats) for dataset in arguments.datasets]
    value = {
        "command": "python benchmarks/bench_graph_losses.py --data-root DATA " + " ".join(arguments.datasets),
        "commit": commit(), "machine": f"{machine()}, one thread, CPU time",
        "dtype": "float32", "rows": rows,
    }  # fmt: skip
    (RESULTS / "graph_losses.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['dataset']}: low {row['low_speedup']:.1f}x, both {row['both_speedup']:.1f}x")


if __name__ == "__main__":
    main()
