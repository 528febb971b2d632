"""Plots of graph runs as data: means over seeds at each epoch, margins against a loop, what one answer costs."""

import numpy as np
import pytest
import torch

from structkd.graph.figures import band_figure, frontier_figures, margin_figure, margins, seed_figure, training_figure


def line(step: int, low: float, high: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0, "valid": 0.5, "cos_low": low, "cos_high": high}


def test_bands_are_means_over_the_seeds_that_reached_an_epoch() -> None:
    first = [line(1, 0.1, 0.0), {"step": 2, "loss": 1.0, "valid": 0.5}, line(10, 0.5, 0.2), line(20, 0.9, 0.3)]
    second = [line(1, 0.3, 0.1), line(10, 0.7, 0.4)]
    figure = band_figure({"glnn": [first, second]})
    assert figure is not None
    low, high, teacher = figure.series
    assert (low.name, low.group, high.group) == ("glnn, low band", "glnn", "glnn")
    assert low.x == [1.0, 10.0, 20.0]
    assert low.y == pytest.approx([0.2, 0.6, 0.9])
    assert low.y_error == pytest.approx([0.1, 0.1, 0.0])
    assert high.y == pytest.approx([0.05, 0.3, 0.3])
    assert (teacher.x, teacher.y) == ([1.0, 20.0], [1.0, 1.0])
    assert band_figure({"glnn": [first]}).series[0].y_error is None  # type: ignore[union-attr]
    assert band_figure({"mlp": [[{"step": 1, "loss": 1.0, "valid": 0.5}]]}) is None


def test_margins_are_those_of_the_teachers_two_best_classes() -> None:
    teacher, student = torch.randn(30, 4), torch.randn(30, 4)
    found = margins(teacher, student)
    for row in range(30):
        second, best = np.argsort(teacher[row].numpy())[-2:]
        assert found["teacher"][row] == pytest.approx(float(teacher[row, best] - teacher[row, second]), rel=1e-5)
        assert found["student"][row] == pytest.approx(float(student[row, best] - student[row, second]), rel=1e-5)
    assert min(found["teacher"]) >= 0
    share = np.mean(np.asarray(found["student"]) > 0)
    assert f"glnn {share:.0%}" in margin_figure({"glnn": found}).note
    assert len(margins(torch.randn(1000, 3), torch.randn(1000, 3))["teacher"]) == 400


def test_curves_seeds_and_frontiers() -> None:
    figure = training_figure([line(1, 0, 0), line(2, 0, 0)])
    assert [(series.name, series.y) for series in figure.series] == [("loss", [1.0, 1.0]), ("validation", [0.5, 0.5])]
    seeds = seed_figure("T", "accuracy", {"a": [0.5, 0.6], "b": [0.7]}).series[0]
    assert (seeds.x, seeds.y) == (["a", "a", "b"], [0.5, 0.6, 0.7])
    rows = [{"model": "mlp", "test": 0.8, "p50_ms": 0.1, "bytes": 4000}]
    found = frontier_figures(rows, "test accuracy")
    assert [(figure.series[0].x, figure.series[0].y) for figure in found.values()] == [([0.1], [0.8]), ([4000], [0.8])]
