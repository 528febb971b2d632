"""Trans-Encoder on sentence similarity: Spearman per set before and after every cycle and phase, self and mutual.

    python benchmarks/quality_self_distill.py --data DIR/sts-dev --init ALL_MINILM_L6_V2 --work DIR --out ROWS.json

A start is the model with some of its layers (`--starts 1,3,5`; `all` is the whole model); several starts teach each
other (`--starts 1,3,5 2,4,5`). The cross-encoder's body is the whole model. Labels only measure: nothing is chosen by
them. The pool holds sentence pairs of the same sets, those measured on among them (transductive), unless --apart draws
it from the training files alone. One cycle of one model over 5,000 pairs costs about 28 minutes on one core of 65
GFLOP/s, over 10,000 about 33 (17 pairs a second in training, 50 in labelling). A run that was stopped continues; every
row states its seconds.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from origin import commit, machine
from starts import start, with_settings

from structkd.files import read_json, write_json
from structkd.ids import Pairs
from structkd.ranking.data.pair_pool import GoldPairs, gold_of_file, pool_of_file
from structkd.ranking.evaluation.selection import spearman
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.self_distillation.cycles import SelfDistillConfig, self_distill
from structkd.ranking.self_distillation.isotropy import WhitenedScorer, Whitening
from structkd.ranking.self_distillation.pseudo_labels import SentenceScorer, logit_targets, orders
from structkd.runs import plain, versions
from structkd.scores.cache import Scorer


def pool_file(data: Path, count: int, apart: bool, path: Path) -> Path:
    """`count` unlabelled pairs, drawn once."""
    files = [file for file in sorted(data.glob("*.tsv")) if "mrpc" not in file.name]
    files = [file for file in files if "train" in file.name] if apart else files
    rows = [line.split("\t")[1:3] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{left}\t{right}\n" for left, right in rows[:count]), encoding="utf-8")
    return path


def measured_sets(data: Path, each: int) -> dict[str, GoldPairs]:
    """The sets that are no training files; the first `each` pairs of a fixed shuffle, 0: all."""
    sets = {}
    for file in sorted(data.glob("*.tsv")):
        if "train" in file.name:
            continue
        gold = gold_of_file(file, symmetric=True)
        keep = np.random.default_rng(1).permutation(len(gold.scores))[: each or None]
        sets[file.stem] = GoldPairs(gold.pairs.take(keep), gold.scores[keep], gold.source)
    return sets


def measured(scorer: Scorer, sets: dict[str, GoldPairs]) -> dict[str, float]:
    """Spearman x 100 of each set and their mean."""
    cross = isinstance(scorer, CrossScorer)

    def scores(pairs: Pairs) -> np.ndarray:
        found = orders(scorer, pairs, cross)
        return logit_targets(found) if cross else found[0]

    values = {name: round(100 * spearman(scores(gold.pairs), gold.scores), 2) for name, gold in sets.items()}
    return {**values, "average": round(float(np.mean(list(values.values()))), 2)}


def whitened(init: str, whitening: Path) -> WhitenedScorer:
    """A starting model with the whitening that its labels had."""
    return WhitenedScorer(SentenceScorer(init), Whitening.load(whitening))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "init", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--each", type=int, default=0, help="pairs measured in each set; 0: all")
    parser.add_argument("--starts", nargs="+", default=["1,3,5"], help="layers of each starting model, or all")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the cycles")
    parser.add_argument("--apart", action="store_true", help="keep the measured sets out of the pool")
    options = parser.parse_args()
    work, data, started = Path(options.work), Path(options.data), time.process_time()
    inits = [start(options.init, work, layers) for layers in options.starts]
    pool = pool_file(data, options.pairs, options.apart, work / f"pool-{options.pairs}-{options.apart}.tsv")
    sets = measured_sets(data, options.each)
    base = with_settings(SelfDistillConfig(cycles=options.cycles), options.set)
    out = Path(options.out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    known = {(row["seed"], row["cycle"], row["phase"], row["model"]) for row in rows}

    def record(seed: int, cycle: int, phase: str, model: int, open_it: Callable[[], Scorer], **figures: float) -> None:
        if (seed, cycle, phase, model) in known:
            return
        row = {"seed": seed, "cycle": cycle, "phase": phase, "model": model, **figures}
        rows.append(row | {"spearman": measured(open_it(), sets)})
        print(json.dumps(rows[-1]), flush=True)
        save()

    def save() -> None:
        kept = {key: value for key, value in vars(options).items() if key not in ("work", "out", "data", "init")}
        body = {"dataset": "sts-dev", "measure": "Spearman x 100", "settings": kept, "config": plain(base)}
        body |= {"commit": commit(), "machine": machine(), "command": "python benchmarks/quality_self_distill.py"}
        seconds = round(time.process_time() - started, 1)
        write_json(out, body | {"versions": versions(), "cpu_seconds": seconds, "rows": rows})

    for seed in range(options.seed, options.seed + options.seeds):
        for model, init in enumerate(inits, start=1):
            record(seed, 0, "bi", model, partial(SentenceScorer, init))
        settings = [options.pairs, "+".join(options.starts), options.apart, options.cycles, *options.set, seed]
        name = "run-" + "-".join(map(str, settings))
        config = replace(base, seed=seed)
        unlabelled = pool_of_file(pool, symmetric=True)
        result = self_distill(unlabelled, inits, config, out=work / name, cross_inits=[options.init])
        for model, init in enumerate(inits, start=1):  # the start as it labels in the first cycle
            whitening = work / name / f"cycle-1/whitening-{model}.npz"
            if whitening.is_file() and read_json(whitening.with_suffix(".json"))["whitened"]:
                record(seed, 0, "labels", model, partial(whitened, init, whitening))
        for phase in result.rows:
            figures = {"held_out_agreement": round(phase.dev, 4), "seconds": phase.seconds}
            kind = CrossScorer if phase.phase == "cross" else SentenceScorer
            record(seed, phase.cycle, phase.phase, phase.model, partial(kind, phase.folder), **figures)


if __name__ == "__main__":
    main()
