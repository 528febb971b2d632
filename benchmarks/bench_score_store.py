"""Score store against a dict of dicts: size, open time, memory, lookups per second, commit and compaction, workers.

    python benchmarks/bench_score_store.py --pairs 20000000 --out benchmarks/results/score-store.json
    python benchmarks/bench_score_store.py --pairs 160000000 --no-dict --limit-gb 4 --out FILE

Generated pairs: each query has 100 distinct documents of 220,000 (cross-encoder-like scores, deviation 7). Lookups go
in batches of 4096 pairs that are all there (256 queries x 16 documents), as a trainer asks. Each step has a process,
and so memory, of its own; `--limit-gb` bounds its data segment. Opening and rates are given in CPU time of the one
thread that does the work (on an idle machine the clock's, but for caches that neighbours empty); they are taken in
short bursts, of which best, median and spread are given. Random loads and a copy are measured in turn with them, in
the same process. `--folder` keeps the store and continues with the steps that are missing there. About 3 minutes for
20 million pairs, 10 for 160 million.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from origin import commit, machine, peak_bytes

from structkd import scores
from structkd.scores import NodeScores, PairScores, TeacherSpec
from structkd.scores.compaction.compact import compact
from structkd.scores.layout._lookup import find_numba, find_numpy
from structkd.scores.layout.log import PairLog

LIST, DOCUMENTS, UNIT, BATCH, BLOCK = 100, 220_000, 20_000, 4096, 1_000_000
GROUP, ROUNDS = 4, 200  # batches in a burst of a millisecond or two: shorter than a turn of the scheduler
SPEC = TeacherSpec("generated")


def generated(pairs: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query rows, document rows, scores of the pairs start .. stop-1; ascending by key."""
    columns = []
    for block in range(start // BLOCK, -(-(pairs if stop is None else stop) // BLOCK)):
        rng = np.random.default_rng([0, block])
        count = min(BLOCK, pairs - block * BLOCK)
        queries = np.repeat(np.arange(block * BLOCK // LIST, (block * BLOCK + count) // LIST), LIST)
        step = DOCUMENTS // LIST
        offsets = rng.integers(0, step, size=count)  # one document of each stratum: distinct within a list
        columns.append((queries, np.tile(np.arange(LIST) * step, count // LIST) + offsets, rng.normal(0, 7, count)))
    return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def bursts(works: dict[str, Callable[[], float]]) -> dict[str, dict[str, float]]:
    """Best, median and spread of the rates that each work returns; the works take turns."""
    values: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            values[name].append(work())
    return {
        name: {"best": max(found), "median": statistics.median(found), "spread": max(found) - min(found)}
        for name, found in values.items()
    }


def resident() -> dict[str, float]:
    """Megabytes of this process's own (anonymous) pages and of file pages, which all processes share."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")}


def fill(folder: Path, pairs: int) -> dict[str, Any]:
    """Commit the pairs unit by unit."""
    log = PairLog.open(folder, SPEC)
    num_queries = pairs // LIST
    for start in range(0, num_queries, 400_000):
        ids = [str(i) for i in range(start, min(start + 400_000, num_queries))]
        log.queries.extend(ids, [None] * len(ids))
    log.documents.extend([str(i) for i in range(DOCUMENTS)], [None] * DOCUMENTS)
    commits = []
    begun, cpu = time.perf_counter(), time.process_time()
    for block in range(0, pairs, BLOCK):
        queries, documents, values = generated(pairs, block, min(block + BLOCK, pairs))
        for start in range(0, len(queries), UNIT):
            unit = log.unit(queries[start : start + UNIT], documents[start : start + UNIT])
            part = values[start : start + UNIT]
            commits.append(timed(lambda unit=unit, part=part: log.commit(unit, part)))
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {
        "commit_ms": {
            "median": 1000 * statistics.median(commits),
            "p90": 1000 * sorted(commits)[len(commits) * 9 // 10],
        },
        "import_seconds": seconds,
        "import_rows_per_second": pairs / seconds,
        "import_rows_per_cpu_second": pairs / cpu,
        "import_peak_rss_mb": peak_bytes() / 1e6,
    }


def compacted(folder: Path, pairs: int) -> dict[str, Any]:
    cpu = time.process_time()
    seconds = timed(lambda: compact(folder))
    cpu = time.process_time() - cpu
    size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    return {
        "compact_seconds": seconds,
        "compact_rows_per_second": pairs / seconds,
        "compact_rows_per_cpu_second": pairs / cpu,
        "compact_peak_rss_mb": peak_bytes() / 1e6,
        "bytes_per_pair": size / pairs,
        "files": len(list((folder / "data").iterdir())),
    }


def scattered(pairs: int, count: int, path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches over all queries, made once and kept, so that making them is no part of a reader's memory."""
    if not path.exists():
        rng = np.random.default_rng(1)
        picks = rng.choice(pairs // LIST, (count, BATCH // 16))
        wanted, place = np.unique(picks, return_inverse=True)
        documents = np.empty((len(wanted), LIST), dtype=np.int64)
        for block in np.unique(wanted * LIST // BLOCK):
            found = generated(pairs, block * BLOCK, min((block + 1) * BLOCK, pairs))[1].reshape(-1, LIST)
            own = wanted * LIST // BLOCK == block
            documents[own] = found[wanted[own] - block * BLOCK // LIST]
        columns = rng.integers(0, LIST, (count, BATCH // 16, 16))
        asked = documents[place.reshape(count, -1)[:, :, None], columns].reshape(count, -1)
        np.save(path, np.stack([np.repeat(picks, 16, axis=1), asked]))
    queries, documents = np.load(path)
    return list(zip(queries, documents, strict=True))


def read(folder: Path, pairs: int) -> dict[str, Any]:
    """Open the store and look up; in a process of its own."""
    asked = scattered(pairs, 50, folder.parent / "asked.npy")
    line = np.arange(1 << 26, dtype=np.int64)  # 512 MB, far beyond any cache
    places = [np.random.default_rng(i).integers(0, len(line), BATCH) for i in range(50)]
    process = psutil.Process()
    find_numba(
        np.zeros(1, np.int32),
        np.zeros(2, np.int32),
        np.zeros(1, np.uint32),
        *[np.zeros(1, np.int64)] * 2,
        0,
        np.zeros(1, np.int64),
    )
    before, kinds = process.memory_full_info(), resident()
    opens = [1000 * timed(lambda: PairScores.open(folder), time.thread_time) for _ in range(41)]
    walls = [1000 * timed(lambda: PairScores.open(folder)) for _ in range(41)]
    store = PairScores.open(folder)

    shards = store._shards
    positions = [store.positions_of_rows(*batch) for batch in asked]
    assert all((found >= 0).all() for found in positions)
    for found in positions:
        store.take(found)
    after = process.memory_full_info()
    kinds = {name: value - kinds[name] for name, value in resident().items()}

    def look(find: Callable[..., None]) -> Callable[[Any], None]:
        def work(batch: tuple[np.ndarray, np.ndarray]) -> None:
            queries, documents = batch
            out = np.full(BATCH, -1, dtype=np.int64)
            for part, (first, slots), base in zip(shards.parts, shards.slots(), shards.bases[:-1], strict=True):
                own = queries - first if first else queries
                find(slots, part.offsets, part.documents, own, documents, int(base), out)
            store.take(out)

        return work

    works = {
        "numba_lookups_per_second": rate(look(find_numba), asked),
        "numpy_lookups_per_second": rate(look(find_numpy), asked),
        "take_per_second": rate(store.take, positions),
        "random_loads_per_second": rate(lambda found: np.take(line, found), places),
        "copy_gb_per_second": lambda: 2 * 0.0084 / timed(lambda: line[: 1 << 20].copy(), time.thread_time),
    }
    return {
        "dtype": store.dtype,
        "open_ms": {"best": min(opens), "median": statistics.median(opens), "spread": max(opens) - min(opens)},
        "open_wall_ms": {"best": min(walls), "median": statistics.median(walls)},
        **bursts(works),
        "rss_mb": (after.rss - before.rss) / 1e6,
        "anonymous_mb": kinds["RssAnon"],
        "file_pages_mb": kinds["RssFile"],
        "load": os.getloadavg()[0],
    }


def rate(work: Callable[[Any], Any], batches: list) -> Callable[[], float]:
    """Items a second of one burst; each burst takes the next batches, so that they are not in the cache."""
    turn = count()

    def burst() -> float:
        own = [batches[(next(turn) * GROUP + i) % len(batches)] for i in range(GROUP)]
        return GROUP * BATCH / timed(lambda: [work(batch) for batch in own], time.thread_time)

    return burst


def workers(folder: Path, pairs: int) -> dict[str, Any]:
    """Four loader workers, forked and spawned: memory that is each one's own, and the shared pages' part."""
    asked = scattered(pairs, 50, folder.parent / "asked.npy")
    out = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        store = PairScores.open(folder)
        store.lookup_rows(*asked[0])
        ends = [context.Pipe() for _ in range(4)]
        children = [context.Process(target=work_on, args=(store, asked, own)) for _, own in ends]
        for child in children:
            child.start()
        figures = [parent.recv() for parent, _ in ends]
        mapped = [_mapped(child.pid, folder) for child in children]
        shares = [_mapped(child.pid, folder, "pss")["rss"] for child in children]
        for (parent, _), child in zip(ends, children, strict=True):
            parent.send("end")
            child.join()
        out[method] = {
            "uss_growth_mb": [round(found, 1) for found in figures],
            "mapped_store_mb": [round(found["rss"], 1) for found in mapped],
            "mapped_store_share_mb": [round(found, 1) for found in shares],
            "mapped_store_private_mb": [round(found["private"], 3) for found in mapped],
        }
    return out


def work_on(store: PairScores, asked: list, end: Any) -> None:
    before = psutil.Process().memory_full_info().uss
    for batch in asked:
        store.lookup_rows(*batch)
    end.send((psutil.Process().memory_full_info().uss - before) / 1e6)
    end.recv()


def _mapped(pid: int, folder: Path, field: str = "rss") -> dict[str, float]:
    """Resident (or proportional) and private megabytes of the store's files in a process."""
    maps = [m for m in psutil.Process(pid).memory_maps(grouped=False) if m.path.startswith(str(folder))]
    return {"rss": sum(getattr(m, field) for m in maps) / 1e6, "private": sum(m.private_dirty for m in maps) / 1e6}


def nodes(folder: Path, pairs: int) -> dict[str, Any]:
    """Rows of 2.5 million nodes x 47 classes against the bound: random cache lines a second / lines a row."""
    from structkd.scores.layout.snapshot import map_rows, write_rows

    out = {}
    line = np.arange(1 << 26, dtype=np.int64)
    rng = np.random.default_rng(0)
    for dtype in ("float16", "float32"):
        path = write_rows(folder, "rows-00000", rng.standard_normal((2_500_000, 47), dtype=np.float32).astype(dtype))
        store = NodeScores(folder, None, None, [map_rows(path)])  # type: ignore[arg-type]
        rows = [rng.integers(0, 2_500_000, BATCH) for _ in range(50)]
        places = [rng.integers(0, len(line), BATCH) for _ in range(50)]
        buffer = np.empty((BATCH, 47), dtype=np.float32)
        width = 47 * np.dtype(dtype).itemsize
        lines = 1 + (width - 1) / 64  # expected cache lines that a row touches
        works = {
            "rows_per_second": rate(lambda found, store=store, buffer=buffer: store.take(found, buffer), rows),
            "fresh_rows_per_second": rate(store.take, rows),
            "random_loads_per_second": rate(lambda found: np.take(line, found), places),
        }
        found = bursts(works)
        bound = found["random_loads_per_second"]["best"] / lines
        out[dtype] = found | {"lines_per_row": lines, "share_of_bound": found["rows_per_second"]["best"] / bound}
        path.unlink()
    return out


def baseline(path: Path, pairs: int) -> dict[str, Any]:
    """The dict of dicts that public files are: load, memory, lookups; in a process of its own."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with open(path, "rb") as handle:
        table = pickle.load(handle)  # our own file
    seconds = time.perf_counter() - start
    rss = (psutil.Process().memory_info().rss - before) / 1e6
    asked = [list(zip(q.tolist(), d.tolist(), strict=True)) for q, d in scattered(pairs, 50, path.parent / "asked.npy")]
    look = rate(lambda batch: [table[q][d] for q, d in batch], asked)
    found = {"load_seconds": seconds, "rss_mb": rss, **bursts({"lookups_per_second": look})}
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_dict_worker, args=(table, asked, theirs))
    child.start()
    found["worker_uss_growth_mb"] = mine.recv()
    child.join()
    return found


def _dict_worker(table: dict, asked: list, end: Any) -> None:
    before = psutil.Process().memory_full_info().uss
    for batch in asked:
        for q, d in batch:
            table[q][d]
    end.send((psutil.Process().memory_full_info().uss - before) / 1e6)


def write_pickle(path: Path, pairs: int) -> dict[str, float]:
    queries, documents, values = generated(pairs)
    table: dict[int, dict[int, float]] = {}
    for start in range(0, len(queries), LIST):
        part = slice(start, start + LIST)
        table[int(queries[start])] = dict(zip(documents[part].tolist(), values[part].tolist(), strict=True))
    with open(path, "wb") as handle:
        pickle.dump(table, handle, protocol=4)
    return {"bytes_per_pair": path.stat().st_size / pairs}


def apart(step: str, path: Path, pairs: int, limit: float | None = None) -> dict[str, Any]:
    """Run one step of this file in a fresh process."""
    line = [sys.executable, __file__, "--step", step, "--path", str(path), "--pairs", str(pairs)]
    line += ["--limit-gb", str(limit)] if limit else []
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)


def published(folder: Path, pairs: int) -> dict[str, Any]:
    """Size of the portable files and the time to load them."""
    shutil.rmtree(folder.parent / "p", ignore_errors=True)
    manifest = scores.publish(folder, to=folder.parent / "p", license="CC0-1.0")
    return {
        "published_bytes_per_pair": sum(entry["bytes"] for entry in manifest.files) / pairs,
        "published_open_seconds": timed(lambda: PairScores.open(folder.parent / "p")),
    }


STEPS = {
    "fill": fill, "compact": compacted, "read": read, "workers": workers, "nodes": nodes, "publish": published,
    "pickle": write_pickle, "baseline": baseline,
}  # fmt: skip
PLACES = {"nodes": "n", "pickle": "t.pkl", "baseline": "t.pkl"}
LIMITED = {"fill", "compact", "read"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-dict", action="store_true", help="leave out dict, publication and node rows")
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--path", type=Path)
    given = parser.parse_args()
    if given.step:
        if given.limit_gb:
            limit = int(given.limit_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps(STEPS[given.step](given.path, given.pairs)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = given.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        steps = ["fill", "compact", "read", "workers"]
        steps += [] if given.no_dict else ["nodes", "publish", "pickle", "baseline"]
        for name in steps:
            done = root / f"{name}.json"
            if not done.exists():
                found = apart(
                    name, root / PLACES.get(name, "s"), given.pairs, given.limit_gb if name in LIMITED else None
                )
                done.write_text(json.dumps(found))
                print(json.dumps({name: found}), file=sys.stderr, flush=True)
        found = {name: json.loads((root / f"{name}.json").read_text()) for name in steps}
    result: dict[str, Any] = {
        "commit": commit(),
        "command": " ".join(sys.argv),
        "machine": machine(),
        "memory_gb": psutil.virtual_memory().total // 10**9,
        "load": os.getloadavg()[0],
        "pairs": given.pairs,
    }
    result["store"] = found["fill"] | found["compact"] | found["read"]
    result["workers"] = found["workers"]
    if not given.no_dict:
        result["nodes"] = found["nodes"]
        result |= found["publish"]
        result["dict"] = found["pickle"] | found["baseline"]
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
