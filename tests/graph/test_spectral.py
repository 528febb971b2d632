import numpy as np
import pytest
import torch

from structkd.errors import UsageError
from structkd.graph import spectral
from structkd.graph.data.datasets import load
from structkd.graph.data.task import GraphTask


@pytest.fixture(scope="module")
def task() -> GraphTask:
    return load("sbm:nodes=120,classes=3,degree=3,labels=5,valid=30")  # sparse enough to have isolated nodes


def dense(task: GraphTask) -> np.ndarray:
    return task.adjacency.dense().numpy().astype(np.float64)


def signal(task: GraphTask, seed: int = 0) -> torch.Tensor:
    return torch.rand(task.num_nodes, task.classes, generator=torch.Generator().manual_seed(seed))


def smoother(task: GraphTask) -> np.ndarray:
    loops = dense(task) + np.eye(task.num_nodes)
    root = 1 / np.sqrt(loops.sum(axis=1))
    return root[:, None] * loops * root[None, :]


def test_propagation_is_the_dense_formula(task):
    loops = dense(task) + 2 * np.eye(task.num_nodes)
    rows = loops / loops.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(spectral.propagation(task).dense().numpy(), smoother(task), atol=1e-6)
    np.testing.assert_allclose(spectral.propagation(task, 2.0, "row").dense().numpy(), rows, atol=1e-6)
    np.testing.assert_allclose(spectral.propagation(task, 2.0, "row").dense().sum(1).numpy(), 1, atol=1e-6)


def test_isolated_nodes_do_not_divide_by_zero(task):
    alone = task.degrees == 0
    assert bool(alone.any())
    matrix = spectral.propagation(task, 0.0).dense()
    assert bool(torch.isfinite(matrix).all())
    assert not bool(matrix[alone].any())


def test_bands_add_up_to_the_signal(task):
    x = signal(task)
    torch.testing.assert_close(spectral.low_pass(task, x) + spectral.high_pass(task, x), x)
    np.testing.assert_allclose(spectral.low_pass(task, x).numpy(), smoother(task) @ x.numpy(), atol=1e-5)


def test_agreement_is_the_loop_over_nodes(task):
    student, teacher = signal(task, 1), signal(task, 2)
    bands = {"low": smoother(task), "high": np.eye(task.num_nodes) - smoother(task)}
    found = spectral.band_agreement(task, student, teacher)
    for name, band in bands.items():
        s, t = band @ student.numpy().astype(np.float64), band @ teacher.numpy().astype(np.float64)
        present = [i for i in range(len(s)) if np.linalg.norm(s[i]) > 1e-6]
        cosines = [s[i] @ t[i] / (np.linalg.norm(s[i]) * np.linalg.norm(t[i])) for i in present]
        assert found[f"cos_{name}"] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found[f"error_{name}"] == pytest.approx(np.linalg.norm(s - t) / np.linalg.norm(t), abs=1e-5)


def test_a_student_equal_to_its_teacher_agrees_fully(task):
    found = spectral.band_agreement(task, signal(task), signal(task))
    assert found == pytest.approx({"cos_low": 1, "cos_high": 1, "error_low": 0, "error_high": 0}, abs=1e-6)


def test_energy_of_a_smooth_signal_is_low(task):
    connected = load("digits")
    smooth = torch.sqrt(connected.degrees.float() + 1)[:, None]
    assert spectral.band_energy(connected, smooth)["low"] == pytest.approx(1, abs=1e-5)
    assert spectral.band_energy(connected, torch.zeros_like(smooth)) == {"low": 0.0, "high": 0.0}


def test_response_is_the_polynomial_in_the_eigenbasis(task):
    values, vectors = np.linalg.eigh(smoother(task))
    coefficients = np.array([0.3, -0.5, 0.25, 0.1])
    gain = sum(c * values**k for k, c in enumerate(coefficients))
    expected = vectors @ (gain[:, None] * (vectors.T @ signal(task).numpy()))
    np.testing.assert_allclose(spectral.response(task, coefficients, signal(task)).numpy(), expected, atol=1e-5)
    with pytest.raises(UsageError, match=r"needs one coefficient or more"):
        spectral.response(task, np.zeros(0), signal(task))


def test_chebyshev_bands_follow_the_exact_spectrum():
    task = load("digits")
    matrix = dense(task)
    root = 1 / np.sqrt(np.maximum(matrix.sum(axis=1), 1))
    laplacian = np.eye(task.num_nodes) - root[:, None] * matrix * root[None, :]
    values, vectors = np.linalg.eigh(laplacian)
    x = torch.nn.functional.one_hot(task.y).float()
    energy = (vectors.T @ x.numpy()) ** 2
    shares = [energy[(values >= low) & (values < low + 0.5)].sum() / energy.sum() for low in (0, 0.5, 1.0, 1.5)]
    found = spectral.chebyshev_bands(task, x, bands=4, order=60).numpy()
    np.testing.assert_allclose(found, shares, atol=0.03)
    assert found[0] > 0.5  # labels of a homophilous graph are smooth
