"""structkd graph export, latency: students for serving, and what a request costs."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter

from structkd import graph
from structkd.cli.output import Common, Output, Table
from structkd.errors import UsageError
from structkd.files import write_text
from structkd.graph.data.task import rows_of
from structkd.graph.distillation import predict
from structkd.graph.models.sampled import parsed_fan_outs
from structkd.graph.serving.calibration import best_temperature, calibration_error, fallback
from structkd.graph.serving.export import export as export_student
from structkd.graph.storage import load_student_and_inputs, load_teacher
from structkd.report import finish
from structkd.runs import Run

DatasetFlags = Annotated[graph.DatasetConfig, Parameter(name="*")]


def export(
    *,
    data: DatasetFlags,
    student: Path,
    out: Path,
    formats: str = "numpy,onnx,int8",
    scores: Path | None = None,
    fallback_share: float | None = None,
    fallback_threshold: float | None = None,
    common: Common = Common(),
) -> Output:
    """Write a student for serving, checked against the trained one; calibrate it; list nodes for the teacher.

    The temperature is fitted on validation nodes. With a share or threshold, fallback.txt lists the rows of nodes whose
    calibrated confidence is lowest, one a line; with --scores the accuracy of student, teacher and mix is shown.

    Parameters
    ----------
    student: folder that `graph distill` wrote.
    out: folder of the exported files.
    formats: comma list of numpy, onnx, int8.
    scores: score cache of the teacher that answers for the listed nodes.
    fallback_share: send this share of all nodes to the teacher.
    fallback_threshold: send nodes of lower calibrated confidence than this to the teacher.
    """
    if fallback_share is not None and fallback_threshold is not None:
        raise UsageError("--fallback-share and --fallback-threshold exclude each other; give one.")
    task = data.load(common.seed)
    seen = task.observed
    model, inputs = load_student_and_inputs(student)
    x = inputs.seen(seen)
    logits = predict(model, x)
    valid = torch.nonzero(seen.valid).flatten()
    temperature = best_temperature(logits[valid], seen.y[valid])
    calibration = {
        "temperature": temperature,
        "ece_before": calibration_error(logits[valid], seen.y[valid]),
        "ece_after": calibration_error(logits[valid], seen.y[valid], temperature),
    }
    names = [name.strip() for name in formats.split(",") if name.strip()]
    sample = torch.from_numpy(np.linspace(0, len(logits) - 1, min(len(logits), 4096)).astype(np.int64))
    rows = export_student(model, rows_of(x, sample), out, names, temperature)
    value: dict[str, Any] = {"out": str(out), "rows": rows, "calibration": calibration}
    tables = [Table(f"{task.name}: exported student", rows), Table("Calibration on validation nodes", [calibration])]
    if fallback_share is not None or fallback_threshold is not None:
        teacher = torch.from_numpy(np.array(graph.read_scores(scores, task).logits)) if scores is not None else None
        found = fallback(
            logits, seen.y, seen.valid, temperature,
            share=fallback_share, threshold=fallback_threshold, teacher=teacher,
        )  # fmt: skip
        listed = task.observed_rows[found.rows].tolist()
        write_text(out / "fallback.txt", "".join(f"{row}\n" for row in listed))
        value["fallback"] = {
            "file": "fallback.txt", "nodes": len(listed), "share": found.share, "threshold": found.threshold,
            "valid": found.metrics,
        }  # fmt: skip
        tables.append(Table("Least confident nodes to the teacher, on validation", [found.metrics]))
    run = Run.create(out, "graph export", {**vars(data), "student": student, "formats": formats}, common.seed)
    run.write_table("export", f"{task.name}: exported student", rows)
    finish(run, value)
    return Output(value, tables)


def latency(
    *,
    data: DatasetFlags,
    teacher: Path,
    student: Path,
    batches: str = "1,10",
    repeats: int = 30,
    fan_out: str = "",
    common: Common = Common(),
) -> Output:
    """Time per request of teacher (its neighbour fetch included) and student on the same nodes, warm and cold.

    Parameters
    ----------
    teacher: folder that `graph teach` wrote.
    student: folder that `graph distill` wrote.
    batches: nodes per request, a comma list; the speedup is of the last.
    repeats: requests per size.
    fan_out: neighbours that the teacher reads per layer, as 5,5; empty: all.
    """
    try:
        sizes = [int(part) for part in batches.split(",")]
    except ValueError:
        raise UsageError(f"--batches {batches!r}: expected whole numbers, as in 1,10.") from None
    task = data.load(common.seed)
    model, (pupil, inputs) = load_teacher(teacher, task), load_student_and_inputs(student)
    drawn = parsed_fan_outs(fan_out, model.config.layers or 0) if fan_out else None
    found = graph.latency(
        task, model, pupil, sizes, repeats, common.seed, x=inputs.whole(task), fan_outs=drawn
    )  # fmt: skip
    rows = list(found.rows)
    value = {"rows": rows, "speedup": found.speedup}
    lines = [f"speedup {found.speedup:.1f}x warm, {found.cold_speedup:.1f}x cold"]
    return Output(value, [Table(f"{task.name}: time per request", rows)], lines)
