"""SciFact, end to end: teach a cross-encoder, cache teacher scores, distil a two-layer bi-encoder, index, search.

    python benchmarks/quality_scifact.py --data DIR/scifact --init ALL_MINILM_L6_V2 --work DIR --out ROWS.json

Training queries only teach (two of them repeat a test text and are dropped); the 300 test queries only measure. Every
stage continues where an interrupted run stopped. Each row says what was measured and how.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from starts import saved

from structkd import index
from structkd.files import write_json
from structkd.ranking.data.collection import Collection, load
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.evaluation.measures import evaluate_run, rerank
from structkd.ranking.models.encoders import BiScorer, CrossScorer, open_scorer
from structkd.ranking.teachers.sources import EnsembleScorer
from structkd.ranking.teachers.teacher import TeacherConfig, teach
from structkd.runs import versions
from structkd.scores import CachedScorer
from structkd.scores.cache import Scorer
from structkd.trec import Run

MEASURES = "nDCG@10 R@100"


def searched(collection: Collection, scorer: BiScorer, folder: Path) -> Run:
    """Encode the collection, build an index, search the first 100 of each query."""
    if not (folder / "index.json").is_file():
        vectors = scorer.encode(collection.documents.texts, "document")
        index.build(vectors, ids=collection.documents.ids, kind="flat", metric="cosine", out=folder)
    built = index.open_vectors(folder)
    return built.search(scorer.encode(collection.queries.texts, "query"), k=100).run(list(collection.queries.ids))


def taught(train: Collection, init: str, folder: Path, options: argparse.Namespace) -> CrossScorer:
    """A cross-encoder taught by RankNet on the training judgements."""
    if not (folder / "teacher").is_dir():
        config = TeacherConfig(
            max_length=options.length, epochs=options.teacher_epochs, negatives=3, valid_depth=10, learning_rate=5e-5
        )
        some = train.with_queries(list(train.queries.ids)[: options.teacher_queries])
        teach(some, config, init=init, out=folder)
    return CrossScorer(folder / "teacher", max_length=options.length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "init", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument(
        "--length", type=int, default=128, help="tokens of a text in training, of a pair for the teacher"
    )
    parser.add_argument("--teacher-queries", type=int, default=800)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--queries", type=int, default=800, help="training queries that the student sees")
    parser.add_argument("--depth", type=int, default=16, help="BM25 candidates of each")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="let the bi-encoder teacher search the whole collection")
    parser.add_argument("--teachers", default="bi,cross,both", help="comma list of bi, cross, both")
    options = parser.parse_args()
    work, rows = Path(options.work), []
    test, train = load(options.data), load(options.data, split="train")

    def record(model: str, teacher: str, mode: str, run: Run, seconds: float) -> None:
        result = evaluate_run(test, run, MEASURES)
        rows.append(
            {"model": model, "teacher": teacher, "mode": mode, **result.measures, "queries": result.queries}
            | {"seconds": round(seconds, 1)}
        )
        print(json.dumps(rows[-1]), flush=True)
        row = {"dataset": "scifact", "settings": vars(options) | {"data": "scifact", "init": "all-MiniLM-L6-v2"}}
        row["settings"] = {key: value for key, value in row["settings"].items() if key not in ("work", "out")}
        write_json(Path(options.out), row | {"versions": versions(), "rows": rows})

    def timed(action: Callable[[], Run]) -> tuple[Run, float]:
        started = time.perf_counter()
        return action(), time.perf_counter() - started

    first_stage, seconds = timed(lambda: bm25_candidates(test, 100))
    record("bm25", "", "retrieve", first_stage, seconds)
    start = saved(options.init, work / "start")
    fresh = BiScorer(start, document_length=options.length)
    record("2-layer student before", "", "retrieve", *timed(lambda: searched(test, fresh, work / "index-before")))

    some = train.with_queries(list(train.queries.ids)[: options.queries])
    candidates = bm25_candidates(some, options.depth)
    members: dict[str, Scorer] = {}
    if {"bi", "both"} & set(options.teachers.split(",")):
        bi = BiScorer(options.init, document_length=options.length)
        if options.full:
            record("all-MiniLM-L6-v2", "", "retrieve", *timed(lambda: searched(test, bi, work / "index-bi")))
        else:
            shallow = first_stage.cut(10)
            record("all-MiniLM-L6-v2", "", "rerank 10", *timed(lambda: rerank(test, bi, shallow)))
        members["bi"] = CachedScorer(bi, work / "scores-bi")
    for name in options.teachers.split(","):
        if name in ("cross", "both") and "cross" not in members:
            cross = taught(train, options.init, work / "teach", options)
            shallow = first_stage.cut(10)
            record(
                "taught cross-encoder", "labels", "rerank 10", *timed(lambda m=cross, top=shallow: rerank(test, m, top))
            )
            members["cross"] = CachedScorer(cross, work / "scores-cross")
        teacher = members[name] if name != "both" else EnsembleScorer(list(members.values()))
        student = BiScorer(start, document_length=options.length)
        # an ensemble of z-scores has margins of about 1: the cosine's scale of 20 fits; raw cosines need the same 20
        transform = "standardise" if name == "bi" else "auto"
        config = DistillConfig(epochs=options.epochs, target_transform=transform, learning_rate=1e-4)
        result = distill(student, teacher, some, config, candidates=candidates, out=work / f"distill-{name}")
        again = open_scorer(work / f"distill-{name}" / "student")
        if not isinstance(again, BiScorer):
            raise SystemExit("the saved student is no bi-encoder")
        final = BiScorer(again.model, document_length=options.length)
        run = timed(lambda m=final, n=name: searched(test, m, work / f"index-after-{n}"))
        record(f"2-layer student after (step {result.metrics['best']['step']})", name, "retrieve", *run)


if __name__ == "__main__":
    main()
