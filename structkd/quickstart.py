"""The first contact: both halves on embedded data, offline, in minutes; two tables and one report.

Graph half: handwritten digits as a nearest-neighbour graph, a few labels a class. Ranking half: Python's documentation
strings, where a query is a description's first sentence and its passage the rest (weak labels: good for showing that
a student learns, no benchmark of anything else).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from structkd import graph, report
from structkd.progress import note
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.evaluation.measures import EvaluationResult, evaluate_model, evaluate_run
from structkd.ranking.models import encoders
from structkd.ranking.teachers import sources
from structkd.runs import Figure, Run, Series
from structkd.scores import CachedScorer

METHODS = ("mlp", "glnn", "ff-g2m")
SEEDS = 3
MEASURE = "nDCG@10"


@dataclass(frozen=True)
class QuickstartResult:
    """What the quick start found.

    Attributes:
        graph: mlp, teacher, student (mean test accuracy at best validation), speedup of the student over the teacher.
        ranking: nDCG@10 on held-out queries of bm25, teacher, student_before, student_after.
        graph_rows, ranking_rows: the two tables.
        report: the HTML file.
    """

    graph: dict[str, float]
    ranking: dict[str, float]
    graph_rows: list[dict[str, Any]]
    ranking_rows: list[dict[str, Any]]
    report: Path


def quickstart(out: str | Path, seed: int = 0) -> QuickstartResult:
    """Run both halves into `out/graph` and `out/ranking` and draw `out/report.html`.

    Started again, it asks no teacher a second time: their scores lie in the caches under `out`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small lose more to waking threads than they gain, most on a busy machine
    try:
        return _quickstart(Path(out), seed)
    finally:
        torch.set_num_threads(threads)


def _quickstart(out: Path, seed: int) -> QuickstartResult:
    note("graph half: digits, teacher gcn")
    graph_rows, graph_summary = _graph(out / "graph", seed)
    note("graph half: " + ", ".join(f"{row['model']} {row['test accuracy']:.4f}" for row in graph_rows))
    note("ranking half: pydocs, lexical teachers")
    ranking_rows, ranking_summary = _ranking(out / "ranking", seed)
    folders = [out / "graph", out / "graph" / "bench", out / "ranking", out / "ranking" / "distill"]
    page = report.write(folders, out / "report.html", title="structkd quick start")
    return QuickstartResult(graph_summary, ranking_summary, graph_rows, ranking_rows, page)


def _graph(folder: Path, seed: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Methods over seeds, band curves of one seed, latency of its teacher and student."""
    config = graph.BenchConfig("digits", methods=METHODS, seeds=tuple(range(seed, seed + SEEDS)))
    rows = graph.bench(config, folder / "bench")["rows"]
    run = Run.create(folder, "quickstart", {"dataset": "digits", "teacher": config.teacher}, seed)
    task = graph.load("digits", seed=seed)
    teacher = graph.train_teacher(task, graph.TeacherConfig(model=config.teacher))
    logits = graph.score_nodes(teacher, task, folder / "spectrum-teacher")
    bands = graph.spectrum(task, logits, ("glnn", "ff-g2m"))
    for name, figure in bands.figures().items():
        run.write_figure(name, figure)
    student = graph.distill(task, logits, graph.DistillConfig(method="ff-g2m")).student
    timing = graph.latency(task, teacher, student)
    run.write_table("latency", "Latency of one request (neighbour fetch included for the teacher)", timing.rows)
    by_method = {row["method"]: row for row in rows}
    teacher_accuracy = by_method["mlp"]["teacher_test_mean"]
    summary = {
        "mlp": by_method["mlp"]["test_mean"],
        "teacher": teacher_accuracy,
        "student": by_method["ff-g2m"]["test_mean"],
        "speedup": timing.speedup,
    }
    at_largest = {row["model"]: row["p50_ms"] for row in timing.rows}  # the last row of a model is its largest batch
    points = [("teacher gcn", at_largest[config.teacher], teacher_accuracy)]
    points += [(name, at_largest["mlp"], by_method[name]["test_mean"]) for name in METHODS]
    run.write_figure(
        "quality-latency",
        Figure(
            "scatter",
            "Quality against latency",
            f"milliseconds for {timing.rows[-1]['batch']} nodes (median)",
            "test accuracy",
            [Series(name, [milliseconds], [accuracy]) for name, milliseconds, accuracy in points],
            x_log=True,
        ),
    )
    run.finish(summary)
    shown = [{"model": f"{config.teacher} (teacher)", "test accuracy": teacher_accuracy}]
    shown += [{"model": r["method"], "test accuracy": r["test_mean"], "std": r["test_std"]} for r in rows]
    return shown, summary


def _ranking(folder: Path, seed: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A static student before and after it learned from a lexical teacher, beside BM25, on held-out queries."""
    training, held_out = datasets.load("pydocs", "train"), datasets.load("pydocs", "test")
    candidates = bm25_candidates(held_out, 100)
    teacher = sources.Bm25Scorer(training.documents)
    student = encoders.student("static", documents=training.documents, seed=seed)
    before = _retrieval(held_out, student)
    cached = CachedScorer(teacher, folder / "teacher-scores")
    result = distill(student, cached, training, _static_config(seed), out=folder / "distill")
    after = _retrieval(held_out, result.student)
    measured = {
        "bm25": evaluate_run(held_out, candidates, MEASURE),
        "teacher": evaluate_model(held_out, teacher, candidates=candidates, measures=MEASURE),
        "student_before": before,
        "student_after": after,
    }
    summary = {name: found.measures[MEASURE] for name, found in measured.items()}
    run = Run.create(folder, "quickstart", {"collection": training.name, "student": "static"}, seed)
    run.write_figure("teacher-scores", _score_figure(cached))
    run.finish(summary)
    return [{"model": name.replace("_", " "), MEASURE: value} for name, value in summary.items()], summary


def _static_config(seed: int) -> DistillConfig:
    """Chosen on the training queries."""
    return DistillConfig(objective="kl", epochs=2, batch_lists=32, seed=seed)


def _retrieval(collection: Collection, student: Any) -> EvaluationResult:
    return evaluate_model(collection, student, mode="retrieve", measures=MEASURE, depth=100)


def _score_figure(cached: CachedScorer) -> Figure:
    _, _, scores = cached.store().pairs()
    sample = np.sort(np.random.default_rng(0).choice(scores, min(len(scores), 4000), replace=False))
    series = [Series("teacher scores", [], sample.astype(float).tolist())]
    return Figure("histogram", "Teacher scores in the cache", "score", "density", series)
