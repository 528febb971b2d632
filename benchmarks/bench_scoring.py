"""A cross-encoder's scores of a 100-deep run in random order: `CrossScorer.score` beside `CrossEncoder.predict`.

    python benchmarks/bench_scoring.py --collection DIR --model FOLDER --pairs 128 --out benchmarks/results/scoring.json

CPU seconds of one thread, the two taking turns, best of the rounds (a busy machine lengthens wall time, not this); a
body without a head gets a fresh one. About 3 minutes of one core for 128 pairs of six layers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from structkd.ranking import datasets
from structkd.ranking.cross_encoder import CrossScorer
from structkd.ranking.negatives import bm25_candidates


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    collection = datasets.load(given.collection)
    few = collection.with_queries(list(collection.queries.ids)[: -(-given.pairs // 100)])
    pairs = few.pairs_of(bm25_candidates(few, 100))
    pairs = pairs.take(np.random.default_rng(0).permutation(len(pairs))[: given.pairs])
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    scorer = CrossScorer(given.model, device="cpu")

    def theirs() -> np.ndarray:
        return np.asarray(scorer.model.predict(texts, batch_size=32, show_progress_bar=False))

    def ours() -> np.ndarray:
        scorer._tokens._kept.clear()  # texts are tokenised anew, as `predict` does
        return scorer.score(pairs).numpy()

    difference = float(np.abs(theirs() - ours()).max())
    rounds = [(cpu_seconds(theirs), cpu_seconds(ours)) for _ in range(given.rounds)]
    best = [min(column) for column in zip(*rounds, strict=True)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "commit": commit,
        "command": " ".join(sys.argv),
        "pairs": len(pairs),
        "dtype": "float32",
        "predict_cpu_seconds": best[0],
        "structkd_cpu_seconds": best[1],
        "ratio": best[0] / best[1],
        "rounds": rounds,
        "largest_difference": difference,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
