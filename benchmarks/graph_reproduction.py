"""Reproduction table of the graph half: every method with its published hyper-parameters beside the published figure.

python benchmarks/graph_reproduction.py --data-root DATA --work WORK [--seeds 5 [--seed 0]] [--blocks cora-gcn,...]

A block is one dataset, protocol and teacher; a cell is one seed of one method. A cell is written into
benchmarks/results/graph_reproduction.json as soon as it is done and is never run again (delete it there to have it
run), so the same line continues, and several may run at once. WORK keeps the teachers. CPU seconds were taken on
cores shared with other work.
"""

import argparse
import fcntl
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from origin import RESULTS, commit, machine

from structkd import graph

METHODS = ("mlp", "glnn", "ff-g2m", "krd", "hgmd", "tined", "g2mlp", "adagmlp", "infgrand", "nosmog")

BLOCKS = {
    "cpf-citeseer-sage": ("npz:graph/cpf/citeseer.npz", "cpf", "sage"),
    "cpf-cora-sage": ("npz:graph/cpf/cora.npz", "cpf", "sage"),
    "citeseer-gcn": ("planetoid:CiteSeer", "public", "gcn"),
    "cora-gcn": ("planetoid:Cora", "public", "gcn"),
    "citeseer-sage": ("planetoid:CiteSeer", "public", "sage"),
    "cora-sage": ("planetoid:Cora", "public", "sage"),
    "cpf-photo-sage": ("amazon:Photo", "cpf", "sage"),
    "cs-gcn": ("coauthor:CS", "random", "gcn"),
    "cs-sage": ("coauthor:CS", "random", "sage"),
    "citeseer-gat": ("planetoid:CiteSeer", "public", "gat"),
    "cora-gat": ("planetoid:Cora", "public", "gat"),
    "cs-gat": ("coauthor:CS", "random", "gat"),
    "photo-gat": ("amazon:Photo", "random", "gat"),
    "photo-sage": ("amazon:Photo", "random", "sage"),
    "photo-gcn": ("amazon:Photo", "random", "gcn"),
}

