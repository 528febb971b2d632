"""Reproduction table of the graph half: every method with its published hyper-parameters beside the published figure.

python benchmarks/graph_reproduction.py --data-root DATA --seeds 2 --work WORK [--blocks citeseer-gcn,cora-gcn,...]

A block is one dataset, protocol and teacher. Each (seed, method) is kept in WORK when it is done, so the same line
continues; the table in benchmarks/results/ is written anew after every block with what there is. On one 2.5 GHz core a
seed of a block takes 2 to 5 minutes with GCN or SAGE teachers and 5 to 15 with GAT.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from quality_graph import RESULTS, commit

from structkd import graph

METHODS = ("mlp", "glnn", "ff-g2m", "krd", "hgmd", "adagmlp", "tined", "infgrand", "g2mlp", "nosmog")

BLOCKS = {
    "citeseer-gcn": ("planetoid:CiteSeer", "public", "gcn"),
    "cora-gcn": ("planetoid:Cora", "public", "gcn"),
    "cpf-citeseer-sage": ("npz:graph/cpf/citeseer.npz", "cpf", "sage"),
    "cpf-cora-sage": ("npz:graph/cpf/cora.npz", "cpf", "sage"),
    "citeseer-sage": ("planetoid:CiteSeer", "public", "sage"),
    "cora-sage": ("planetoid:Cora", "public", "sage"),
    "citeseer-gat": ("planetoid:CiteSeer", "public", "gat"),
    "cora-gat": ("planetoid:Cora", "public", "gat"),
}

# test accuracy in %, (figure, mark): P printed by the method's own paper or page, R another paper's re-run, S a
# secondary source, M measured with the authors' code or an independent port, U a recollection that is no target
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "citeseer-gcn": {
        "teacher": (71.84, "M"), "mlp": (59.60, "M"), "glnn": (72.46, "M"), "ff-g2m": (73.64, "M"),
    },
    "cora-gcn": {"teacher": (82.2, "S"), "mlp": (59.7, "S"), "glnn": (82.2, "U"), "ff-g2m": (84.3, "S")},
    "cpf-citeseer-sage": {
        "teacher": (70.49, "R"), "mlp": (58.50, "R"), "glnn": (71.22, "R"), "krd": (72.84, "R"),
        "ff-g2m": (72.85, "R"), "nosmog": (73.78, "R"), "g2mlp": (74.51, "P"),
    },
    "cpf-cora-sage": {
        "teacher": (80.64, "R"), "mlp": (59.18, "R"), "glnn": (80.26, "R"), "krd": (82.27, "R"),
        "ff-g2m": (82.38, "R"), "nosmog": (83.04, "R"), "g2mlp": (82.54, "P"),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, type=Path, help="folder that holds graph/")
    parser.add_argument("--work", required=True, type=Path, help="finished seeds are kept here")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--blocks", default=",".join(BLOCKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    for name in arguments.blocks.split(","):
        for seeds in range(1, arguments.seeds + 1):
            for methods in range(1, len(METHODS) + 1):
                wanted = tuple(arguments.methods.split(","))[:methods]
                kept = arguments.work / f"{name}.json"
                kept.parent.mkdir(parents=True, exist_ok=True)
                found = block(name, wanted, seeds, arguments)
                kept.write_text(json.dumps(found, indent=2), encoding="utf-8")
            collect(arguments.work)


def block(name: str, methods: tuple[str, ...], seeds: int, arguments: argparse.Namespace) -> dict:
    """One dataset, protocol and teacher with published figures beside; the published rule for the teacher's epoch."""
    dataset, split, teacher = BLOCKS[name]
    path = dataset.replace("npz:", f"npz:{arguments.data_root}/") if dataset.startswith("npz:") else dataset
    config = graph.BenchConfig(
        path, str(arguments.data_root / "graph"), split, "transductive", teacher, methods, tuple(range(seeds)),
        graph.TeacherConfig(select="metric"),
    )  # fmt: skip
    found = graph.bench(config, arguments.work / name)
    published = PUBLISHED.get(name, {})
    rows = [row(one, published.get(one["method"])) for one in found["rows"]]
    return {
        "block": name, "dataset": dataset, "split": split, "setting": "transductive", "teacher": teacher,
        "seeds": list(range(seeds)), "teacher_test": round(100 * found["rows"][0]["teacher_test_mean"], 2),
        "teacher_published": published.get("teacher"), "rows": rows, "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def row(one: dict, published: tuple[float, str] | None) -> dict:
    """One method: test at best validation in %, population standard deviation over seeds."""
    return {
        "method": one["method"], "input_class": one["input_class"], "test": round(100 * one["test_mean"], 2),
        "std": round(100 * one["test_std"], 2), "seeds": len(one["test"]), "cpu_seconds": round(one["cpu_seconds"], 1),
        "cos_high": round(one["cos_high"], 3), "published": published and published[0],
        "mark": published and published[1],
    }  # fmt: skip


def collect(work: Path) -> None:
    """The table so far; cells that are missing are named."""
    blocks = [json.loads((work / f"{name}.json").read_text()) for name in BLOCKS if (work / f"{name}.json").is_file()]
    done = {(one["block"], part["method"]) for one in blocks for part in one["rows"]}
    missing = [f"{name}/{method}" for name in BLOCKS for method in METHODS if (name, method) not in done]
    line = "python benchmarks/graph_reproduction.py --data-root DATA --seeds N --work WORK"
    value = {
        "what": "test accuracy in % at best validation, published hyper-parameters, one shared teacher per seed",
        "marks": "P own paper, R re-run by another paper, S secondary, M authors' code or a port, U recollection",
        "command": line, "machine": f"{platform.machine()}, one thread", "python": sys.version.split()[0],
        "blocks": blocks, "missing": missing,
    }  # fmt: skip
    (RESULTS / "graph_reproduction.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
