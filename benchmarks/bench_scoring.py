"""A cross-encoder's scores of a 100-deep run in random order: `CrossScorer.score` beside `CrossEncoder.predict`.

    python benchmarks/bench_scoring.py --collection DIR --model FOLDER --pairs 128 --out benchmarks/results/scoring.json

CPU seconds of one thread, the two taking turns, best and median of the rounds (a busy machine lengthens wall time, not
this); a body without a head gets a fresh one. `--bfloat16-pairs` of the pairs are scored in bfloat16 too, and the
agreement of the two orders within each query is given. About 3 minutes of one core for 128 pairs of six layers.
With `--device cuda` seconds are wall seconds to the end of the device's work, and `predict` runs in bfloat16 as well.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import commit, machine

from structkd.ids import Pairs
from structkd.ranking.data import datasets
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.scores.compare import kendall_tau


def seconds(work: Callable[[], object], device: str) -> float:
    """Processor seconds on the CPU; wall seconds until a GPU has finished."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def anew(scorer: CrossScorer, pairs: Pairs) -> torch.Tensor:
    """Scores with all texts tokenised again, as `predict` does."""
    scorer._tokens._kept.clear()
    return scorer.score(pairs)


def in_bfloat16(model: str, full: CrossScorer, pairs: Pairs, rounds: int, device: str) -> dict[str, Any]:
    """The same pairs by `predict` at float32 and by a scorer in bfloat16; agreement of the orders per query."""
    half = CrossScorer(model, device=device, dtype="bfloat16")
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    rounded = half.score(pairs).double().cpu().numpy()
    timed = []
    for _ in range(rounds):
        theirs = seconds(lambda: full.model.predict(texts, batch_size=32, show_progress_bar=False), device)
        timed.append((theirs, seconds(lambda: anew(half, pairs), device)))
    exact = full.score(pairs).double().cpu().numpy()
    halved: dict[str, Any] = {}
    if device != "cpu":  # the alternative with the same precision
        other = CrossScorer(model, device=device, dtype="bfloat16").model
        other.predict(texts[:64], batch_size=32, show_progress_bar=False)
        own = [
            seconds(lambda: other.predict(texts, batch_size=32, show_progress_bar=False), device) for _ in range(rounds)
        ]
        halved = {
            "predict_bfloat16_seconds": min(own),
            "ratio_over_predict_bfloat16": min(own) / min(b for _, b in timed),
        }
    taus = []
    for query in np.unique(pairs.query_rows):
        own = pairs.query_rows == query
        if (tau := kendall_tau(exact[own], rounded[own])) is not None:
            taus.append(tau)
    return {
        "pairs": len(pairs),
        "predict_float32_seconds": min(theirs for theirs, _ in timed),
        "structkd_bfloat16_seconds": min(ours for _, ours in timed),
        "ratio_of_rounds": [theirs / ours for theirs, ours in timed],
        "ratio_median": statistics.median(theirs / ours for theirs, ours in timed),
        **halved,
        "kendall_tau": float(np.mean(taus)) if taus else None,
        "largest_difference": float(np.abs(exact - rounded).max()),
        "score_deviation": float(exact.std()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16-pairs", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    collection = datasets.load(given.collection)
    few = collection.with_queries(list(collection.queries.ids)[: -(-given.pairs // 100)])
    pairs = few.pairs_of(bm25_candidates(few, 100))
    pairs = pairs.take(np.random.default_rng(0).permutation(len(pairs))[: given.pairs])
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    scorer = CrossScorer(given.model, device=given.device)

    def theirs() -> np.ndarray:
        return np.asarray(scorer.model.predict(texts, batch_size=32, show_progress_bar=False))

    def ours() -> np.ndarray:
        return anew(scorer, pairs).cpu().numpy()

    difference = float(np.abs(theirs() - ours()).max())
    rounds = [(seconds(theirs, given.device), seconds(ours, given.device)) for _ in range(given.rounds)]
    best = [min(column) for column in zip(*rounds, strict=True)]
    result = {
        "commit": commit(),
        "command": " ".join(sys.argv),
        "pairs": len(pairs),
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if given.device == "cuda" else machine(),
        "seconds": "wall" if given.device == "cuda" else "processor, one thread",
        "predict_seconds": best[0],
        "structkd_seconds": best[1],
        "ratio": best[0] / best[1],
        "ratio_of_rounds": [theirs / ours for theirs, ours in rounds],
        "ratio_median": statistics.median(theirs / ours for theirs, ours in rounds),
        "rounds": rounds,
        "largest_difference": difference,
        "load": os.getloadavg()[0],
    }
    if given.bfloat16_pairs:
        result["bfloat16"] = in_bfloat16(
            given.model, scorer, pairs.take(slice(0, given.bfloat16_pairs)), given.rounds, given.device
        )
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
