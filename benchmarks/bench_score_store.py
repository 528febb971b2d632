"""Score store against a dict of dicts: size, open time, memory, lookups per second, commit and compaction.

    python benchmarks/bench_score_store.py --pairs 20000000 --out benchmarks/results/score-store.json

Generated pairs: each query has 100 distinct documents of 220,000 (cross-encoder-like scores, deviation 7). Lookups go
in batches of 4096 pairs that are all there (256 queries x 16 documents), as a trainer asks. Every figure is the median
of its rounds with the spread (largest minus smallest); each reader has a process, and so memory, of its own.
"""

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from structkd import scores
from structkd.scores import PairScores, TeacherSpec
from structkd.scores._lookup import find_numba, find_numpy
from structkd.scores.compaction import compact
from structkd.scores.log import PairLog

LIST, DOCUMENTS, UNIT, BATCH = 100, 220_000, 20_000, 4096
SPEC = TeacherSpec("generated")


def generated(pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query rows, document rows, scores; ascending by key."""
    rng = np.random.default_rng(0)
    queries = np.repeat(np.arange(pairs // LIST), LIST)
    step = DOCUMENTS // LIST
    offsets = rng.integers(0, step, size=len(queries))  # one document of each stratum: distinct within a list
    return queries, np.tile(np.arange(LIST) * step, pairs // LIST) + offsets, rng.normal(0, 7, len(queries))


def rounds(count: int, work: Callable[[], float]) -> dict[str, float]:
    """Median and spread of what `work` returns."""
    values = [work() for _ in range(count)]
    return {"median": statistics.median(values), "spread": max(values) - min(values)}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fill(folder: Path, pairs: int) -> dict[str, Any]:
    """Write and compact the store."""
    queries, documents, values = generated(pairs)
    log = PairLog.open(folder, SPEC)
    num_queries = pairs // LIST
    log.queries.extend([str(i) for i in range(num_queries)], [None] * num_queries)
    log.documents.extend([str(i) for i in range(DOCUMENTS)], [None] * DOCUMENTS)
    commits = []
    for start in range(0, len(queries), UNIT):
        unit = log.unit(queries[start : start + UNIT], documents[start : start + UNIT])
        part = values[start : start + UNIT]
        commits.append(timed(lambda unit=unit, part=part: log.commit(unit, part)))
    seconds = timed(lambda: compact(folder))
    size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    return {
        "commit_ms": {
            "median": 1000 * statistics.median(commits),
            "p90": 1000 * sorted(commits)[len(commits) * 9 // 10],
        },
        "compact_rows_per_second": pairs / seconds,
        "bytes_per_pair": size / pairs,
        "dtype": scores.open(folder).dtype,
    }


def batches(store_rows: tuple[np.ndarray, np.ndarray], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    queries, documents = store_rows
    rng = np.random.default_rng(1)
    out = []
    for _ in range(count):
        lists = rng.choice(len(queries) // LIST, BATCH // 16)
        at = (lists[:, None] * LIST + rng.integers(0, LIST, (BATCH // 16, 16))).reshape(-1)
        out.append((queries[at], documents[at]))
    return out


def read(folder: Path, pairs: int) -> dict[str, Any]:
    """Open the store and look up; in a process of its own."""
    before = psutil.Process().memory_info().rss
    opens = rounds(9, lambda: 1000 * timed(lambda: PairScores.open(folder)))
    store = PairScores.open(folder)
    shard = store._shards[0]
    asked = batches((np.repeat(np.asarray(shard.query_rows, np.int64), LIST), shard.documents.astype(np.int64)), 200)
    (slots,) = store._slot_tables()

    def kernel(find: Callable[..., None]) -> Callable[[], float]:
        def work() -> float:
            def every() -> None:
                for queries, documents in asked:
                    out = np.full(BATCH, -1, dtype=np.int64)
                    find(slots, shard.offsets, shard.documents, queries, documents, 0, out)
                    store.take(out)

            return len(asked) * BATCH / timed(every)

        return work

    kernel(find_numba)()  # compile and touch every page once
    positions = [store.positions_of_rows(*batch) for batch in asked]
    assert all((found >= 0).all() for found in positions)

    def take() -> float:
        return len(asked) * BATCH / timed(lambda: [store.take(found) for found in positions])

    return {
        "open_ms": opens,
        "numba_lookups_per_second": rounds(7, kernel(find_numba)),
        "numpy_lookups_per_second": rounds(7, kernel(find_numpy)),
        "take_per_second": rounds(7, take),
        "rss_mb": (psutil.Process().memory_info().rss - before) / 1e6,
    }


def baseline(path: Path, pairs: int) -> dict[str, Any]:
    """The dict of dicts that public files are: load, memory, lookups; in a process of its own."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with open(path, "rb") as handle:
        table = pickle.load(handle)  # our own file
    seconds = time.perf_counter() - start
    rss = (psutil.Process().memory_info().rss - before) / 1e6
    flat = [(query, document) for query, found in list(table.items())[:20_000] for document in found]
    rng = np.random.default_rng(1)
    asked = [[flat[i] for i in rng.integers(0, len(flat), BATCH)] for _ in range(50)]

    def work() -> float:
        return len(asked) * BATCH / timed(lambda: [[table[q][d] for q, d in batch] for batch in asked])

    return {"load_seconds": seconds, "rss_mb": rss, "lookups_per_second": rounds(7, work)}


def write_pickle(path: Path, pairs: int) -> float:
    queries, documents, values = generated(pairs)
    table: dict[int, dict[int, float]] = {}
    for start in range(0, len(queries), LIST):
        part = slice(start, start + LIST)
        table[int(queries[start])] = dict(zip(documents[part].tolist(), values[part].tolist(), strict=True))
    with open(path, "wb") as handle:
        pickle.dump(table, handle, protocol=4)
    return path.stat().st_size / pairs


def apart(step: str, path: Path, pairs: int) -> dict[str, Any]:
    """Run one step of this file in a fresh process."""
    line = [sys.executable, __file__, "--step", step, "--path", str(path), "--pairs", str(pairs)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    memory = psutil.virtual_memory().total // 10**9
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": memory,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--path", type=Path)
    given = parser.parse_args()
    steps = {"read": read, "baseline": baseline}
    if given.step:
        print(json.dumps(steps[given.step](given.path, given.pairs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        result = {"commit": commit, "command": " ".join(sys.argv), "machine": machine(), "pairs": given.pairs}
        result["store"] = fill(root / "s", given.pairs) | apart("read", root / "s", given.pairs)
        manifest = scores.publish(root / "s", to=root / "p", license="CC0-1.0")
        result["published_bytes_per_pair"] = sum(entry["bytes"] for entry in manifest.files) / given.pairs
        result["published_open_seconds"] = timed(lambda: PairScores.open(root / "p"))
        result["dict"] = {"bytes_per_pair": write_pickle(root / "t.pkl", given.pairs)}
        result["dict"] |= apart("baseline", root / "t.pkl", given.pairs)
        result["machine"]["load_at_end"] = os.getloadavg()[0]
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
