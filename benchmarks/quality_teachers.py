"""Is a student of two teachers better than a student of one? MS MARCO, training on DL'22, testing on DL'19.

    python benchmarks/quality_teachers.py --data COLLECTIONS --init ALL_MINILM_L6_V2 --work DIR

Teachers: all-MiniLM-L6-v2 (64 tokens of a text), the published SPLADE++ run, and both (`z-mean`: each standardised
within a list, then the mean). All are asked about the same lists, SPLADE++'s own, so every teacher has a score for
every pair. The student (two layers of the model) trains by Margin-MSE for a fixed number of epochs with nothing chosen
on the way, and orders SPLADE++'s first documents of DL'19, which has full judgements. Cells are kept in DIR and read
back.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import RESULTS, commit, machine
from quality_ranking_bench import short_sighted
from starts import dl19, saved

from structkd.files import read_json, write_json
from structkd.ranking import student
from structkd.ranking.data import datasets
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.evaluation.measures import evaluate_run, paired, rerank
from structkd.ranking.models.students import load_student
from structkd.ranking.teachers.sources import EnsembleScorer, RunScorer
from structkd.runs import versions
from structkd.scores.cache import CachedScorer, Scorer
from structkd.trec import Run

SPLADE = "runs/splade_p_p_ensemble_distil.tsv"
MEASURE = "nDCG@10"
QUERIES, CANDIDATES, DEPTH, LENGTH = 76, 48, 30, 64  # all of DL'22
LOOP = DistillConfig(epochs=4, batch_lists=8, target_transform="standardise", held_out=0.0, validate_on="none")
Values = dict[str, float]


def spread(run: Run, count: int) -> Run:
    """`count` documents of each list, evenly from its first to its last: easy and hard ones."""
    lists = {}
    for query, (documents, scores) in run.lists.items():
        places = np.unique(np.linspace(0, len(documents) - 1, count).round().astype(int))
        lists[query] = ([documents[place] for place in places], scores[places])
    return Run(lists)


class Comparison:
    """Lists, teachers and the kept cells."""

    def __init__(self, data: Path, init: str, work: Path) -> None:
        self.work, self.start = work, saved(init, work / "start")
        self.train = datasets.load(data / "msmarco-dl22")
        self.test = dl19(data)
        runs = [RunScorer(data / name / SPLADE) for name in ("msmarco-dl22", "msmarco-dl19")]
        chosen = sorted(runs[0].run.lists)[:QUERIES]
        self.lists = spread(Run({query: runs[0].run.lists[query] for query in chosen}), CANDIDATES)
        self.test_lists = runs[1].run.cut(DEPTH)
        model = load_student(short_sighted(init, work / f"teacher-{LENGTH}", LENGTH))
        minilm = CachedScorer(model, work / "scores" / model.spec.fingerprint[:16])
        self.teachers: dict[str, tuple[Scorer, Scorer]] = {  # on training lists, on test lists
            "MiniLM": (minilm, minilm),
            "SPLADE++": (runs[0], runs[1]),
            "both": (EnsembleScorer([minilm, runs[0]]), EnsembleScorer([minilm, runs[1]])),
        }

    def measured(self, scorer: Scorer) -> Values:
        run = rerank(self.test, scorer, self.test_lists, depth=DEPTH)
        return dict(next(iter(evaluate_run(self.test, run, MEASURE).per_query.values())))

    def kept(self, name: str, make: Any) -> Values:
        path = self.work / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        found: Values = read_json(path)
        return found

    def teacher(self, name: str) -> Values:
        return self.kept(f"teacher-{name}", lambda: self.measured(self.teachers[name][1]))

    def before(self) -> Values:
        return self.kept("before", lambda: self.measured(self.fresh(0)))

    def after(self, name: str, seed: int) -> Values:
        def make() -> Values:
            scorer = self.fresh(seed)
            config = dataclasses.replace(LOOP, seed=seed)
            distill(scorer, self.teachers[name][0], self.train, config, candidates=self.lists)
            return self.measured(scorer)

        return self.kept(f"after-{name}-{seed}", make)

    def fresh(self, seed: int) -> Any:
        return student("dot", self.start, max_length=LENGTH, seed=seed)


def mean(values: list[Values]) -> Values:
    return {query: float(np.mean([one[query] for one in values])) for query in values[0]}


def value(values: Values) -> float:
    return float(np.mean(list(values.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "init", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comparison = Comparison(Path(options.data), options.init, Path(options.work))
    before, rows, students = comparison.before(), [], {}
    for seed in range(options.seeds):
        for name in comparison.teachers:
            comparison.after(name, seed)
            print(name, seed, "done", flush=True)
    for name in comparison.teachers:
        cells = [comparison.after(name, seed) for seed in range(options.seeds)]
        students[name], each = mean(cells), [round(value(cell), 4) for cell in cells]
        test = paired(before, students[name])
        rows.append(
            {
                "teacher": name,
                "teacher_value": round(value(comparison.teacher(name)), 4),
                "before": round(value(before), 4),
                "after": round(value(students[name]), 4),
                "seeds": each,
                "sd": round(float(np.std(each, ddof=1)), 4),
                "p": round(test.p_value, 4),
                "low": round(test.low, 4),
                "high": round(test.high, 4),
            }
        )
    pairs = [
        {"second": "both", "first": name, **dataclasses.asdict(paired(students[name], students["both"]))}
        for name in ("MiniLM", "SPLADE++")
    ]
    result = {
        "command": "python benchmarks/quality_teachers.py",
        "commit": commit(),
        "machine": f"{machine()}, one thread",
        "versions": versions(),
        "settings": {
            "measure": MEASURE, "training_queries": QUERIES, "candidates": CANDIDATES, "depth": DEPTH,
            "max_length": LENGTH, "test_queries": len(before), "objective": LOOP.objective, "epochs": LOOP.epochs,
            "batch_lists": LOOP.batch_lists, "learning_rate": LOOP.learning_rate,
            "target_transform": LOOP.target_transform,
        },
        "rows": rows,
        "paired": pairs,
    }  # fmt: skip
    write_json(options.results / "ranking_teachers.json", result)
    print("done")


if __name__ == "__main__":
    main()
