"""The default method beside GLNN and FF-G2M on every real graph: test at best validation, paired over seeds.

    python benchmarks/quality_default_method.py --data-root DATA --work WORK [--seeds 10] [--processes 2] [--only NAME]
        [--methods structkd]

One shared teacher per seed, seeds (or the data's own masks) from 0 on; a seed of one method that is finished is read
back from WORK, so a killed run continues. Every process takes one thread. Writes results/graph_default_method.json,
where graphs and methods that this call does not name keep their rows (of the same seeds and teachers, or it is an
error).
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from origin import RESULTS, commit, machine
from scipy import stats

# name -> (dataset, split, setting, teacher)
GRAPHS = {
    "cpf-cora": ("npz:graph/cpf/cora.npz", "cpf", "transductive", "sage"),
    "cpf-citeseer": ("npz:graph/cpf/citeseer.npz", "cpf", "transductive", "sage"),
    "photo": ("amazon:Photo", "cpf", "transductive", "sage"),
    "cs": ("coauthor:CS", "cpf", "transductive", "sage"),
    "cpf-cora-production": ("npz:graph/cpf/cora.npz", "cpf", "production", "sage"),
    "cpf-citeseer-production": ("npz:graph/cpf/citeseer.npz", "cpf", "production", "sage"),
    "photo-production": ("amazon:Photo", "cpf", "production", "sage"),
    "chameleon": ("heterophilous:chameleon_filtered", "masks", "transductive", "gcn"),
    "actor": ("heterophilous:actor", "masks", "transductive", "gcn"),
    "minesweeper": ("heterophilous:minesweeper", "masks", "transductive", "gcn"),
}
METHODS = ("glnn", "ff-g2m", "structkd")


def seed_of(name: str, seed: int, methods: tuple[str, ...], data_root: str, work: str) -> tuple[str, int]:
    """Finish one seed of one graph in a process of its own."""
    import torch

    from structkd import graph

    torch.set_num_threads(1)
    graph.bench(configured(name, (seed,), methods, data_root), Path(work) / name / f"seed-{seed}")
    return name, seed


def configured(name: str, seeds: tuple[int, ...], methods: tuple[str, ...], data_root: str) -> Any:
    from structkd import graph

    dataset, split, setting, teacher = GRAPHS[name]
    root = Path(data_root)
    return graph.BenchConfig(
        dataset.replace("npz:", f"npz:{root}/"), str(root / "graph"), split, setting, teacher, methods, seeds
    )


def gathered(
    name: str, seeds: int, methods: tuple[str, ...], data_root: str, work: Path, kept: dict[str, Any]
) -> dict[str, Any]:
    """The graph's rows over its finished seeds, read back, with paired t-tests of structkd against the others.

    Args:
        kept: the graph as the result file has it, whose rows stand for methods that are not run.
    """
    from structkd import graph

    found = []
    for seed in range(seeds):
        if (work / name / f"seed-{seed}" / "finished").is_file():
            found.append(graph.bench(configured(name, (seed,), methods, data_root), work / name / f"seed-{seed}"))
    dataset, split, setting, teacher = GRAPHS[name]
    one: dict[str, Any] = {"name": name, "dataset": dataset, "split": split, "setting": setting, "teacher": teacher}
    one |= {"seeds": [run["seeds"][0] for run in found], "commit": commit()}
    rows = {row["method"]: row for row in kept.get("rows", [])}
    before = {row["method"]: row.get("commit", kept["commit"]) for row in rows.values()}
    rows |= {method: row_of(method, [run["rows"][place] for run in found]) for place, method in enumerate(methods)}
    one["rows"] = [rows[method] for method in METHODS if method in rows]
    for method in set(rows) - set(methods):
        same_teacher = np.isclose(rows[method]["teacher_test_mean"], rows[methods[0]]["teacher_test_mean"])
        if kept["seeds"] != one["seeds"] or not same_teacher:
            raise SystemExit(f"{name}: the rows of {method} are of other seeds or teachers; name it in --methods")
        rows[method]["commit"] = before[method]
    for other in METHODS[:-1]:
        gain = np.subtract(rows["structkd"]["test"], rows[other]["test"])
        one[f"against_{other}"] = {
            "gain": float(gain.mean()),
            "p": float(stats.ttest_1samp(gain, 0.0).pvalue) if len(gain) > 1 and gain.std() > 0 else None,
            "seeds_below": int((gain < 0).sum()),
        }
    return one


def row_of(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of one method over its seeds, and the test figure of each."""
    test = [run["test_mean"] for run in runs]
    row = {"method": method, "test_mean": float(np.mean(test)), "test_std": float(np.std(test))}
    row |= {
        key: float(np.mean([run[key] for run in runs if run[key] is not None] or [np.nan]))
        for key in ("valid_mean", "teacher_test_mean", "cos_low", "cos_high", "cpu_seconds")
    }
    return {"input_class": runs[0]["input_class"], **row, "test": test}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder that holds graph/")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(GRAPHS), choices=list(GRAPHS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS / "graph_default_method.json")
    given = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    methods = tuple(given.methods)
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(seed_of, name, seed, methods, given.data_root, str(given.work))
            for seed in range(given.seeds)
            for name in given.only
        ]
        for job in as_completed(jobs):
            name, seed = job.result()
            (given.work / name / f"seed-{seed}" / "finished").touch()
            print(name, seed, flush=True)
    for name in given.only:
        kept = next((graph for graph in read(given.out)["graphs"] if graph["name"] == name), {})
        write(gathered(name, given.seeds, methods, given.data_root, given.work, kept), given.out)


def read(path: Path) -> dict[str, Any]:
    """The result file, or one without graphs."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"graphs": []}
    return found


def write(one: dict[str, Any], path: Path) -> None:
    """Put a graph's rows into the result file, in the order of GRAPHS."""
    kept = read(path)
    graphs = [other for other in kept["graphs"] if other["name"] != one["name"]] + [one]
    graphs.sort(key=lambda found: list(GRAPHS).index(found["name"]))
    body = kept | {  # what the file says of the method's development stays
        "what": "default method against GLNN and FF-G2M, one shared teacher per seed, test at best validation",
        "command": "python benchmarks/quality_default_method.py --data-root DATA --work WORK",
        "machine": f"{machine()}, one thread a process",
        "graphs": graphs,
    }
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
