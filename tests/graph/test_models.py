import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch_geometric.nn import APPNP, GCN2Conv, GCNConv

from structkd.errors import UsageError
from structkd.graph.data.datasets import load
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask
from structkd.graph.models.networks import MODELS, Mlp, build_teacher, relu_dropout
from structkd.graph.models.train import FitConfig, fit


@pytest.fixture(scope="module")
def task() -> GraphTask:
    return load("sbm:nodes=150,classes=3,degree=4,labels=5,valid=30")


def test_gcn_equals_torch_geometric(task):
    model = build_teacher("gcn", task.num_features, 8, task.classes, 2, 0.5, 1).eval()
    convolutions = [GCNConv(task.num_features, 8), GCNConv(8, task.classes)]
    for layer, convolution in zip(model.layers, convolutions, strict=True):
        convolution.lin.weight.data = layer.weight.data.T.clone()
        convolution.bias.data = layer.bias.data.clone().add_(0.1)
        layer.bias.data = convolution.bias.data.clone()
    hidden = torch.relu(convolutions[0](task.x, task.edge_index))
    expected = convolutions[1](hidden, task.edge_index)
    torch.testing.assert_close(model(task.x, model.prepare(task)), expected, atol=1e-5, rtol=1e-4)


def test_sage_is_the_row_mean_with_the_node_counted_twice(task):
    model = build_teacher("sage", task.num_features, 8, task.classes, 1, 0.0, 1).eval()
    weighted = task.adjacency.dense() + 2 * torch.eye(task.num_nodes)
    mean = (weighted / weighted.sum(dim=1, keepdim=True)) @ task.x
    expected = mean @ model.layers[0].weight + model.layers[0].bias
    torch.testing.assert_close(model(task.x, model.prepare(task)), expected, atol=1e-5, rtol=1e-4)


def test_appnp_equals_torch_geometric(task):
    model = build_teacher("appnp", task.num_features, 8, task.classes, 2, 0.5, 1).eval()
    expected = APPNP(10, 0.1)(model.predict(task.x), task.edge_index)
    torch.testing.assert_close(model(task.x, model.prepare(task)), expected, atol=1e-5, rtol=1e-4)


