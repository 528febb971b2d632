"""Trans-Encoder on sentence similarity: Spearman per set before and after every cycle and phase, self and mutual.

    python benchmarks/quality_self_distill.py --data DIR/sts-dev --init ALL_MINILM_L6_V2 --work DIR --out ROWS.json

The starts are the model with layers 1, 3, 5 (and 2, 5 for the second one of `--mutual`); the cross-encoder's body is
the whole model. Labels only measure: nothing is chosen by them. The pool holds sentence pairs of the same sets, those
measured on among them (transductive), unless --apart draws it from the training files alone. One model costs about
--pairs / 300 minutes a cycle on one core of 65 GFLOP/s. A run that was stopped continues; every row states its seconds.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from structkd.files import write_json
from structkd.ids import Pairs
from structkd.ranking.cross_encoder import CrossScorer
from structkd.ranking.pair_pool import GoldPairs, gold_of_file, pool_of_file
from structkd.ranking.pseudo_labels import SentenceScorer, logit_targets, orders
from structkd.ranking.selection import spearman
from structkd.ranking.self_distill import SelfDistillConfig, self_distill
from structkd.runs import plain, versions


def shallow(init: str, layers: tuple[int, ...], folder: Path) -> str:
    """The model with these layers only."""
    if not folder.is_dir():
        model = SentenceTransformer(init, device="cpu")
        encoder = model[0].auto_model.encoder
        encoder.layer = torch.nn.ModuleList([encoder.layer[layer] for layer in layers])
        model[0].auto_model.config.num_hidden_layers = len(layers)
        model.save(str(folder))
    return str(folder)


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


def measured(folder: str, phase: str, sets: dict[str, GoldPairs]) -> dict[str, float]:
    """Spearman x 100 of each set and their mean."""
    scorer = CrossScorer(folder) if phase == "cross" else SentenceScorer(folder)

    def scores(pairs: Pairs) -> np.ndarray:
        found = orders(scorer, pairs, phase == "cross")
        return logit_targets(found) if phase == "cross" else found[0]

    values = {name: round(100 * spearman(scores(gold.pairs), gold.scores), 2) for name, gold in sets.items()}
    return {**values, "average": round(float(np.mean(list(values.values()))), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "init", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=0, help="pairs measured in each set; 0: all")
    parser.add_argument("--mutual", action="store_true", help="two starting models")
    parser.add_argument("--strong", action="store_true", help="start from the whole model")
    parser.add_argument("--apart", action="store_true", help="keep the measured sets out of the pool")
    options = parser.parse_args()
    work, data, started = Path(options.work), Path(options.data), time.process_time()
    inits = [options.init] if options.strong else [shallow(options.init, (1, 3, 5), work / "start-135")]
    inits += [shallow(options.init, (2, 5), work / "start-25")] if options.mutual else []
    pool = pool_file(data, options.pairs, options.apart, work / f"pool-{options.pairs}-{options.apart}.tsv")
    sets = measured_sets(data, options.each)
    out = Path(options.out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    known = {(row["seed"], row["cycle"], row["phase"], row["model"]) for row in rows}

    def record(seed: int, cycle: int, phase: str, model: int, folder: str, **figures: float) -> None:
        if (seed, cycle, phase, model) in known:
            return
        row = {"seed": seed, "cycle": cycle, "phase": phase, "model": model, **figures}
        rows.append(row | {"spearman": measured(folder, phase, sets)})
        print(json.dumps(rows[-1]), flush=True)
        kept = {key: value for key, value in vars(options).items() if key not in ("work", "out", "data", "init")}
        found = {"dataset": "sts-dev", "settings": kept, "config": plain(SelfDistillConfig(cycles=options.cycles))}
        seconds = round(time.process_time() - started, 1)
        write_json(out, found | {"versions": versions(), "cpu_seconds": seconds, "rows": rows})

    for seed in range(options.seeds):
        for model, init in enumerate(inits, start=1):
            record(seed, 0, "bi", model, init)
        name = f"run-{options.pairs}-{len(inits)}-{options.strong}-{options.apart}-{options.cycles}-{seed}"
        config = SelfDistillConfig(cycles=options.cycles, seed=seed)
        unlabelled = pool_of_file(pool, symmetric=True)
        result = self_distill(unlabelled, inits, config, out=work / name, cross_inits=[options.init])
        for phase in result.rows:
            figures = {"held_out_agreement": round(phase.dev, 4), "seconds": phase.seconds}
            record(seed, phase.cycle, phase.phase, phase.model, phase.folder, **figures)


if __name__ == "__main__":
    main()
