"""The information-drowning curves: how far each band of the teacher has reached the student, epoch by epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from structkd.errors import UsageError
from structkd.graph.data.task import GraphTask
from structkd.graph.distillation import DistillConfig, distill, predict, teacher_logits
from structkd.graph.figures import band_figure
from structkd.graph.models.teacher import Teacher
from structkd.graph.spectral import chebyshev_bands
from structkd.runs import Figure, Series
from structkd.scores import NodeScores


@dataclass(frozen=True)
class Spectrum:
    """Band curves and energies as data.

    Attributes:
        curves: method -> {"step", "cos_low", "cos_high", "error_low", "error_high"}, one list each.
        energies: teacher and each method -> share of energy in equal intervals of the spectrum [0, 2].
        metrics: method -> metrics of its finished student.
    """

    curves: dict[str, dict[str, list[float]]]
    energies: dict[str, list[float]]
    metrics: dict[str, dict[str, float]]

    def figures(self) -> dict[str, Figure]:
        """agreement: curves over epochs, the teacher at 1 by definition; energy: distribution over the spectrum."""
        some = next(iter(self.energies.values()))
        agreement = band_figure({name: [_lines(curve)] for name, curve in self.curves.items()})
        centres = [round(2 * (k + 0.5) / len(some), 3) for k in range(len(some))]
        bars = [Series(name, centres, [max(share, 1e-6) for share in shares]) for name, shares in self.energies.items()]
        return {
            **({"band-agreement": agreement} if agreement is not None else {}),
            "band-energy": Figure(
                "lines", "Energy over the graph spectrum", "eigenvalue of the Laplacian", "share of energy", bars,
                note="class probabilities of the finished models; Chebyshev bands, no eigendecomposition",
                y_log=True,
            ),
        }  # fmt: skip


def spectrum(
    task: GraphTask,
    teacher: NodeScores | Float[Tensor, "nodes classes"] | Teacher,
    methods: Sequence[str] = ("glnn", "ff-g2m"),
    config: DistillConfig | None = None,
    every: int = 5,
    seed: int | None = None,
) -> Spectrum:
    """Distil by each method and record the agreement of its student with the teacher every `every` epochs.

    Raises:
        UsageError: no method, or `every` is below 1.
    """
    if not methods or every < 1:
        raise UsageError(f"spectrum of {len(methods)} methods every {every} epochs: expected 1 or more of both.")
    base = config or DistillConfig()
    seen = task.observed
    logits = teacher_logits(task, teacher)
    assert logits is not None
    energies = {"teacher": _energy(seen, logits)}
    curves, metrics = {}, {}
    for method in methods:
        given = teacher if isinstance(teacher, Teacher) else logits
        result = distill(task, given, replace(base, method=method, watch_every=every), seed)
        watched = [line for line in result.history if "cos_low" in line]
        keys = ("step", "cos_low", "cos_high", "error_low", "error_high")
        curves[method] = {key: [float(line[key]) for line in watched] for key in keys}
        energies[method] = _energy(seen, predict(result.student, result.inputs.seen(seen)))
        metrics[method] = result.metrics
    return Spectrum(curves, energies, metrics)


def _lines(curve: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Columns as one mapping an epoch."""
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]


def _energy(task: GraphTask, logits: Tensor) -> list[float]:
    shares: list[float] = chebyshev_bands(task, torch.softmax(logits, dim=1)).tolist()
    return shares
