"""LELP pseudo-subclasses: golden numbers, the chain rule of KL, what the class scores do not see, real digits."""

import inspect
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.autograd import gradcheck

from structkd import objectives
from structkd.errors import UsageError
from structkd.objectives import subclasses


def draw(rows: int = 60, dims: int = 6, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings with unequal variances, class weights, labels."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return normal(rows, dims) * torch.arange(1, dims + 1), normal(classes, dims), torch.arange(rows) % classes


def fitted(per_class: int = 3, seed: int = 0, **shape: int) -> tuple[Tensor, Tensor, Tensor, subclasses.Directions]:
    h, w, y = draw(**shape)
    return h, w, y, subclasses.fit(h, w, y, per_class=per_class, generator=np.random.default_rng(seed))


def test_golden() -> None:
    teacher = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
    z = torch.tensor([[[1.0, 0], [0, 2]]], dtype=torch.float64)
    target = subclasses.subclass_targets(teacher, z, temperature=0.5)
    assert target.exp()[0].tolist() == pytest.approx([0.616558, 0.083442, 0.005396, 0.294604], abs=1e-6)
    student = torch.tensor([[0.2, -0.1, 0.4, 0]], dtype=torch.float64)
    assert objectives.kl(student, target).item() == pytest.approx(0.519224, abs=1e-6)
    whole = objectives.kl(subclasses.class_scores(student, 2), teacher)
    assert whole.item() == pytest.approx(0.117158, abs=1e-6)
    split = [objectives.kl(student[:, 2 * c : 2 * c + 2], z[:, c] / 0.5).item() for c in range(2)]
    assert 0.7 * split[0] + 0.3 * split[1] == pytest.approx(0.402065, abs=1e-6)


def test_kl_chain_rule() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    z = torch.randn(20, 3, 4, generator=generator, dtype=torch.float64)
    student = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    target = subclasses.subclass_targets(teacher, z, temperature=0.7)
    whole = objectives.kl(student, target, reduction="none")
    between = objectives.kl(subclasses.class_scores(student, 3), teacher, reduction="none")
    inside = torch.zeros(20, dtype=torch.float64)
    for number in range(3):
        part = objectives.kl(student[:, 4 * number : 4 * number + 4], z[:, number] / 0.7, reduction="none")
        inside += teacher.softmax(-1)[:, number] * part
    torch.testing.assert_close(whole, between + inside)
    assert gradcheck(lambda s: objectives.kl(s, target), (student[:3].repeat(7, 1)[:20].requires_grad_(),))


def test_limits() -> None:
    h, _, _, directions = fitted()
    teacher = torch.randn(len(h), 2, dtype=torch.float64)
    z = subclasses.coordinates(h, directions)
    sums = subclasses.class_scores(subclasses.subclass_targets(teacher, z), 2)
    torch.testing.assert_close(sums, teacher.log_softmax(-1))  # summing over s gives the teacher back
    flat = subclasses.subclass_targets(teacher, z, temperature=1e12).exp().unflatten(1, (2, 3))
    torch.testing.assert_close(flat, (teacher.softmax(-1) / 3)[:, :, None].expand(-1, -1, 3))
    one = subclasses.coordinates(h, fitted(per_class=1)[3])
    torch.testing.assert_close(subclasses.subclass_targets(teacher, one), teacher.log_softmax(-1))
    tracked = subclasses.subclass_targets(teacher.requires_grad_(), z)
    assert not tracked.requires_grad


def test_axes_are_orthonormal_and_outside_the_class_weights() -> None:
    h, w, y, directions = fitted(classes=3)
    for axes in directions.axes:
        torch.testing.assert_close(axes @ axes.T, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(axes @ (w - w.mean(0)).T, torch.zeros(3, 3, dtype=torch.float64))
    assert directions.span.shape == (6, 2)
    # a move that leaves the class probabilities alone moves the coordinates, a move along the weights does not
    z = subclasses.coordinates(h, directions)
    torch.testing.assert_close(subclasses.coordinates(h + 5 * (w[0] - w[1]), directions), z)
    assert not torch.allclose(subclasses.coordinates(h + directions.axes[0, 0], directions), z)
    for number in range(3):  # mean 0, variance 1 within the class
        own = z[y == number, number]
        torch.testing.assert_close(own.mean(0), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(own.std(0, correction=0), torch.ones(3, dtype=torch.float64))


def test_directions_are_the_principal_ones() -> None:
    """Against numpy's covariance: the axes span the top eigenvectors of each class."""
    h, w, y, directions = fitted(classes=2)
    u = (w[0] - w[1]) / (w[0] - w[1]).norm()
    outside = h - (h @ u)[:, None] * u
    for number in range(2):
        values, vectors = np.linalg.eigh(np.cov(outside[y == number].T.numpy()))
        top = vectors[:, np.argsort(-values)[:3]]
        projector = directions.axes[number].T @ directions.axes[number]
        np.testing.assert_allclose(projector.numpy(), top @ top.T, atol=1e-9)


def test_signs_do_not_depend_on_the_library() -> None:
    h = draw()[0]
    for rows in (h, -h, h.flip(0)):
        axes = subclasses._principal(rows - rows.mean(0), 6)
        assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()


def test_same_generator_same_directions() -> None:
    first, second, other = fitted(seed=1)[3], fitted(seed=1)[3], fitted(seed=2)[3]
    assert torch.equal(first.axes, second.axes)
    assert not torch.allclose(first.axes, other.axes)


def test_no_variance_is_coordinate_zero() -> None:
    h, w, y = draw()
    h[y == 0] = h[0].clone()
    directions = subclasses.fit(h, w, y, per_class=2, generator=np.random.default_rng(0))
    z = subclasses.coordinates(h, directions)
    assert (z[:, 0] == 0).all()
    assert torch.isfinite(z).all()


def test_weights_from_logits() -> None:
    h, w, _ = draw()
    found = subclasses.class_weights(h, h @ w.T + torch.tensor([3.0, -1]))
    torch.testing.assert_close(found, w)


def test_splits_of_real_digits_know_more_than_the_classes() -> None:
    """Even against odd digits: a linear teacher of two classes; the splits of each class tell its digits apart."""
    x, digit = load_digits(return_X_y=True)
    h = torch.from_numpy(x / 16)
    parity = torch.from_numpy(digit % 2)
    w = subclasses.class_weights(h, torch.nn.functional.one_hot(parity).double())
    directions = subclasses.fit(h, w, parity, per_class=4, generator=np.random.default_rng(0))
    z = subclasses.coordinates(h, directions)

    def share_of_majority(number: int, cells: Tensor) -> float:
        """How often the commonest digit of the cell is right, within one class."""
        inside = parity == number
        found = 0
        for cell in cells[inside].unique():
            found += int(np.bincount(digit[inside.numpy()][(cells[inside] == cell).numpy()]).max())
        return found / int(inside.sum())

    for number in range(2):
        alone = share_of_majority(number, torch.zeros(len(h)))
        split = share_of_majority(number, z[:, number].argmax(1))
        assert alone < 0.22
        assert split > alone + 0.15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w, y: inspect.unwrap(subclasses.fit)(h, w[:, 1:], y, per_class=1, generator=None), "one label per"),
        (lambda h, w, y: subclasses.fit(h, w, y + 1, per_class=1, generator=np.random.default_rng()), "from 1 to 2"),
        (lambda h, w, y: subclasses.fit(h, w, y, per_class=6, generator=np.random.default_rng()), "expected 1 to 5"),
        (lambda h, w, y: subclasses.fit(h, w, 0 * y, per_class=2, generator=np.random.default_rng()), "class 1 has 0"),
        (lambda h, w, y: subclasses.coordinates(h[:, 1:], fitted()[3]), "have 5 dimensions; the directions 6"),
        (
            lambda h, w, y: inspect.unwrap(subclasses.subclass_targets)(h[:, :2], torch.ones(60, 3, 2)),
            "expected [rows, classes, subclasses]",
        ),
        (lambda h, w, y: subclasses.subclass_targets(h[:, :1], torch.ones(60, 1, 2), temperature=0.0), "temperature 0"),
        (lambda h, w, y: subclasses.class_scores(h, 4), "6 outputs are not a whole number"),
    ],
)
def test_errors(call: Callable[..., object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        call(*draw())


def test_uniform_teacher_entropy() -> None:
    z = torch.zeros(1, 2, 4, dtype=torch.float64)
    target = subclasses.subclass_targets(torch.zeros(1, 2, dtype=torch.float64), z)
    assert target[0].tolist() == pytest.approx([-math.log(8)] * 8)
