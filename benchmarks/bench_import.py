"""Import of score files: MB/s and memory beside pandas and polars, which only read the same file into columns.

    python benchmarks/bench_import.py --pairs 2000000 --out benchmarks/results/score-import.json
    python benchmarks/bench_import.py --pairs 160000000 --formats trec-run --alone --limit-gb 4 --out FILE

A generated file of each format (queries of 100 documents of 220,000, scores of deviation 7, as
`bench_score_store.py` makes them). Each step has a process of its own: `parse` reads the blocks and drops them,
`import` makes the store, whole and compacted. CPU seconds of one thread and wall seconds are both given, and the
peak of resident memory; `--limit-gb` bounds the data segment.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from bench_score_store import BLOCK, generated
from origin import commit, machine, peak_bytes

FORMATS = ("trec-run", "margin-tsv-ids", "colbert-examples", "parquet", "sbert-pickle")


def write_tsv(path: Path, format: str, pairs: int) -> None:
    """A run `query document rank score`, or each list's first document as the positive against the others."""
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with pa.OSFile(str(path), "wb") as sink:
        writer = None
        for start in range(0, pairs, BLOCK):
            queries, documents, scores = generated(pairs, start, min(start + BLOCK, pairs))
            scores = scores.astype(np.float32)
            if format == "trec-run":
                ranks = np.tile(np.arange(1, 101), len(queries) // 100)
                scores = -np.sort(-scores.reshape(-1, 100), axis=1).reshape(-1)
                columns = [queries, documents, ranks, scores]
            else:
                rest = np.arange(len(queries)) % 100 != 0
                first = np.arange(len(queries)) // 100 * 100
                columns = [scores[first][rest], scores[rest], queries[rest], documents[first][rest], documents[rest]]
            table = pa.table({str(i): column for i, column in enumerate(columns)})
            writer = writer or pyarrow.csv.CSVWriter(sink, table.schema, write_options=options)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def run_parse(path: Path, format: str) -> int:
    from structkd.scores.formats import registry as formats

    _, blocks = formats.stream(path, format)
    return sum(len(block) for block in blocks)


def run_import(path: Path, format: str) -> int:
    from structkd import scores

    scores.import_file(path, path.with_name("store"), format=format)
    return len(scores.open(path.with_name("store")))


def run_pandas(path: Path, format: str) -> int:
    import pandas

    return len(pandas.read_parquet(path) if format == "parquet" else pandas.read_csv(path, sep="\t", header=None))


def run_polars(path: Path, format: str) -> int:
    import polars

    return len(
        polars.read_parquet(path) if format == "parquet" else polars.read_csv(path, separator="\t", has_header=False)
    )


STEPS: dict[str, Callable[[Path, str], int]] = {
    "parse": run_parse, "import": run_import, "pandas": run_pandas, "polars": run_polars,
}  # fmt: skip


def step(name: str, path: Path, format: str) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    rows = STEPS[name](path, format)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size = path.stat().st_size / 1e6
    return {
        "rows": rows,
        "seconds": wall,
        "cpu_seconds": cpu,
        "mb_per_second": size / wall,
        "mb_per_cpu_second": size / cpu,
        "peak_rss_mb": peak_bytes() / 1e6,
    }


def apart(name: str, path: Path, format: str, limit: float | None) -> dict[str, Any]:
    line = [sys.executable, __file__, "--step", name, "--path", str(path), "--formats", format]
    line += ["--limit-gb", str(limit)] if limit else []
    # each tool on one thread; the time to import its modules counts for none
    environment = os.environ | {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2_000_000)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--alone", action="store_true", help="leave out pandas and polars")
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--path", type=Path)
    given = parser.parse_args()
    if given.step:
        if given.limit_gb:
            limit = int(given.limit_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        __import__(
            {"parse": "structkd.scores.formats.registry", "import": "structkd.scores.importing"}.get(
                given.step, given.step
            )
        )
        print(json.dumps(step(given.step, given.path, given.formats)))
        return
    result: dict[str, Any] = {
        "commit": commit(),
        "command": " ".join(sys.argv),
        "machine": machine(),
        "pairs": given.pairs,
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        base = root / "run.tsv"
        write_tsv(base, "trec-run", given.pairs)
        for format in given.formats.split(","):
            path = root / f"file.{format}"
            if format == "trec-run":
                path = base
            elif format == "margin-tsv-ids":
                write_tsv(path, format, given.pairs)
            else:
                _exported(base, path, format)
            found: dict[str, Any] = {"file_mb": path.stat().st_size / 1e6}
            for name in STEPS:
                other = name in ("pandas", "polars")
                if other and (given.alone or format not in ("trec-run", "margin-tsv-ids", "parquet")):
                    continue
                rounds = []
                for _ in range(given.rounds):
                    rounds.append(apart(name, path, format, None if other else given.limit_gb))
                    subprocess.run(["rm", "-rf", str(root / "store")], check=True)
                found[name] = min(rounds, key=lambda one: one["cpu_seconds"]) | {
                    "cpu_seconds_of_rounds": [one["cpu_seconds"] for one in rounds]
                }
            result[format] = found
            print(json.dumps({format: found}), file=sys.stderr, flush=True)
            if path != base:
                path.unlink()
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


def _exported(base: Path, path: Path, format: str) -> None:
    """The run in another format."""
    from structkd import scores
    from structkd.scores.formats import registry as formats

    store = base.with_name("whole")
    if not store.exists():
        scores.import_file(base, store, format="trec-run", teacher_name="generated")
    formats.write(path, format, scores.open(store))


if __name__ == "__main__":
    main()
