"""The default method beside GLNN and FF-G2M on every real graph: test at best validation, paired over seeds.

    python benchmarks/quality_default_method.py --data-root DATA --work WORK [--seeds 10] [--processes 2] [--only NAME]

One shared teacher per seed, seeds (or the data's own masks) from 0 on; a seed of one method that is finished is read
back from WORK, so a killed run continues. Every process takes one thread. Writes results/graph_default_method.json,
where graphs that this call does not name keep their rows.
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


def seed_of(name: str, seed: int, data_root: str, work: str) -> tuple[str, int]:
    """Finish one seed of one graph in a process of its own."""
    import torch

    from structkd import graph

    torch.set_num_threads(1)
    graph.bench(configured(name, (seed,), data_root), Path(work) / name / f"seed-{seed}")
    return name, seed


def configured(name: str, seeds: tuple[int, ...], data_root: str) -> Any:
    from structkd import graph

    dataset, split, setting, teacher = GRAPHS[name]
    root = Path(data_root)
    return graph.BenchConfig(
        dataset.replace("npz:", f"npz:{root}/"), str(root / "graph"), split, setting, teacher, METHODS, seeds
    )


def gathered(name: str, seeds: int, data_root: str, work: Path) -> dict[str, Any]:
    """The graph's rows over its finished seeds, read back, with paired t-tests of structkd against the others."""
    from structkd import graph

    found = []
    for seed in range(seeds):
        if (work / name / f"seed-{seed}" / "finished").is_file():
            found.append(graph.bench(configured(name, (seed,), data_root), work / name / f"seed-{seed}"))
    dataset, split, setting, teacher = GRAPHS[name]
    one: dict[str, Any] = {"name": name, "dataset": dataset, "split": split, "setting": setting, "teacher": teacher}
    one |= {"seeds": [run["seeds"][0] for run in found], "commit": commit(), "rows": []}
    values = {}
    for place, method in enumerate(METHODS):
        rows = [run["rows"][place] for run in found]
        values[method] = [row["test_mean"] for row in rows]
        row = {"method": method, "test_mean": float(np.mean(values[method])), "test_std": float(np.std(values[method]))}
        row |= {
            key: float(np.mean([row[key] for row in rows if row[key] is not None] or [np.nan]))
            for key in ("valid_mean", "teacher_test_mean", "cos_low", "cos_high", "cpu_seconds")
        }
        one["rows"].append({"input_class": rows[0]["input_class"], **row, "test": values[method]})
    for other in METHODS[:-1]:
        gain = np.subtract(values["structkd"], values[other])
        one[f"against_{other}"] = {
            "gain": float(gain.mean()),
            "p": float(stats.ttest_1samp(gain, 0.0).pvalue) if len(gain) > 1 and gain.std() > 0 else None,
            "seeds_below": int((gain < 0).sum()),
        }
    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder that holds graph/")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(GRAPHS), choices=list(GRAPHS))
    parser.add_argument("--out", type=Path, default=RESULTS / "graph_default_method.json")
    given = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(seed_of, name, seed, given.data_root, str(given.work))
            for seed in range(given.seeds)
            for name in given.only
        ]
        for job in as_completed(jobs):
            name, seed = job.result()
            (given.work / name / f"seed-{seed}" / "finished").touch()
            write(gathered(name, given.seeds, given.data_root, given.work), given.out)
            print(name, seed, flush=True)


def write(one: dict[str, Any], path: Path) -> None:
    """Put a graph's rows into the result file, in the order of GRAPHS."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"graphs": []}
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
