"""The index beside plain faiss and the machine's own matrix product, in one process; one JSON file per run.

    python benchmarks/bench_index.py --what flat knn auto --count 100000

Times are CPU time of one thread unless said otherwise; median and spread (max - min) of the repeats.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from origin import RESULTS, commit, machine

from structkd import index
from structkd.runs import versions

GROUP = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["flat", "knn", "auto"], choices=["flat", "knn", "auto"])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    jobs = {"flat": flat, "knn": knn, "auto": automatic}
    rows = [row for name in options.what for row in jobs[name](options.count, options.dim, options.repeats)]
    result = {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "command": "python " + " ".join(["benchmarks/bench_index.py", *sys.argv[1:]]),
        "versions": versions() | {"faiss": faiss.__version__},
        "threads": 1,
        "rows": rows,
    }
    out = options.out or RESULTS / f"index-{'-'.join(options.what)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def flat(count: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """Exact inner product: 256 queries; plain faiss, ours, and the bare product queries @ vectors.T."""
    vectors, queries = normal(count, dim), normal(GROUP, dim, seed=1)
    plain = faiss.IndexFlatIP(dim)
    plain.add(vectors)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ours = index.build(vectors, kind="flat", metric="ip", out=folder)
        product = timed(lambda: queries @ vectors.T, repeats)
        for k in (10, 100):
            theirs, mine = (
                timed(lambda k=k: plain.search(queries, k), repeats),
                timed(lambda k=k: ours.search(queries, k), repeats),
            )
            ratio, share = theirs["median"] / mine["median"], product["median"] / mine["median"]
            rows.append(
                {"what": "flat", "count": count, "dim": dim, "queries": GROUP, "k": k, "seconds": mine, "faiss": theirs}
                | {"sgemm": product, "times_faiss": round(ratio, 2), "share_of_sgemm": round(share, 3)}
            )
    return rows


def knn(count: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """The neighbour graph (k = 10) beside the same loop over plain faiss in groups of 256 rows.

    The loop is timed on its first 4 groups and scaled to all, since every group costs the same.
    """
    vectors = normal(count, dim)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plain = faiss.IndexFlatIP(dim)
    plain.add(vectors)
    groups = 4

    def loop() -> None:
        for start in range(0, groups * GROUP, GROUP):
            plain.search(vectors[start : start + GROUP], 11)

    with tempfile.TemporaryDirectory() as folder:
        ours = index.build(vectors, kind="flat", out=folder)
        mine = timed(lambda: ours.knn_graph(10), 1, warm=False)
    theirs = timed(loop, repeats)
    scaled = theirs["median"] * count / (groups * GROUP)
    return [
        {"what": "knn-graph", "count": count, "dim": dim, "k": 10, "seconds": mine, "faiss_loop_first_groups": theirs}
        | {"groups": groups, "faiss_loop_scaled": round(scaled, 1), "times_faiss": round(scaled / mine["median"], 2)}
    ]


def automatic(count: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """`auto` at recall 0.92 beside exact search: 1000 queries of the same distribution as the documents."""
    everything = clustered(count + 1000, dim)
    vectors, queries = everything[:count], everything[count:]
    with tempfile.TemporaryDirectory() as folder:
        exact = index.build(vectors, kind="flat", out=f"{folder}/flat")
        chosen = index.build(vectors, kind="auto", recall=0.92, out=f"{folder}/auto")
        slow, fast = (
            timed(lambda: exact.search(queries, 10), repeats),
            timed(lambda: chosen.search(queries, 10), repeats),
        )
        truth, found = exact.search(queries, 10).rows, chosen.search(queries, 10).rows
    manifest = chosen.manifest  # type: ignore[attr-defined]
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(truth, found, strict=True)])
    return [
        {"what": "auto", "count": count, "dim": dim, "kind": chosen.kind, "parameters": manifest.parameters}
        | {"recall_at_build": manifest.recall, "recall_of_the_queries": round(float(recall), 4)}
        | {"build_seconds": manifest.build_seconds, "queries_per_second": round(1000 / fast["median"])}
        | {
            "exact_queries_per_second": round(1000 / slow["median"]),
            "times_exact": round(slow["median"] / fast["median"], 2),
        }
    ]


def timed(work: Callable[[], Any], repeats: int, warm: bool = True) -> dict[str, float]:
    """Median and spread of the CPU seconds of `work`."""
    if warm:
        work()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return {"median": round(statistics.median(seconds), 4), "spread": round(max(seconds) - min(seconds), 4)}


def normal(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim), np.float32)


def clustered(count: int, dim: int) -> np.ndarray:
    """Around 300 centres, spread mostly along 24 shared directions: neighbours cross the cells of an inverted file."""
    rng = np.random.default_rng(0)
    centres, directions = rng.standard_normal((300, dim), np.float32), rng.standard_normal((24, dim), np.float32)
    spread = rng.standard_normal((count, 24), np.float32) @ directions
    noise = rng.standard_normal((count, dim), np.float32)
    return 0.6 * centres[rng.integers(0, 300, count)] + 0.4 * spread + 0.3 * noise


if __name__ == "__main__":
    main()
