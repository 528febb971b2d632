"""FF-G2M on generated graphs of up to 2.4 million nodes and 62 million edges: time, growth and peak memory.

The graph: power-law degrees (density falling as degree^-3), 47 classes, 100 features = class centre + noise, half the
edges inside a class, masks as ogbn-products shares them (8 % training, 1.6 % validation). Features and edges are read
memory-mapped. The teacher is a real one: two-layer GraphSAGE, trained for one epoch on sampled neighbourhoods
(fan-out 5,5), answering layer by layer. The student is an MLP of two layers, 256 wide, taught for three epochs in
batches of 4096 nodes and 1024 edges. Each size runs in a process of its own, so that its peak memory is its own.

python benchmarks/bench_graph_scale.py --work FOLDER [--nodes 100000 2400000 500000]

Then, on the largest graph, what an answer costs for 10 nodes that training never saw: the student, and GraphSAGE of two
and three layers with full neighbourhoods (as GLNN timed its teacher) and with fan-outs; the fetch counts.

One thread. About 12 minutes of CPU and 5 GB of disk for all sizes; a size that has finished is not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import RESULTS, commit, machine, peak_bytes

from structkd import graph
from structkd.graph.data.task import clean_edges
from structkd.graph.distillation import predict
from structkd.graph.evaluate import report
from structkd.graph.methods.minibatch import streamed_targets
from structkd.graph.storage import load_student, load_teacher, save_student, save_teacher

CLASSES, FEATURES, EDGES_PER_NODE, HOMOPHILY, SIGNAL = 47, 100, 62 / 2.4, 0.5, 0.3
EPOCHS, TEACHER = 3, graph.TeacherConfig("sage", layers=2, hidden=128, dropout=0.0, epochs=1, fan_out="5,5")
STUDENT = graph.DistillConfig(
    "ff-g2m", layers=2, hidden=256, dropout=0.0, learning_rate=0.003, weight_decay=0.0, label_weight=0.2,
    temperature=1.3, epochs=EPOCHS, batch_nodes=4096, batch_edges=1024,
)  # fmt: skip


def generate(nodes: int, folder: Path) -> None:
    """x.npy, y.npy and edges.npy (clean, both directions) of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    y = generator.integers(CLASSES, size=nodes)
    order = np.argsort(y, kind="stable")  # nodes of one class side by side; shuffled inside, since labels are drawn
    first = np.searchsorted(y[order], np.arange(CLASSES + 1))
    wanted, keys = round(nodes * EDGES_PER_NODE), np.empty(0, dtype=np.int64)
    while len(keys) < wanted:
        more = max(1000, int((wanted - len(keys)) * 1.1))
        keys = np.unique(np.concatenate([keys, drawn_edges(more, y, order, first, generator)]))
    surplus = generator.choice(len(keys), len(keys) - wanted, replace=False)
    keys = np.delete(keys, surplus)
    edges = clean_edges(np.stack([keys // nodes, keys % nodes]), nodes, "generated").numpy()
    assert edges.shape[1] == 2 * wanted
    np.save(folder / "edges.npy", edges)
    centres = SIGNAL * generator.standard_normal((CLASSES, FEATURES), dtype=np.float32)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (nodes, FEATURES))
    for start in range(0, nodes, 1 << 17):
        part = slice(start, start + (1 << 17))
        x[part] = centres[y[part]] + generator.standard_normal((len(y[part]), FEATURES), dtype=np.float32)
    np.save(folder / "y.npy", y)


def drawn_edges(count: int, y: np.ndarray, order: np.ndarray, first: np.ndarray, generator: Any) -> np.ndarray:
    """Keys of edges: a node by its weight, then another, half of the time of its class; weight ~ rank^-1/2."""
    nodes, keys = len(y), []
    for start in range(0, count, 1 << 22):
        size = min(1 << 22, count - start)
        left = order[by_rank(np.full(size, nodes), generator, spread=True)]
        inside = generator.random(size) < HOMOPHILY
        low = np.where(inside, first[y[left]], 0)
        high = np.where(inside, first[y[left] + 1], nodes)
        within = by_rank(high - low, generator)
        anywhere = by_rank(np.full(size, nodes), generator, spread=True)
        right = order[np.where(inside, low + within, anywhere)]
        left, right = np.minimum(left, right), np.maximum(left, right)
        keys.append((left * nodes + right)[left != right])
    return np.concatenate(keys)


def by_rank(sizes: np.ndarray, generator: Any, spread: bool = False) -> np.ndarray:
    """A rank below each size, drawn with density ~ rank^-1/2; `spread` gives every class its own hubs."""
    rank = np.minimum((sizes * generator.random(len(sizes)) ** 2).astype(np.int64), sizes - 1)
    if not spread:
        return rank
    each = sizes // CLASSES  # rank r of a class c stands near c * each + r
    return np.minimum(generator.integers(CLASSES, size=len(sizes)) * each + rank // CLASSES, sizes - 1)


def mapped_task(folder: Path) -> graph.GraphTask:
    """The generated graph with features and edges left in their files."""
    y = np.load(folder / "y.npy")
    nodes = len(y)
    part = np.random.default_rng(1).random(nodes)
    train, valid = torch.from_numpy(part < 0.08), torch.from_numpy((part >= 0.08) & (part < 0.096))
    return graph.GraphTask(
        x=torch.from_numpy(np.load(folder / "x.npy", mmap_mode="c")),
        edge_index=torch.from_numpy(np.load(folder / "edges.npy", mmap_mode="c")),
        y=torch.from_numpy(y), train=train, valid=valid, test=~(train | valid),
        hidden=torch.zeros(nodes, dtype=torch.bool), classes=CLASSES, name="generated", split="generated",
    )  # fmt: skip


def gigabytes() -> float:
    return peak_bytes() / (1 << 30)


class Clock:
    """CPU seconds, wall seconds and the peak so far of each stage."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        out = work()
        self.rows[name] = {
            "cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall, "peak_gb": gigabytes()
        }  # fmt: skip
        print(name, self.rows[name], file=sys.stderr, flush=True)
        return out


def one_size(folder: Path) -> dict[str, Any]:
    """Teacher, targets, three epochs and inference on one generated graph."""
    clock = Clock()
    task = clock("open", lambda: mapped_task(folder))
    degrees = clock("degrees", lambda: task.degrees)
    teacher = clock("teacher: train, then answer", lambda: graph.train_teacher(task, TEACHER, 0))
    logits = clock("teacher: answer for every node", lambda: teacher.logits(task))
    save_teacher(teacher, folder / "teacher")
    targets = clock("targets", lambda: streamed_targets(task.observed, logits))
    del targets
    result = clock("distill: targets, epochs, judging", lambda: graph.distill(task, logits, STUDENT, 0))
    save_student(result.student, result.config, folder / "student")
    out = clock("student: answer for every node", lambda: predict(result.student, task.x))
    test = report(task, out)["test"]
    assert abs(test - result.metrics["test"]) < 1e-6
    epoch = (result.metrics["cpu_seconds"] - clock.rows["targets"]["cpu_seconds"]) / EPOCHS
    return {
        "nodes": task.num_nodes, "undirected_edges": task.edge_index.shape[1] // 2,
        "degree_mean": float(degrees.float().mean()), "degree_median": float(degrees.median()),
        "degree_max": int(degrees.max()), "isolated": int((degrees == 0).sum()),
        "teacher_test": teacher.metrics["test"], "student": result.metrics,
        "curve": list(result.history), "epoch_cpu_seconds": epoch, "peak_gb": gigabytes(), "stages": clock.rows,
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time per epoch and peak memory over the number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    nodes = [row["nodes"] for row in rows]
    left.loglog(nodes, [row["epoch_cpu_seconds"] for row in rows], "o-", label="epoch")
    left.loglog(nodes, [row["stages"]["targets"]["cpu_seconds"] for row in rows], "s-", label="targets")
    left.loglog(
        nodes, [row["stages"]["student: answer for every node"]["cpu_seconds"] for row in rows], "^-", label="inference"
    )
    left.set(xlabel="nodes", ylabel="CPU seconds, one thread", title="FF-G2M in mini-batches")
    left.legend()
    right.semilogx(nodes, [row["peak_gb"] for row in rows], "o-")
    right.axhline(12, linestyle="--", color="grey")
    right.set(xlabel="nodes", ylabel="GB", title="peak resident memory", ylim=(0, 13))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for generated graphs and finished sizes")
    parser.add_argument("--nodes", type=int, nargs="+", default=[100_000, 2_400_000, 500_000])
    parser.add_argument("--stage", choices=["generate", "run", "latency"], help="used by the script itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.stage:
        folder = arguments.work / str(arguments.nodes[0])
        if arguments.stage == "generate":
            generate(arguments.nodes[0], folder)
        elif arguments.stage == "latency":
            (folder / "latency.json").write_text(json.dumps(requests(folder)), encoding="utf-8")
        else:
            (folder / "row.json").write_text(json.dumps(one_size(folder)), encoding="utf-8")
        return
    for nodes in arguments.nodes:
        folder = arguments.work / str(nodes)
        for stage, done in (("generate", "y.npy"), ("run", "row.json")):
            if not (folder / done).is_file():
                command = [sys.executable, __file__, "--work", str(arguments.work), "--nodes", str(nodes)]
                subprocess.run([*command, "--stage", stage], check=True)
        write([arguments.work / str(size) / "row.json" for size in sorted(arguments.nodes)])
    folder = arguments.work / str(max(arguments.nodes))
    if not (folder / "latency.json").is_file():
        command = [sys.executable, __file__, "--work", str(arguments.work), "--nodes", str(max(arguments.nodes))]
        subprocess.run([*command, "--stage", "latency"], check=True)
    value = stamp("python benchmarks/bench_graph_scale.py --work FOLDER")
    value |= json.loads((folder / "latency.json").read_text("utf-8"))
    (RESULTS / "graph_latency.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def requests(folder: Path) -> dict[str, Any]:
    """Time per request of 1 and 10 unseen nodes; a three-layer teacher has random weights, which cost the same."""
    task = mapped_task(folder)
    student, trained = load_student(folder / "student"), load_teacher(folder / "teacher", task)
    deep = replace(trained.config, layers=3, fan_out="5,5,5")
    torch.manual_seed(0)
    untrained = replace(trained, model=deep.build(FEATURES, CLASSES), config=deep)
    cases = {
        "2 layers, all neighbours": (trained, None, 20, 5), "2 layers, fan-out 5,5": (trained, (5, 5), 100, 20),
        "3 layers, all neighbours": (untrained, None, 2, 1), "3 layers, fan-out 5,5,5": (untrained, (5, 5, 5), 100, 20),
    }  # fmt: skip
    out = []
    for name, (teacher, fan_outs, repeats, cold) in cases.items():
        batches = (10,) if repeats == 2 else (1, 10)
        found = graph.latency(task, teacher, student, batches, repeats, fan_outs=fan_outs, cold=cold)
        out.append({
            "teacher": name, "repeats": repeats, "cold_repeats": cold, "speedup": found.speedup,
            "cold_speedup": found.cold_speedup, "rows": list(found.rows),
        })  # fmt: skip
        print(name, f"{found.speedup:.0f}x warm, {found.cold_speedup:.0f}x cold", file=sys.stderr, flush=True)
    return {"nodes": task.num_nodes, "goal": 273, "speedup": out[0]["speedup"], "peak_gb": gigabytes(), "cases": out}


def stamp(command: str) -> dict[str, Any]:
    """Command, commit and machine."""
    return {
        "command": command, "commit": commit(),
        "machine": f"{machine()}, one thread, shared with other work; seconds of CPU time where it says so",
    }  # fmt: skip


def write(finished: list[Path]) -> None:
    """The result of every size that has finished."""
    rows = [json.loads(path.read_text("utf-8")) for path in finished if path.is_file()]
    largest, smallest = rows[-1], rows[0]
    value = {
        **stamp("python benchmarks/bench_graph_scale.py --work FOLDER"),
        "teacher": vars(TEACHER), "student": vars(STUDENT), "goal_peak_gb": 12, "peak_gb": largest["peak_gb"],
        "epoch_cpu_seconds": largest["epoch_cpu_seconds"],
        "growth": {
            "nodes": largest["nodes"] / smallest["nodes"],
            "epoch_cpu_seconds": largest["epoch_cpu_seconds"] / smallest["epoch_cpu_seconds"],
        },
        "rows": rows,
    }  # fmt: skip
    (RESULTS / "graph_scale.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draw(rows, RESULTS / "graph_scale.svg")


if __name__ == "__main__":
    main()