def test_gcnii_equals_torch_geometric(task):
    model = build_teacher("gcnii", task.num_features, 8, task.classes, 3, 0.5, 1).eval()
    out = first = torch.relu(model.enter(task.x))
    for depth, layer in enumerate(model.layers):
        plain = GCN2Conv(8, 0.1, 0.5, depth + 1)
        plain.weight1.data = layer.weight1.data
        out = torch.relu(plain(out, first, task.edge_index))
    torch.testing.assert_close(model(task.x, model.prepare(task)), model.leave(out), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_sparse_and_dense_features_give_the_same(task, name):
    model = build_teacher(name, task.num_features, 8, task.classes, 2, 0.5, 4).eval()
    graph = model.prepare(task)
    torch.testing.assert_close(
        model(SparseMatrix.of(task.x.numpy()), graph), model(task.x, graph), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_renumbering_nodes_renumbers_logits(task, name):
    from structkd.graph.data.task import subgraph

    model = build_teacher(name, task.num_features, 8, task.classes, 2, 0.5, 4).eval()
    order = torch.randperm(task.num_nodes, generator=torch.Generator().manual_seed(0))
    other = subgraph(task, order)
    expected = model(task.x, model.prepare(task))[order]
    torch.testing.assert_close(model(other.x, model.prepare(other)), expected, atol=1e-5, rtol=1e-4)


def test_gat_gradient_reaches_every_weight(task):
    model = build_teacher("gat", task.num_features, 8, task.classes, 2, 0.5, 4)
    model(SparseMatrix.of(task.x.numpy()), model.prepare(task)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_mlp_is_linear_relu_linear():
    student = Mlp(4, 5, 3, 2).eval()
    x = torch.randn(6, 4)
    first, second = student.layers
    expected = torch.relu(x @ first.weight + first.bias) @ second.weight + second.bias
    torch.testing.assert_close(student(x), expected)


def test_errors():
    with pytest.raises(UsageError, match=r"teacher 'gin': expected one of gcn"):
        build_teacher("gin", 3, 4, 2, 2, 0.5, 1)
    with pytest.raises(UsageError, match=r"hidden width 10 is no multiple of 4"):
        build_teacher("gat", 3, 10, 2, 2, 0.5, 4)
    with pytest.raises(UsageError, match=r"layers 0, hidden 4: expected 1 or more"):
        Mlp(3, 4, 2, 0)


class _Constant(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


def run_fit(scores: list[float], patience: int = 3):
    model, values, states = _Constant(), iter(scores), []

    def validate() -> tuple[float, float]:
        states.append(float(model.weight.detach()))
        return next(values), 0.0

    result = fit(model, lambda _: (model.weight - 5) ** 2, validate, FitConfig(0.1, 0, len(scores), patience), 0)
    return result, float(model.weight.detach()), states


def test_the_best_weights_come_back():
    result, weight, states = run_fit([0.1, 0.5, 0.2, 0.3, 0.4, 0.9])
    assert (result.best_epoch, result.valid, result.epochs) == (2, 0.5, 5)
    assert weight == states[1] != states[-1]


def test_a_tie_resets_patience_and_wins():
    result, weight, states = run_fit([0.5, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.9])
    assert (result.best_epoch, result.epochs) == (4, 7)
    assert weight == states[3]


def test_history_and_seeds():
    result, _, _ = run_fit([0.1, 0.2, 0.3])
    assert [line["step"] for line in result.history] == [1, 2, 3]
    assert [line["valid"] for line in result.history] == [0.1, 0.2, 0.3]
    assert result.history[0]["loss"] == pytest.approx(25)
    state = torch.random.get_rng_state()
    run_fit([0.1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_divergence_is_an_error():
    from structkd.errors import DataError

    model = _Constant()
    with pytest.raises(DataError, match=r"epoch 1: the loss is nan; lower the learning rate"):
        fit(model, lambda _: model.weight * np.nan, lambda: (0.0, 0.0), FitConfig(0.1, 0, 2, 2), 0)


def test_validation_loss_can_decide_instead_of_the_metric():
    model = _Constant()
    scores, values = iter([0.1, 0.9, 0.2, 0.3]), iter([3.0, 2.0, 1.0, 2.5])
    config = FitConfig(0.1, 0, 4, 4, select="loss")
    result = fit(model, lambda _: (model.weight - 5) ** 2, lambda: (next(scores), next(values)), config, 0)
    assert (result.best_epoch, result.valid) == (3, 0.2)


# the layer's kernels against torch and scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_sparse_rows_times_dense_is_scipys_product(dtype, width):
    """Rows of 0 to 13 entries: the kernel takes four at a time and the rest one by one."""
    random = np.random.default_rng(width)
    lengths = np.r_[np.arange(14), 0, 13]
    dense_rows = np.zeros((len(lengths), 20))
    for row, length in zip(dense_rows, lengths, strict=True):
        row[random.choice(20, length, replace=False)] = random.normal(size=length)
    matrix, right = SparseMatrix.of(dense_rows, dtype), torch.from_numpy(random.normal(size=(20, width))).to(dtype)
    found = matrix.product(right)
    assert found.dtype == dtype
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(found.numpy(), sp.csr_array(dense_rows) @ right.numpy(), atol=bound)


def test_relu_dropout_keeps_the_share_and_scales_what_is_kept():
    torch.manual_seed(0)
    x = torch.randn(400, 500, dtype=torch.float64).requires_grad_()
    out = relu_dropout(x, 0.3, training=True)
    kept = out != 0
    assert not bool(kept[x <= 0].any())
    torch.testing.assert_close(out[kept], x[kept] / 0.7)
    for part in (kept, kept[::2], kept[:, ::2], kept[:, 1:] & kept[:, :-1]):  # no pattern by row, column or neighbour
        wanted = (0.5 * 0.7) ** (2 if part.shape[1] == 499 else 1)
        assert abs(float(part.double().mean()) - wanted) < 5 * (wanted / part.numel()) ** 0.5
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, kept.double() / 0.7)


def test_relu_dropout_draws_from_torchs_random_state():
    x, draws = torch.ones(50, 40), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(relu_dropout(x, 0.5, training=True) > 0)
    assert torch.equal(draws[0], draws[1])
    assert 0.4 < float((draws[0] == draws[2]).float().mean()) < 0.6
    torch.manual_seed(1)
    again = [relu_dropout(x, 0.5, training=True) > 0 for _ in range(2)]
    assert not torch.equal(again[0], again[1])
    assert torch.equal(relu_dropout(x, 0.5, training=False), x)


def test_relu_dropout_does_not_hide_a_number_that_is_none():
    x = torch.full((64, 4), float("nan"))
    assert bool(relu_dropout(x, 0.2, training=True).isnan().any())