# test accuracy in %, (figure, mark)
MARKS = {
    "P": "printed by the method's own paper or page", "R": "another paper's re-run", "S": "a secondary source",
    "M": "measured with the authors' code or an independent port", "U": "a recollection, no target",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "citeseer-gcn": {"teacher": (71.84, "M"), "mlp": (59.60, "M"), "glnn": (72.46, "M"), "ff-g2m": (73.64, "M")},
    "cora-gcn": {"teacher": (82.2, "S"), "mlp": (59.7, "S"), "glnn": (82.2, "U"), "ff-g2m": (84.3, "S")},
    "cpf-citeseer-sage": {
        "teacher": (70.49, "R"), "mlp": (58.50, "R"), "glnn": (71.22, "R"), "krd": (72.84, "R"),
        "ff-g2m": (72.85, "R"), "nosmog": (73.78, "R"), "g2mlp": (74.51, "P"),
    },
    "cpf-cora-sage": {
        "teacher": (80.64, "R"), "mlp": (59.18, "R"), "glnn": (80.26, "R"), "krd": (82.27, "R"),
        "ff-g2m": (82.38, "R"), "nosmog": (83.04, "R"), "g2mlp": (82.54, "P"),
    },
    "cpf-photo-sage": {
        "teacher": (90.85, "R"), "mlp": (77.29, "R"), "glnn": (91.95, "R"), "krd": (91.95, "R"),
        "ff-g2m": (92.51, "R"), "nosmog": (93.36, "R"), "g2mlp": (92.85, "P"),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, type=Path, help="folder that holds graph/")
    parser.add_argument("--work", required=True, type=Path, help="teachers and their logits are kept here")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--blocks", default=",".join(BLOCKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "graph_reproduction.json")
    arguments = parser.parse_args()
    for name in arguments.blocks.split(","):
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            for method in arguments.methods.split(","):
                if (name, seed, method) not in {key(cell) for cell in cells(arguments.out)}:
                    keep(measured(name, seed, method, arguments), arguments.out)


def measured(name: str, seed: int, method: str, arguments: argparse.Namespace) -> dict:
    """One cell; teachers keep the epoch of best validation accuracy, the published rule."""
    dataset, split, teacher = BLOCKS[name]
    config = graph.BenchConfig(
        dataset.replace("npz:", f"npz:{arguments.data_root}/"), str(arguments.data_root / "graph"), split,
        "transductive", teacher, (method,), (seed,), graph.TeacherConfig(select="metric"),
    )  # fmt: skip
    (row,) = graph.bench(config, arguments.work / name)["rows"]
    shown = {key: round(row[f"{key}_mean"], 5) for key in ("test", "valid", "teacher_test")}
    shown |= {key: round(row[key], 4) for key in ("cos_low", "cos_high", "cpu_seconds")}
    cell = {"block": name, "seed": seed, "method": method, "input_class": row["input_class"], **shown}
    return cell | {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "machine": machine()}


def key(cell: dict) -> tuple[str, int, str]:
    return cell["block"], cell["seed"], cell["method"]


def cells(path: Path) -> list[dict]:
    """Finished cells of a result file; none when there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def keep(cell: dict, path: Path) -> None:
    """Add a cell to the file, which another process may be adding to as well."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = sorted([*cells(path), cell], key=lambda one: (list(BLOCKS).index(one["block"]), one["seed"]))
        earlier = json.loads(path.read_text(encoding="utf-8"))["earlier_blocks"] if path.is_file() else []
        path.write_text(json.dumps(summary(found, earlier), indent=1) + "\n", encoding="utf-8")


def summary(found: list[dict], earlier: list[dict]) -> dict:
    """The file: how it was made, a row per block and method, what is missing, and every cell.

    Earlier blocks are means of older code that kept no cells; they leave the file when their block runs again.
    """
    done = {key(cell) for cell in found}
    missing = {}
    for name in BLOCKS:
        absent = {method: [seed for seed in range(5) if (name, seed, method) not in done] for method in METHODS}
        missing[name] = {method: ", ".join(map(str, seeds)) for method, seeds in absent.items() if seeds}
    return {
        "what": "test accuracy in % at best validation, published hyper-parameters, one shared teacher per seed",
        "marks": MARKS,
        "command": "python benchmarks/graph_reproduction.py --data-root DATA --work WORK",
        "machine": f"{machine()}, one thread, cores shared with other work; newer cells name their own",
        "python": sys.version.split()[0],
        "blocks": [block for name in BLOCKS if (block := table(name, found))["rows"]],
        "missing_seeds_of_five": {name: parts for name, parts in missing.items() if parts},
        "earlier_blocks": [block for block in earlier if block["block"] not in {cell["block"] for cell in found}],
        "cells": found,
    }


def table(name: str, found: list[dict]) -> dict:
    """Rows of one block in the order of METHODS, the teacher first; population standard deviation over seeds."""
    dataset, split, teacher = BLOCKS[name]
    mine = [cell for cell in found if cell["block"] == name]
    teachers = {cell["seed"]: cell["teacher_test"] for cell in mine}
    values: Iterator[tuple[str, str, list[float]]] = iter(
        [("teacher", "graph_at_inference", list(teachers.values()))]
        + [(method, part[0]["input_class"], [cell["test"] for cell in part])
           for method in METHODS if (part := [cell for cell in mine if cell["method"] == method])]
    )  # fmt: skip
    published = PUBLISHED.get(name, {})
    rows = [
        {
            "method": method, "input_class": kind, "test": round(100 * statistics.fmean(tests), 2),
            "std": round(100 * statistics.pstdev(tests), 2), "seeds": len(tests),
            "published": published.get(method, (None, None))[0], "mark": published.get(method, (None, None))[1],
        }
        for method, kind, tests in values if tests
    ]  # fmt: skip
    return {
        "block": name,
        "dataset": dataset,
        "split": split,
        "setting": "transductive",
        "teacher": teacher,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
