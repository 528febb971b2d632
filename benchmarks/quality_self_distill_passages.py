"""Trans-Encoder on queries and passages, without labels: nDCG@10 before and after every cycle and phase.

    python benchmarks/quality_self_distill_passages.py --data COLLECTIONS --init ALL_MINILM_L6_V2 --work DIR --out FILE

scifact: the training queries (without the two that repeat a test query) with BM25's first passages are the unlabelled
pool, the test queries measure. msmarco-dl19: dl22's 76 unlabelled queries with BM25's first passages are the pool, dl19
measures. Bi-encoders search all passages and re-rank BM25's first; cross-encoders re-rank. Judgements only measure. The
start is the model with layers 1, 3, 5, or with `--strong` the whole model; the cross-encoder's body is the whole model.
A run that was stopped continues. p: paired randomisation over queries against the start, in the same mode.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from origin import commit, machine
from starts import dl19, start, with_settings

from structkd.files import write_json
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.datasets import load
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.data.pair_pool import pool_of_collection
from structkd.ranking.evaluation.measures import EvaluationResult, compare, evaluate_run, rerank, retrieve
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.self_distillation.cycles import SelfDistillConfig, self_distill
from structkd.runs import plain, versions
from structkd.trec import Run, read_run

MEASURE = "nDCG@10"
BASE = SelfDistillConfig(asymmetric=True, max_length=192, max_pair_length=224)


def parts(data: Path, name: str, depth: int, queries: int) -> tuple[dict[str, Collection], Run, Collection, Run]:
    """Test collection in each mode, `queries` of it, and its first stage; pool collection and its candidates."""
    if name == "scifact":
        test, pool = load(data / name), load(data / name, "train")
        test = test.with_queries(list(test.queries.ids)[: queries or None])
        pool = pool.with_queries([query for query in pool.queries.ids if query not in ("871", "1291")])
        return {"rerank": test, "retrieve": test}, bm25_candidates(test, 50), pool, bm25_candidates(pool, depth)
    test, pool = load(data / "msmarco-dl19"), load(data / "msmarco-dl22")
    first = read_run(data / "msmarco-dl19" / "runs" / "bm25.tsv").cut(50)
    return {"rerank": dl19(data), "retrieve": test}, first, pool, bm25_candidates(pool, 10 * depth)


def measured(tests: dict[str, Collection], first: Run, scorer: BiScorer | CrossScorer) -> dict[str, EvaluationResult]:
    """Re-ranking, and search where there are vectors."""
    found = {"rerank": evaluate_run(tests["rerank"], rerank(tests["rerank"], scorer, first), MEASURE)}
    if isinstance(scorer, BiScorer):
        found["retrieve"] = evaluate_run(tests["retrieve"], retrieve(tests["retrieve"], scorer, depth=100), MEASURE)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "init", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--collections", nargs="+", default=["scifact", "msmarco-dl19"])
    parser.add_argument("--depth", type=int, default=8, help="pooled passages a query; ten times as many of dl22's 76")
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--test-queries", type=int, default=0, help="of scifact, the first; 0: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the cycles")
    parser.add_argument("--strong", action="store_true", help="start from the whole model")
    options = parser.parse_args()
    work, data, rows = Path(options.work), Path(options.data), []
    init = start(options.init, work, "all" if options.strong else "1,3,5")
    config = with_settings(replace(BASE, cycles=options.cycles), options.set)
    bi = partial(BiScorer, query_length=config.max_length, document_length=config.max_length)
    for name in options.collections:
        tests, first, pooled, candidates = parts(data, name, options.depth, options.test_queries)
        before = measured(tests, first, bi(init))
        bm25 = evaluate_run(tests["rerank"], first, MEASURE).measures[MEASURE]
        for seed in range(options.seed, options.seed + options.seeds):
            started = time.perf_counter()
            result = self_distill(
                pool_of_collection(pooled, candidates), [init], replace(config, seed=seed),
                out=work / f"{name}-{options.strong}-{seed}", cross_inits=[options.init],
            )  # fmt: skip
            seconds = round(time.perf_counter() - started, 1)
            for phase in result.rows:
                scorer = CrossScorer(phase.folder) if phase.phase == "cross" else bi(phase.folder)
                row: dict[str, Any] = {"collection": name, "seed": seed, "cycle": phase.cycle, "phase": phase.phase}
                row |= {"pool": result.pool, "bm25": bm25, "seconds_of_the_run": seconds}
                for mode, after in measured(tests, first, scorer).items():
                    test_of = compare(before[mode], after, MEASURE)
                    row[mode] = {
                        "before": round(before[mode].measures[MEASURE], 4),
                        "after": round(after.measures[MEASURE], 4),
                        "p": round(test_of.p_value, 4),
                    }
                rows.append(row)
                print(json.dumps(row), flush=True)
            head = {"measure": MEASURE, "config": plain(config), "strong": options.strong, "depth": options.depth}
            head["scifact_test_queries"] = options.test_queries or "all"
            head |= {"commit": commit(), "machine": machine(), "versions": versions()}
            write_json(Path(options.out), {"command": __doc__.split("\n\n")[1].strip(), **head, "rows": rows})


if __name__ == "__main__":
    main()
