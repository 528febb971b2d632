"""Neighbour sampling: draws, blocks against the whole graph, training and inference in pieces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch_geometric.utils import k_hop_subgraph

from structkd import graph
from structkd.errors import DataError, UsageError
from structkd.graph.data.sampling import ALL, NeighbourSampler
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.models.networks import build_teacher
from structkd.graph.models.sampled import layerwise_logits, on_blocks, operators, parsed_fan_outs, restricted

DATASET = "sbm:nodes=300,classes=3,degree=6,signal=0.7"


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    """A block model with two isolated nodes more."""
    base = graph.load(DATASET)
    x = np.concatenate([base.x.numpy(), np.ones((2, base.num_features), np.float32)])
    y = np.concatenate([base.y.numpy(), [0, 1]])
    rows = [np.flatnonzero(mask.numpy()) for mask in (base.train, base.valid, base.test)]
    return graph.GraphTask.create(x, base.edge_index, y, rows[0], rows[1], np.append(rows[2], [300, 301]), name="sbm:x")


def star(leaves: int) -> NeighbourSampler:
    """Node 0 in the middle of many leaves; one neighbour is drawn, or three."""
    starts = np.concatenate([[0, leaves], leaves + np.arange(1, leaves + 1)])
    columns = np.concatenate([np.arange(1, leaves + 1), np.zeros(leaves, dtype=np.int64)])
    return NeighbourSampler(starts, columns, [3])


def drawn_of(sampler: NeighbourSampler, row: int, seed: int) -> list[int]:
    (block,) = sampler.blocks(np.array([row]), seed)
    return block.sources[block.columns].tolist()


def test_draws_are_uniform_and_without_replacement():
    sampler, draws, leaves = star(20), 4000, 20
    drawn = [drawn_of(sampler, 0, seed) for seed in range(draws)]
    assert all(len(set(nodes)) == 3 and 0 not in nodes for nodes in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=leaves + 1)[1:]
    expected = draws * 3 / leaves
    # without replacement the counts vary less: the statistic is (1 - (k-1)/(n-1)) times a chi-square
    statistic = ((counts - expected) ** 2 / expected).sum() / (1 - 2 / (leaves - 1))
    assert chi2.ppf(1e-4, leaves - 1) < statistic < chi2.ppf(1 - 1e-4, leaves - 1)
    pairs = np.array([sorted(nodes)[:2] for nodes in drawn])
    first = np.bincount(pairs[:, 0], minlength=leaves + 1)[1:]  # the smallest of three: a known law
    n = np.arange(1, leaves + 1)
    law = (leaves - n) * (leaves - n - 1) / 2 / (leaves * (leaves - 1) * (leaves - 2) / 6) * draws
    seen = law > 5
    assert ((first - law)[seen] ** 2 / law[seen]).sum() < chi2.ppf(1 - 1e-4, seen.sum())


def test_a_draw_depends_on_seed_and_node_alone(task):
    sampler = NeighbourSampler.of(task, [2])
    (alone,) = sampler.blocks(np.array([7]), 5)
    (together,) = sampler.blocks(np.array([9, 7, 3]), 5)
    part = together.columns[together.starts[1] : together.starts[2]]
    assert together.sources[part].tolist() == alone.sources[alone.columns].tolist()
    assert len({tuple(drawn_of(sampler, 7, seed)) for seed in range(20)}) > 1


@pytest.mark.parametrize("rows", [[0], [5, 17, 300], [301]])
def test_every_neighbour_is_torch_geometrics_k_hop_subgraph(task, rows):
    blocks = NeighbourSampler.of(task, [ALL, ALL]).blocks(np.array(rows))
    near, *_ = k_hop_subgraph(torch.tensor(rows), 2, task.edge_index, num_nodes=task.num_nodes)
    assert sorted(blocks[0].sources.tolist()) == sorted(near.tolist())
    assert blocks[0].sources[: len(blocks[1].sources)].tolist() == blocks[1].sources.tolist()
    assert blocks[1].sources[: len(rows)].tolist() == rows
    for block in blocks:
        for target in range(block.num_targets):
            node = block.sources[target]
            neighbours = task.edge_index[1][task.edge_index[0] == node].tolist()
            assert block.sources[block.columns[block.starts[target] : block.starts[target + 1]]].tolist() == neighbours
            assert block.degrees[target] == len(neighbours)


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("sparse", [False, True])
def test_full_fan_out_gives_the_whole_graphs_logits(task, name, sparse):
    model = build_teacher(name, task.num_features, 8, 3, 3, 0.5, 4).eval()
    x = SparseMatrix.of(task.x.numpy()) if sparse else task.x
    expected = model(x, model.prepare(task))
    rows = np.array([0, 299, 300, 42])
    blocks = NeighbourSampler.of(task, [int(task.degrees.max())] * 3).blocks(rows, 3)
    near = torch.from_numpy(blocks[0].sources)
    found = on_blocks(model, x.rows(near) if isinstance(x, SparseMatrix) else x[near], operators(model, blocks))
    torch.testing.assert_close(found, expected[torch.from_numpy(rows)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gcn", "sage", "gat", "appnp"])
@pytest.mark.parametrize("hidden", [8, 64])  # narrower and wider than the features
def test_layerwise_inference_equals_the_whole_graph(task, name, hidden, monkeypatch):
    monkeypatch.setattr("structkd.graph.spectral._BLOCK", 50)
    model = build_teacher(name, task.num_features, hidden, 3, 3, 0.5, 4).eval()
    for x in (task.x, SparseMatrix.of(task.x.numpy())):
        other = replace(task, x=x)
        expected = model(x, model.prepare(other))
        torch.testing.assert_close(layerwise_logits(model, other, 64), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalisation", ["symmetric", "row"])
def test_the_sampled_operator_is_unbiased(task, normalisation):
    rows, signal = np.array([1, 2, 3, 300]), torch.randn(302, 4, generator=torch.Generator().manual_seed(0))
    (full,) = NeighbourSampler.of(task, [ALL]).blocks(rows)
    exact = full.operator(2.0, normalisation).product(signal[torch.from_numpy(full.sources)])
    sampler, found = NeighbourSampler.of(task, [2]), []
    for seed in range(1500):
        (block,) = sampler.blocks(rows, seed)
        found.append(block.operator(2.0, normalisation).product(signal[torch.from_numpy(block.sources)]))
    draws = torch.stack(found)
    error = draws.std(dim=0) / len(found) ** 0.5
    assert bool(((draws.mean(dim=0) - exact).abs() <= 4.5 * error + 1e-6).all())
    assert float(error.max()) > 0


def test_rows_out_of_reach_do_not_matter_to_training(task):
    """The restricted forward pass is the whole graph's, value and gradient."""
    rows = torch.tensor([1, 2, 300])
    for name in ("gcn", "sage", "gat"):
        model = build_teacher(name, task.num_features, 8, 3, 2, 0.5, 4).eval()
        whole = model(task.x, model.prepare(task))[rows]
        part = restricted(model, task, rows, lambda model=model: model.prepare(task))()
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
        gradients = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (part, whole)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
