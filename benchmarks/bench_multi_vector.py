"""Multi-vector search: exact MaxSim beside the fast engine, on token vectors of real texts and real queries.

    python benchmarks/bench_multi_vector.py --init ALL_MINILM_L6_V2 --data DIR/cranfield DIR/nfcorpus --work DIR

Vectors are those of an untrained ColBERT student (MiniLM's token states, 128 numbers, cosine), kept in WORK. The
engine is tuned once by stand-ins that it makes from documents and once by the even queries, and measured with the odd
ones. Times are CPU seconds of one thread over those. About 2 minutes for cranfield and 6 for nfcorpus on one core;
collections that the result holds are not run again.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import commit, machine

from structkd import index
from structkd.files import atomic_path, write_json
from structkd.ranking.data.collection import Collection, load
from structkd.ranking.models.students import student
from structkd.runs import versions

RESULT = Path(__file__).parent / "results" / "index-multi-vector.json"
RECALLS = (0.9, 0.95, 0.98)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True)
    parser.add_argument("--data", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--max-length", type=int, default=180)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for folder in options.data:
        if any(row["collection"] == folder.name for row in rows):
            continue
        rows += measured(load(folder), options)
        body = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
        body |= {"command": "python benchmarks/bench_multi_vector.py", "threads": 1, "versions": versions()}
        write_json(options.out, body | {"rows": rows})
        print(json.dumps(rows, indent=2))


def measured(collection: Collection, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per recall asked for and kind of queries that the engine was tuned with."""
    documents, queries = (vectors(collection, side, options) for side in ("document", "query"))
    given, asked = queries[::2], queries[1::2]
    ids, rows = collection.documents.ids, []
    exact = index.build_multi(documents, ids, out=options.work / f"{collection.name}-exact")
    truth, exact_seconds = searched(exact, asked)
    for recall, tuned_by in product(RECALLS, (None, given)):
        place = options.work / f"{collection.name}-{recall}-{tuned_by is None}"
        fast = index.build_multi(documents, ids, recall=recall, queries=tuned_by, out=place)
        found, seconds = searched(fast, asked)
        shares = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found.rows, truth.rows, strict=True)]
        rows.append(
            {"collection": collection.name, "documents": len(documents), "queries": len(asked), "dim": fast.dim}
            | {"vectors": int(fast.manifest.parameters["vectors"]), "recall_asked": recall}
            | {"recall_at_build": fast.manifest.recall, "recall_of_the_queries": round(float(np.mean(shares)), 4)}
            | {"search": fast.manifest.parameters.get("scored"), "build_seconds": fast.manifest.build_seconds}
            | {"exact_queries_per_second": round(len(asked) / exact_seconds, 1)}
            | {"fast_queries_per_second": round(len(asked) / seconds, 1)}
            | {"times_exact": round(exact_seconds / seconds, 2)}
        )
    return rows


def searched(built: index.MultiVectorIndex, queries: list[np.ndarray]) -> tuple[index.TopK, float]:
    """The first ten of each query, and the CPU seconds of all."""
    built.search(queries[:4], 10)
    began = time.process_time()
    return built.search(queries, 10), time.process_time() - began


def vectors(collection: Collection, side: str, options: argparse.Namespace) -> list[np.ndarray]:
    """One [tokens, 128] array per text, encoded once."""
    path = options.work / f"{collection.name}-{side}.npz"
    texts = collection.documents if side == "document" else collection.queries
    if not path.is_file():
        torch.manual_seed(0)  # of the projection to 128 numbers
        scorer = student("colbert", options.init, max_length=options.max_length, seed=0)
        encoded = scorer.encode_multi(list(texts.texts), side)  # type: ignore[attr-defined]
        arrays = [np.asarray(one, dtype=np.float32) for one in encoded]
        with atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.savez(handle, flat=np.concatenate(arrays), lengths=np.asarray([len(one) for one in arrays]))
    with np.load(path) as stored:
        return np.split(stored["flat"], np.cumsum(stored["lengths"])[:-1])


if __name__ == "__main__":
    main()
