"""Plots of graph runs as data: curves of training and bands, samples over seeds, margins, quality against cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from structkd.runs import Figure, Series

History = Sequence[Mapping[str, float]]
BANDS = ("low", "high")
BAND_NOTE = "low: S p, high: (I - S) p of class probabilities p, S the normalised adjacency with self-loops"
_MARGINS = 400  # nodes of a cloud


def training_figure(history: History) -> Figure:
    """Loss and validation over epochs."""
    steps = [line["step"] for line in history]
    series = [Series(name, steps, [line[key] for line in history]) for name, key in _CURVES.items()]
    return Figure("lines", "Training", "epoch", "value", series)


_CURVES = {"loss": "loss", "validation": "valid"}


def band_figure(histories: Mapping[str, Sequence[History]]) -> Figure | None:
    """Information drowning: mean cosine between the student's bands and the teacher's over epochs.

    Args:
        histories: method -> the curves of its seeds; a point is the mean over the seeds that reached its epoch, its
            band one standard deviation.

    Returns:
        None when no curve was watched.
    """
    watched = {name: _watched(curves) for name, curves in histories.items()}
    series = []
    for band in BANDS:
        for name, by_epoch in watched.items():
            values = [[line[f"cos_{band}"] for line in lines] for lines in by_epoch.values()]
            means, deviations = [float(np.mean(one)) for one in values], [float(np.std(one)) for one in values]
            several = any(len(one) > 1 for one in values)
            if values:
                series.append(
                    Series(f"{name}, {band} band", list(by_epoch), means, deviations if several else None, name)
                )
    if not series:
        return None
    longest = max(x for one in series for x in one.x)
    series.append(Series("teacher", [1.0, longest], [1.0, 1.0]))
    return Figure("lines", "Agreement with the teacher per band", "epoch", "mean cosine", series, note=BAND_NOTE)


def _watched(curves: Sequence[History]) -> dict[float, list[Mapping[str, float]]]:
    """Epoch -> the lines of the seeds that have the bands there."""
    found: dict[float, list[Mapping[str, float]]] = {}
    for line in (line for history in curves for line in history if "cos_low" in line):
        found.setdefault(float(line["step"]), []).append(line)
    return dict(sorted(found.items()))


def seed_figure(title: str, measure: str, values: Mapping[str, Sequence[float]], note: str = "") -> Figure:
    """Every seed's value of each method, with the mean and its confidence interval."""
    names = [name for name, own in values.items() for _ in own]
    flat = [float(value) for own in values.values() for value in own]
    return Figure("samples", title, "method", measure, [Series("seeds", names, flat)], note=note)


def margins(
    teacher: Float[Tensor, "nodes classes"], student: Float[Tensor, "nodes classes"], seed: int = 0
) -> dict[str, list[float]]:
    """Of some nodes, how far the teacher's best class leads its second, and by how much the student puts it ahead."""
    generator = np.random.default_rng(seed)
    rows = torch.from_numpy(np.sort(generator.choice(len(teacher), min(len(teacher), _MARGINS), replace=False)))
    theirs, ours = teacher[rows], student[rows]
    order = theirs.topk(2, dim=1).indices
    led = [scores.gather(1, order).double() for scores in (theirs, ours)]
    return {name: (pair[:, 0] - pair[:, 1]).tolist() for name, pair in zip(("teacher", "student"), led, strict=True)}


def margin_figure(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Margins of each method's student against its teacher's; below nought the student prefers the second class."""
    series = [Series(name, list(one["teacher"]), list(one["student"])) for name, one in found.items()]
    kept = [np.mean(np.asarray(one["student"]) > 0) for one in found.values()]
    said = ", ".join(f"{name} {share:.0%}" for name, share in zip(found, kept, strict=True))
    return Figure(
        "cloud", "Margins of teacher and student", "teacher: logit of its best class minus its second",
        "student: same two classes", series, note=f"{_MARGINS} nodes at most; same order as the teacher: {said}",
    )  # fmt: skip


def frontier_figures(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Figure]:
    """Quality against the time of one answer and against the size of what is served."""
    figures = {}
    for name, column, label in (
        ("latency", "p50_ms", "milliseconds for one node (median)"),
        ("size", "bytes", "bytes of weights"),
    ):
        points = [Series(row["model"], [row[column]], [row["test"]]) for row in rows]
        title = "Quality against latency" if name == "latency" else "Quality against size"
        figures[f"frontier-{name}"] = Figure("scatter", title, label, measure, points, x_log=True)
    return figures