def test_a_teacher_of_samples_is_as_good(name):
    task = graph.load(DATASET)
    config = graph.TeacherConfig(name, hidden=32, epochs=25)
    whole = graph.train_teacher(task, config)
    sampled = graph.train_teacher(task, replace(config, fan_out="4,4", batch_nodes=10))
    assert sampled.metrics["test"] > whole.metrics["test"] - 0.08
    again = graph.train_teacher(task, replace(config, fan_out="4,4", batch_nodes=10))
    assert torch.equal(sampled.logits(task), again.logits(task))
    torch.testing.assert_close(
        sampled.logits(task), sampled.model(task.x, sampled.model.prepare(task)), atol=1e-4, rtol=1e-3
    )


def test_wrong_calls_say_so(task):
    with pytest.raises(UsageError, match=r"fan-out '5,x': expected whole numbers, as in 5,5"):
        parsed_fan_outs("5,x", 2)
    with pytest.raises(UsageError, match=r"fan-out '5': 1 numbers for a teacher of 2 layers; give one per layer"):
        parsed_fan_outs("5", 2)
    assert parsed_fan_outs("5, all", 2) == (5, ALL)
    with pytest.raises(UsageError, match=r"fan-outs \(0,\): expected one number per layer, each 1 or more"):
        NeighbourSampler.of(task, [0])
    with pytest.raises(DataError, match="rows 5 to 302 asked for; the graph has rows 0 to 301"):
        NeighbourSampler.of(task, [1]).blocks(np.array([5, 302]))
    with pytest.raises(DataError, match="2 rows asked for, some of them twice"):
        NeighbourSampler.of(task, [1]).blocks(np.array([5, 5]))
    with pytest.raises(DataError, match="compressed rows end at 3, but there are 2 columns"):
        NeighbourSampler(np.array([0, 3]), np.array([0, 0]), [1])
    with pytest.raises(UsageError, match="teacher appnp cannot be sampled; expected gcn, sage or gat"):
        graph.train_teacher(task, graph.TeacherConfig("appnp", hidden=8, epochs=1, fan_out="2,2"))
