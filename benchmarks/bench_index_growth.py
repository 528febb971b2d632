"""Building from a stream of blocks that are never all in memory: time, size on disk and peak memory at growing size.

    python benchmarks/bench_index_growth.py --counts 625000 2500000 10000000 --folder BIG_DISK

Blocks are generated while the index is built (around 300 centres, spread along 24 shared directions), each size in a
process of its own, so that the peak is that size's. One thread; ten million vectors of 384 dimensions take 15 GB of
disk and about 20 minutes. Sizes that the result file holds already are not run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from origin import commit, machine, peak_bytes

from structkd import index
from structkd.files import write_json
from structkd.runs import versions

RESULT = Path(__file__).parent / "results" / "index-growth.json"
BLOCK = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[625_000, 2_500_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kind", default="ivf-pq")
    parser.add_argument("--recall", type=float, default=0.92)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", type=int, help="build this size in this process and print its row")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(built(options.one, options)))
        return
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for count in sorted(options.counts):
        if any((row["count"], row["dim"], row["kind"]) == (count, options.dim, options.kind) for row in rows):
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        body = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
        body |= {"command": "python benchmarks/bench_index_growth.py", "threads": 1}
        body |= {"versions": versions() | {"faiss": faiss.__version__}, "rows": rows}
        write_json(options.out, body)


def built(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """One build from the stream, then searches with new queries of the same distribution."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    private = Private()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        began, used = time.perf_counter(), time.process_time()
        made = index.build(blocks(count, options.dim), kind=options.kind, recall=options.recall, out=folder)
        wall, cpu = time.perf_counter() - began, time.process_time() - used
        peak = peak_bytes()
        private_peak = private.stop()
        began = time.perf_counter()
        opened = index.open_vectors(folder)
        open_seconds = time.perf_counter() - began
        queries = next(blocks(1000, options.dim, seed=1))[:1000]
        opened.search(queries, 10)
        used = time.process_time()
        opened.search(queries, 10)
        search_seconds = time.process_time() - used
    manifest = made.manifest  # type: ignore[attr-defined]
    return {
        "count": count,
        "dim": options.dim,
        "kind": options.kind,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "vectors_bytes": count * options.dim * 4,
        "index_bytes": manifest.bytes,
        "peak_rss_bytes": peak,
        "peak_private_bytes": private_peak,
        "open_seconds": round(open_seconds, 3),
        "queries_per_second": round(1000 / search_seconds),
        "recall": manifest.recall,
        "parameters": manifest.parameters,
    }


def blocks(count: int, dim: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Generated vectors, a block at a time; a block depends on its place and the seed alone."""
    rng = np.random.default_rng(0)
    centres, directions = rng.standard_normal((300, dim), np.float32), rng.standard_normal((24, dim), np.float32)
    for start in range(0, count, BLOCK):
        size, own = min(BLOCK, count - start), np.random.default_rng([seed, start])
        spread = own.standard_normal((size, 24), np.float32) @ directions
        noise = own.standard_normal((size, dim), np.float32)
        yield 0.6 * centres[own.integers(0, 300, size)] + 0.4 * spread + 0.3 * noise


class Private:
    """The largest anonymous memory of this process, looked at ten times a second: mapped file pages don't count."""

    def __init__(self) -> None:
        self.largest, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End watching; the largest value seen, in bytes."""
        self._ended.set()
        self._thread.join()
        return self.largest

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.largest = max(self.largest, int(line.split()[1]) * 1024)


if __name__ == "__main__":
    main()
