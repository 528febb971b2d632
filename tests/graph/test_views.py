from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from structkd import graph
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.spectral import propagation
from structkd.graph.targets.views import (
    BATCH,
    ViewsConfig,
    _network,
    agreed,
    feature_filters,
    features_view,
    geometric_mean,
    labelled_views,
    shuffled,
    steps_of,
)

DEFAULT = ViewsConfig()
SMALL = ViewsConfig(
    members=1,
    readers=1,
    labelled=replace(DEFAULT.labelled, epochs=60),
    features=replace(DEFAULT.features, epochs=120),
    filtered=replace(DEFAULT.filtered, epochs=120),
)


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load("sbm:nodes=300,classes=3,degree=6,signal=0.5")


def accuracy(task: graph.GraphTask, answers: torch.Tensor) -> float:
    return float((answers.argmax(dim=1) == task.y)[task.test].double().mean())


def test_filters_are_their_formulas(task):
    x = np.asarray(task.x, dtype=np.float64)
    smooth = propagation(task).dense().double().numpy()
    average = propagation(task, normalisation="row").dense().double().numpy()
    expected = [smooth @ smooth @ x]
    for restart in (0.1, 0.2):
        out = x
        for _ in range(8):
            out = (1 - restart) * average @ out + restart * x
        expected.append(out)
    for found, wanted in zip(feature_filters(task), expected, strict=True):
        wanted = (wanted - wanted.mean(axis=0)) / wanted.std(axis=0, ddof=1)
        wanted *= 10 / np.linalg.norm(wanted, axis=1).mean()
        np.testing.assert_allclose(found.numpy(), wanted, atol=2e-4)


def test_filters_of_sparse_features_are_those_of_dense_ones(task):
    sparse = replace(task, x=SparseMatrix.of(np.asarray(task.x)))
    for one, two in zip(feature_filters(sparse), feature_filters(task), strict=True):
        torch.testing.assert_close(one, two)


def test_a_constant_feature_gives_finite_filters(task):
    x = torch.cat([torch.as_tensor(task.x), torch.ones(task.num_nodes, 1)], dim=1)
    assert all(bool(torch.isfinite(each).all()) for each in feature_filters(replace(task, x=x)))


def test_geometric_mean_against_a_slow_reference():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 3, generator=generator, dtype=torch.float64).softmax(dim=1) for _ in range(3)]
    product = np.prod([part.numpy() for part in parts], axis=0) ** (1 / 3)
    np.testing.assert_allclose(geometric_mean(parts).numpy(), product / product.sum(axis=1, keepdims=True), rtol=1e-12)


def test_every_row_comes_once_before_any_comes_again():
    order = shuffled(2500, torch.Generator().manual_seed(0))
    epoch = [next(order) for _ in range(steps_of(2500))]
    assert len(epoch) == 2
    assert sorted(torch.cat(epoch).tolist()) == list(range(2500))
    again = torch.cat([next(order) for _ in range(2)])
    assert sorted(again.tolist()) == list(range(2500))
    assert not torch.equal(again, torch.cat(epoch))
    assert steps_of(1) == steps_of(BATCH) == 1


def test_the_graph_helps_the_filtered_view_and_agreement_keeps_it(task):
    filters = feature_filters(task)
    start = labelled_views(task.observed, filters, 0, SMALL)
    torch.testing.assert_close(start.sum(dim=1), torch.ones(task.num_nodes))
    plain = graph.distill(task, None, graph.DistillConfig(method="mlp", hidden=64, epochs=100)).metrics["test"]
    joined = agreed(task.observed, start, filters, 0, SMALL)
    assert accuracy(task, start) > plain + 0.05
    assert accuracy(task, joined) > plain + 0.05


def test_answers_come_from_training_labels_and_the_seed_alone(task):
    """Other test labels change nothing; the caller's random state stays."""
    other = replace(task, y=torch.where(task.test, (task.y + 1) % 3, task.y))
    before = torch.get_rng_state()
    one, two = (
        agreed(each.observed, labelled_views(each.observed, filters, 3, SMALL), filters, 3, SMALL)
        for each, filters in ((each, feature_filters(each.observed)) for each in (task, other))
    )
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())


def test_a_reader_answers_alike_on_sparse_and_dense_rows_and_learns_from_both(task):
    sparse = replace(task, x=SparseMatrix.of(np.asarray(task.x)))
    reader = _network(task, 8, 0).eval()
    torch.testing.assert_close(reader(sparse.x), reader(task.x))
    start = 0.9 * one_hot(task.y, 3).float() + 0.1 / 3
    for each in (task, sparse):
        found = features_view(each.observed, start, 0, SMALL)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(task.num_nodes))
        assert accuracy(task, found) > 0.6


def test_networks_on_features_read_half_of_a_row_in_training_and_all_of_it_afterwards(task):
    x = torch.ones(200, task.num_features)
    network = _network(task, 8, 0)
    read: list[torch.Tensor] = []
    network.mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    network.train()(x)
    network.eval()(x)
    assert set(read[0].unique().tolist()) == {0.0, 2.0}  # the rest is scaled up, so the mean stays
    assert float(read[0].mean()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(read[1], x)
