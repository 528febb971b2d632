"""Every objective and policy against the default, graph half and ranking half, with paired tests.

    python benchmarks/quality_objectives.py graph --data DIR --work DIR [--seeds 5]
    python benchmarks/quality_objectives.py ranking --data DIR --work DIR [--seeds 5]
    python benchmarks/quality_objectives.py table --work DIR

One JSON per (dataset, seed, piece) in WORK; a killed run goes on where it stopped; `table` gathers what is there into
results/objectives_*.json, docs/objectives-results.md and docs/objectives-acquisition.svg. Each piece runs at its
reference default, nothing is tuned per dataset, all pieces of a seed share teacher scores, and budgets are equal:
graph students of 2 layers, width 64, at most 200 epochs; ranking students of static vectors, 4 passes.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"

BUDGETS = (0.1, 0.25, 0.5)

# piece -> (method, policies, teachers fused)
GRAPH: dict[str, tuple[str, dict[str, Any], str]] = {
    "ff-g2m": ("ff-g2m", {}, ""),
    "mlp (labels alone)": ("mlp", {}, ""),
    **{
        f"ff-g2m + {name}": ("ff-g2m", {"objective": name}, "")
        for name in ("kl", "reverse-kl", "jensen-shannon", "plackett-luce", "listmle", "margin-mse", "ranknet")
    },
    **{f"ff-g2m + kl, {t}": ("ff-g2m", {"target": t}, "") for t in ("taid", "truncate:3", "mixup", "lelp:2")},
    **{
        f"ff-g2m + kl, {w}": ("ff-g2m", {"sample_weight": w, "objective": "kl"}, "")
        for w in ("bd-kd", "confidence", "tgeo")
    },
    **{
        f"ff-g2m + {r}": ("ff-g2m", {"representation": r}, "")
        for r in ("mi-alpha", "infonce", "similarity-preserving", "affinity-kl")
    },
    "ff-g2m, dual head": ("ff-g2m", {"head": "dual"}, ""),
    "ff-g2m + kl, ddk by degree": ("ff-g2m", {"domains": "degree"}, ""),
    "ff-g2m, agreement filter": ("ff-g2m", {"keep": "agreement"}, ""),
    **{
        f"ff-g2m, gcn and sage by {rule}": ("ff-g2m", {}, rule)
        for rule in ("mean", "confidence", "router", "set-attention")
    },
    **{f"{name} alone": ("mlp", {"objective": name}, "") for name in ("kl", "plackett-luce", "margin-mse")},
    "kl alone, taid": ("mlp", {"target": "taid"}, ""),
    "kl alone, bd-kd": ("mlp", {"sample_weight": "bd-kd", "objective": "kl"}, ""),
    "dual head alone": ("mlp", {"head": "dual"}, ""),
}
LELP_BINARY = {name: GRAPH[name] for name in ("ff-g2m", "ff-g2m + kl", "ff-g2m + kl, lelp:2", "kl alone")} | {
    "kl alone, lelp:2": ("mlp", {"target": "lelp:2"}, "")
}
GRAPH_ASKED: dict[str, tuple[str, dict[str, Any], str]] = {
    f"{policy} {budget:g}": ("mlp", {"objective": "kl", "acquire": policy, "budget": budget}, "")
    for policy in ("random", "margin", "rad")
    for budget in BUDGETS
}
GRAPHS = {
    "planetoid:Cora": {**GRAPH, **GRAPH_ASKED},
    "heterophilous:chameleon_filtered": {**GRAPH, **GRAPH_ASKED},
    "planetoid:CiteSeer": {**GRAPH, **GRAPH_ASKED},
    "heterophilous:minesweeper": LELP_BINARY,
}


def graph_half(options: argparse.Namespace) -> None:
    """Every piece on every graph; a seed's teachers are trained once."""
    from structkd import graph
    from structkd.graph.fusing import fuse
    from structkd.graph.policies import Policies
    from structkd.graph.storage import load_teacher, save_teacher

    config = graph.DistillConfig(hidden=64, layers=2, epochs=200, patience=50)
    for dataset in options.only or GRAPHS:
        for seed in range(options.seeds):
            task = graph.load(dataset, root=str(Path(options.data) / "graph"), seed=seed)
            teachers = {}
            for model in ("gcn", "sage"):
                folder = Path(options.work) / "teachers" / f"{slug(dataset)}-{model}-{seed}"
                if not (folder / "model.json").is_file():
                    chosen = graph.TeacherConfig(model=model, layers=2, hidden=128, epochs=200)
                    save_teacher(graph.train_teacher(task, chosen), folder)
                teachers[model] = load_teacher(folder, task)
            logits = {name: teacher.logits(task.observed) for name, teacher in teachers.items()}

            def run(piece: tuple[str, dict[str, Any], str], task=task, teachers=teachers, logits=logits) -> dict:
                method, policies, rule = piece
                teacher: Any = teachers["gcn"]
                if rule:
                    teacher = fuse(task.observed, list(logits.values()), rule, task.seed)
                result = graph.distill(task, teacher, replace(config, method=method), policies=Policies(**policies))
                return {**result.metrics, "teacher": teachers["gcn"].metrics["test"]}

            pieces = GRAPHS[dataset]
            each(options, "graph", dataset, seed, pieces, run)


def each(
    options: argparse.Namespace, half: str, dataset: str, seed: int, pieces: dict[str, Any], run: Callable[[Any], dict]
) -> None:
    """Run what has no result file yet."""
    for name, piece in pieces.items():
        path = Path(options.work) / "runs" / f"{half}-{slug(dataset)}-{seed}-{slug(name)}.json"
        if path.is_file():
            continue
        started = time.process_time()
        found = run(piece)
        seconds = time.process_time() - started
        row = {"half": half, "dataset": dataset, "seed": seed, "piece": name, "seconds": seconds, **found}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(row), encoding="utf-8")
        draft.replace(path)
        print(f"{dataset} {seed} {name}: {found['test']:.4f} ({seconds:.1f} s)", flush=True)


def slug(text: str) -> str:
    """A file name."""
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in text.lower())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["graph", "ranking", "table"])
    parser.add_argument("--data", default=None)
    parser.add_argument("--work", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"graph": graph_half}[arguments.what](arguments)
