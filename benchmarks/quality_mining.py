"""Which negatives make the better student: SciFact, bi-encoders trained on judgements.

    python benchmarks/quality_mining.py --data DIR/scifact --init ALL_MINILM_L6_V2 --work DIR --student static

Each training query gives one list: a judged document and seven negatives, which are random documents, the first of
BM25, or mined (BM25's first 100 less those that all-MiniLM-L6-v2 scores within a margin of the judged document). The
loss is the soft-max cross-entropy of the judged document. The start is the same for every student (static token vectors
over the collection's words, or two of MiniLM's layers); a seed changes the negatives drawn and the order of the lists.
The 300 test queries measure retrieval over the whole collection; the paired test is over queries, each with its mean
over seeds. Static: about 20 seconds a student on one core; two layers: 2 minutes. Finished students are not trained
again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import RESULTS, commit, machine
from starts import saved

from structkd.files import write_json
from structkd.ids import Pairs
from structkd.ranking.data.collection import Collection, load
from structkd.ranking.data.negatives import MineConfig, Mined, bm25_candidates, mine
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.evaluation.measures import evaluate_run, paired, retrieve
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.static import StaticScorer
from structkd.runs import versions
from structkd.scores import TeacherSpec, write_pairs
from structkd.scores.cache import StoredScorer
from structkd.trec import Run, read_run, write_run

NEGATIVES, LENGTH, MARGIN = 7, 96, 0.1
MEASURE = "nDCG@10"
CHOICES = ("random", "bm25", "mined")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "init", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--student", choices=["static", "dot"], default="static")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--queries", type=int, default=803)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"quality_mining_{options.student}.json"
    work = Path(options.work)
    test, train = load(options.data), load(options.data, split="train")
    train = train.with_queries(list(train.queries.ids)[: options.queries])
    before = searched(test, fresh(train, options, work), work / f"{options.student}-before.run")
    found: dict[str, list[dict[str, Any]]] = {"before": [measured(test, before)]}
    for seed in range(options.seeds):
        for choice in CHOICES:
            folder = work / f"{options.student}-{choice}-{seed}"
            if not (folder / "test.run").is_file():
                mined = negatives(choice, train, options.init, work, seed)
                student = fresh(train, options, work)
                train_on(student, train, mined, seed, options.epochs, folder)
                write_json(folder / "counts.json", mined.counts)
                searched(test, student, folder / "test.run")
            row = measured(test, read_run(folder / "test.run"))
            counts = json.loads((folder / "counts.json").read_text())
            found.setdefault(choice, []).append(row | {"seed": seed, "counts": counts})
            record(options, found)


def fresh(train: Collection, options: argparse.Namespace, work: Path) -> BiScorer:
    """The student that every choice starts from."""
    if options.student == "static":
        return StaticScorer.fresh(train.documents, seed=0)
    return BiScorer(saved(options.init, work / "start"), document_length=LENGTH)


def negatives(choice: str, train: Collection, init: str, work: Path, seed: int) -> Mined:
    """Seven negatives of each query; none is judged, none repeats a judged text."""
    if choice == "random":
        rng, documents = np.random.default_rng([seed, 7]), list(train.documents.ids)
        rows = {query: rng.choice(len(documents), 30, replace=False) for query in train.queries.ids}
        candidates = Run({query: ([documents[i] for i in own], -np.arange(30.0)) for query, own in rows.items()})
        return mine(train, candidates, MineConfig(per_query=NEGATIVES, choice="top"))
    if not (work / "bm25.run").is_file():
        write_run(work / "bm25.run", bm25_candidates(train, 100))
    candidates = read_run(work / "bm25.run")
    if choice == "bm25":
        return mine(train, candidates, MineConfig(per_query=NEGATIVES, choice="top"))
    teacher = Encoded(train, init, work)
    config = MineConfig(per_query=NEGATIVES, teacher_margin=MARGIN, choice="sample", seed=seed)
    return mine(train, candidates, config, teacher=teacher)


class Encoded:
    """A bi-encoder as teacher whose texts are encoded once, since the same documents come for many queries."""

    spec = TeacherSpec("all-MiniLM-L6-v2", max_length=LENGTH)

    def __init__(self, train: Collection, init: str, work: Path) -> None:
        path = work / "teacher.npz"
        if not path.is_file():
            scorer = BiScorer(init, document_length=LENGTH)
            documents = scorer.encode(list(train.documents.texts), "document")
            queries = scorer.encode(list(train.queries.texts), "query")
            np.savez(path, documents=documents, queries=queries)
        with np.load(path) as stored:
            self._documents, self._queries = (torch.from_numpy(stored[name]) for name in ("documents", "queries"))

    def score(self, pairs: Pairs) -> torch.Tensor:
        """Cosine of each pair."""
        queries = self._queries[torch.from_numpy(pairs.query_rows)]
        return (queries * self._documents[torch.from_numpy(pairs.document_rows)]).sum(dim=1)


def train_on(student: BiScorer, train: Collection, mined: Mined, seed: int, epochs: int, folder: Path) -> None:
    """Train on one judged document against its negatives."""
    lists = {query: [positive, *own] for query, own in mined.items() if own for positive in train.positives(query)[:1]}
    flat = [(query, document, float(place == 0)) for query, own in lists.items() for place, document in enumerate(own)]
    queries, documents, labels = (list(column) for column in zip(*flat, strict=True))
    store = write_pairs(folder / "labels", TeacherSpec("judgements"), queries, documents, np.asarray(labels))
    config = DistillConfig(
        objective="kl",
        target_transform="none",
        temperature=0.05,  # of labels 0 and 1: the judged document has all of the mass
        student_scale=20.0,
        epochs=epochs,
        held_out=0.0,
        validate_on="none",
        seed=seed,
    )
    candidates = Run({query: (own, -np.arange(float(len(own)))) for query, own in lists.items()})
    distill(student, StoredScorer(store), train, config, candidates=candidates, out=folder / "run")


def searched(test: Collection, scorer: BiScorer, path: Path) -> Run:
    """The first ten documents of each test query over the whole collection."""
    if not path.is_file():
        write_run(path, retrieve(test, scorer, depth=10))
    return read_run(path)


def per_query_means(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Each query's mean over seeds."""
    return {query: float(np.mean([one["per_query"][query] for one in runs])) for query in runs[0]["per_query"]}


