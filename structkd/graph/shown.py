"""What the report of a comparison shows: kept with each finished seed, drawn when all are done."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from structkd.graph.data.task import GraphTask
from structkd.graph.distillation import DistillResult, predict
from structkd.graph.figures import band_figure, frontier_figures, margin_figure, margins, seed_figure
from structkd.graph.models.teacher import Teacher
from structkd.graph.serving.latency import latency
from structkd.runs import Run
from structkd.scores import NodeScores

LARGEST = 100_000
"Nodes up to which a comparison times its teacher, who reads whole neighbourhoods."


def shown(task: GraphTask, teacher: Teacher | None, logits: NodeScores, result: DistillResult) -> dict[str, Any]:
    """margins of some nodes, and what one answer of student and teacher costs (milliseconds, bytes of weights)."""
    mine = predict(result.student, result.inputs.seen(task.observed))
    theirs = torch.from_numpy(np.array(logits.logits, dtype=np.float32))
    found: dict[str, Any] = {"margins": margins(theirs, mine, task.seed), "bytes": _bytes(result.student)}
    if teacher is not None and task.num_nodes <= LARGEST:
        timing = latency(task, teacher, result.student, (1,), repeats=10, x=result.inputs.whole(task), cold=0)
        theirs_row, ours_row = timing.rows
        found |= {"p50_ms": ours_row["p50_ms"], "teacher_p50_ms": theirs_row["p50_ms"]}
        found["teacher_bytes"] = _bytes(teacher.model)
    return found


def write_figures(run: Run, dataset: str, metric: str, teacher: str, done: Sequence[Mapping[str, Any]]) -> None:
    """Bands over epochs, quality and agreement over seeds, margins, and quality against the cost of an answer."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for one in done:
        by_method.setdefault(one["method"], []).append(one)
    teachers = {one["seed"]: one["teacher"]["test"] for one in done if "test" in one["teacher"]}
    tests = {f"teacher {teacher}": list(teachers.values())} if teachers else {}
    tests |= {name: [one["metrics"]["test"] for one in own] for name, own in by_method.items()}
    title, seeds = f"{dataset}: test {metric} at best validation", len(next(iter(by_method.values())))
    said = f"{seeds} seed{'s' if seeds > 1 else ''}; dots: seeds, bar: 95 % confidence interval of the mean"
    run.write_figure("accuracy", seed_figure(title, metric, tests, said))
    if (bands := band_figure({name: [one["history"] for one in own] for name, own in by_method.items()})) is not None:
        run.write_figure("band-agreement", bands)
    same = {name: [one["metrics"]["agreement"] for one in own] for name, own in by_method.items()}
    run.write_figure("agreement", seed_figure("Share of nodes with the teacher's class", "share", same))
    first = {name: own[0] for name, own in by_method.items()}
    run.write_figure("margins", margin_figure({name: one["shown"]["margins"] for name, one in first.items()}))
    rows = _served(first, teacher)
    if rows:
        run.write_table("serving", "One answer: time, neighbour fetch included, and size (first seed)", rows)
        for name, figure in frontier_figures(rows, f"test {metric}").items():
            run.write_figure(name, figure)


def _served(first: Mapping[str, Mapping[str, Any]], teacher: str) -> list[dict[str, Any]]:
    """One row a model, of the first seed."""
    timed = {name: one for name, one in first.items() if "p50_ms" in one["shown"]}
    rows = [
        {
            "model": name,
            "test": one["metrics"]["test"],
            "p50_ms": one["shown"]["p50_ms"],
            "bytes": one["shown"]["bytes"],
            "times_faster": one["shown"]["teacher_p50_ms"] / one["shown"]["p50_ms"],
        }
        for name, one in timed.items()
    ]
    if timed:
        own = next(iter(timed.values()))
        median = float(np.median([one["shown"]["teacher_p50_ms"] for one in timed.values()]))
        top = {"model": f"teacher {teacher}", "test": own["teacher"]["test"], "p50_ms": median}
        rows.insert(0, {**top, "bytes": own["shown"]["teacher_bytes"], "times_faster": 1.0})
    return rows


def _bytes(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
