"""TGeo-KD: golden hypergradient, finite differences, the closed formula, a network that learns whom to trust."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, one_hot

from structkd.errors import UsageError
from structkd.objectives import fusion_ratio
from structkd.objectives.fusion_ratio import FusionRatio, Labelled

DOUBLE = torch.float64
TRAIN = Labelled(
    torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=DOUBLE),
    torch.tensor([0, 1, 1]),
    torch.tensor([[2, 0], [1, 0], [0, 1]], dtype=DOUBLE),
)
VALID = Labelled(torch.tensor([[1, -1], [0.5, 1]], dtype=DOUBLE), torch.tensor([0, 1]))
HALF = torch.full((3,), 0.5, dtype=DOUBLE)


def linear() -> nn.Linear:
    """z = x theta with theta = [[.1, -.2], [.3, 0]]."""
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.tensor([[0.1, 0.3], [-0.2, 0.0]], dtype=DOUBLE)
    return model


def per_row(scores: Tensor) -> tuple[Tensor, Tensor]:
    """tau^2 KL_i and CE_i at tau 1.5, written with torch's own losses."""
    assert TRAIN.teacher is not None
    p = (TRAIN.teacher / 1.5).softmax(-1)
    soft = 1.5**2 * kl_div((scores / 1.5).log_softmax(-1), p, reduction="none").sum(-1)
    return soft, cross_entropy(scores, TRAIN.labels, reduction="none")


def stepped(model: nn.Module, ratios: Tensor) -> float:
    """L_valid after one step, spelt out, for finite differences."""
    parameters = list(model.parameters())
    soft, hard = per_row(model(TRAIN.x))
    slopes = torch.autograd.grad((ratios * soft + (1 - ratios) * hard).mean(), parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter -= 0.5 * slope
        value = cross_entropy(model(VALID.x), VALID.labels).item()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return value


def test_golden() -> None:
    value, gradient = fusion_ratio.ratio_gradient(linear(), TRAIN, VALID, HALF, learning_rate=0.5)
    assert value.item() == pytest.approx(0.695258, abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.001863, 0.123154, 0.035081], abs=1e-6)


def test_hypergradient_is_the_closed_formula() -> None:
    model = linear()
    _, found = fusion_ratio.ratio_gradient(model, TRAIN, VALID, HALF, learning_rate=0.5)
    soft, hard = per_row(model(TRAIN.x))
    (slope,) = torch.autograd.grad((0.5 * soft + 0.5 * hard).mean(), model.weight, retain_graph=True)
    moved = nn.Linear(2, 2, bias=False).double()
    moved.weight.data = model.weight.detach() - 0.5 * slope
    (outer,) = torch.autograd.grad(cross_entropy(moved(VALID.x), VALID.labels), moved.weight)
    for row in range(3):
        (inner,) = torch.autograd.grad(soft[row] - hard[row], model.weight, retain_graph=True)
        assert found[row].item() == pytest.approx(-0.5 / 3 * float((outer * inner).sum()), abs=1e-12)


def test_hypergradient_is_the_finite_difference() -> None:
    torch.manual_seed(1)
    deep = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    ratios = torch.tensor([0.2, 0.7, 0.5], dtype=DOUBLE)
    for model in (linear(), deep):
        value, found = fusion_ratio.ratio_gradient(model, TRAIN, VALID, ratios, learning_rate=0.5)
        assert value.item() == pytest.approx(stepped(model, ratios), abs=1e-12)
        for row in range(3):
            nudge = 1e-5 * one_hot(torch.tensor(row), 3).double()
            slope = (stepped(model, ratios + nudge) - stepped(model, ratios - nudge)) / 2e-5
            assert found[row].item() == pytest.approx(slope, abs=1e-8)


def test_student_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = FusionRatio(2).double()
    means = fusion_ratio.class_means(TRAIN.teacher, TRAIN.labels, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, weight_decay=0.05)
    fusion_ratio.learn_ratios(network, optimizer, model, TRAIN, VALID, means, learning_rate=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_limits() -> None:
    scores = linear()(TRAIN.x)
    soft, hard = per_row(scores)
    zeros, ones = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    loss = lambda ratios: fusion_ratio.fused_loss(scores, TRAIN.teacher, TRAIN.labels, ratios)  # noqa: E731
    torch.testing.assert_close(loss(ones), soft.mean())
    torch.testing.assert_close(loss(zeros), hard.mean())
    torch.testing.assert_close(loss(HALF), (soft.mean() + hard.mean()) / 2)


def test_geometry_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0]], dtype=DOUBLE)
    teacher = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], dtype=DOUBLE).log()
    means = fusion_ratio.class_means(teacher, torch.tensor([1, 1, 1]), 2)
    torch.testing.assert_close(means, torch.tensor([[0.5, 0.5], [1.7 / 3, 1.3 / 3]], dtype=DOUBLE))
    found = fusion_ratio.geometry(student, teacher[:1], torch.tensor([1]), means)[0]
    s, t, g, b = [0.5, 0.5], [0.6, 0.4], [0, 1], [1.7 / 3, 1.3 / 3]
    squares = [[(x - y) ** 2 for x, y in zip(*pair, strict=True)] for pair in ((b, s), (g, s), (t, s), (t, g), (b, g))]
    assert found.tolist() == pytest.approx([x for part in (s, t, g, b, *squares) for x in part])


def test_network_learns_whom_to_trust() -> None:
    """A teacher that errs on a third of the rows: ratios of its right rows rise above those of its wrong ones."""
    torch.manual_seed(0)
    x = torch.randn(120, 2)
    truth = (x[:, 0] > 0).long()
    wrong = torch.arange(120) % 3 == 0
    teacher = 4 * one_hot(torch.where(wrong, 1 - truth, truth), 2).float()
    train = Labelled(x[:90], truth[:90], teacher[:90])
    valid = Labelled(x[90:], truth[90:])
    student = nn.Linear(2, 2)
    network = FusionRatio(2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    means = fusion_ratio.class_means(train.teacher, train.labels, 2)
    losses = []
    for _ in range(40):
        value, ratios = fusion_ratio.learn_ratios(network, optimizer, student, train, valid, means, learning_rate=1.0)
        losses.append(value.item())
    assert ratios[~wrong[:90]].mean() > ratios[wrong[:90]].mean() + 0.2
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fusion_ratio.ratio_gradient(linear(), VALID, VALID, HALF[:2], learning_rate=0.1),
            "ratio_gradient needs the teacher's scores",
        ),
        (
            lambda: fusion_ratio.learn_ratios(
                FusionRatio(2), torch.optim.SGD([HALF]), linear(), VALID, VALID, torch.ones(2, 2), learning_rate=0.1
            ),
            "learn_ratios needs the teacher's scores",
        ),
        (
            lambda: inspect.unwrap(fusion_ratio.fused_loss)(TRAIN.teacher, TRAIN.teacher, TRAIN.labels, HALF[:2]),
            "2 ratios for 3 rows",
        ),
        (
            lambda: inspect.unwrap(fusion_ratio.class_means)(TRAIN.teacher, VALID.labels, 2),
            "2 labels for scores [3, 2]",
        ),
        (
            lambda: inspect.unwrap(fusion_ratio.geometry)(
                torch.ones(2, 2), TRAIN.teacher, TRAIN.labels, torch.ones(2, 2)
            ),
            "student has shape [2, 2], teacher [3, 2]",
        ),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        call()