def measured(test: Collection, run: Run) -> dict[str, Any]:
    result = evaluate_run(test, run, MEASURE)
    return {MEASURE: result.measures[MEASURE], "per_query": result.per_query[MEASURE]}


def record(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write what is known so far."""
    rows = []
    for choice, runs in found.items():
        values = [one[MEASURE] for one in runs]
        row: dict[str, Any] = {"negatives": choice, "mean": round(float(np.mean(values)), 4)}
        row |= {"std": round(float(np.std(values)), 4), "seeds": [round(value, 4) for value in values]}
        rows.append(row | {"counts": [one["counts"] for one in runs if "counts" in one]})
    means = {choice: per_query_means(runs) for choice, runs in found.items()}
    tests = []
    for first, second in (("random", "mined"), ("bm25", "mined"), ("random", "bm25"), ("before", "mined")):
        if first in means and second in means:
            tests.append({"from": first, "to": second, **vars(paired(means[first], means[second], measure=MEASURE))})
    settings = {
        "student": options.student,
        "negatives": NEGATIVES,
        "max_length": LENGTH,
        "teacher_margin": MARGIN,
        "epochs": options.epochs,
    }
    body = {"dataset": "scifact", "measure": MEASURE, "settings": settings | {"queries": options.queries}}
    body |= {"commit": commit(), "machine": machine(), "command": "python benchmarks/quality_mining.py"}
    write_json(options.out, body | {"versions": versions(), "rows": rows, "paired": tests})
    print(json.dumps([{key: row[key] for key in ("negatives", "mean", "seeds")} for row in rows]), flush=True)


if __name__ == "__main__":
    main()
