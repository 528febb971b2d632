"""DHO: golden predictions, separate gradients, single heads as limits, one index for both heads."""

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from structkd import index, objectives
from structkd.errors import UsageError
from structkd.objectives import dual_head
from structkd.objectives.dual_head import DualHead, HeadScores


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


GOLDEN = HeadScores(row(1, 0, -1), row(0, 3, 1))


@pytest.mark.parametrize(
    ("share", "temperature", "expected"),
    [
        (0.5, 0.5, [0.333835, 0.612179, 0.053987]),
        (1.0, 1.0, [0.665241, 0.244728, 0.090031]),
        (0.0, 2.0, [0.140244, 0.628532, 0.231224]),
    ],
)
def test_mix_golden(share: float, temperature: float, expected: list[float]) -> None:
    found = dual_head.mixed_probabilities(GOLDEN, share=share, temperature=temperature)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def draw(rows: int = 8, classes: int = 3) -> tuple[HeadScores, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second, teacher = torch.randn(3, rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return HeadScores(first.requires_grad_(), second.requires_grad_()), teacher, labels, torch.arange(rows) < 3


def test_loss_by_hand() -> None:
    heads, teacher, labels, labelled = draw()
    found = dual_head.dual_loss(heads, teacher, labels, labelled, label_share=0.3, temperature=2.0)
    cross = nn.functional.cross_entropy(heads.label[:3], labels[:3])
    p, log_q = (teacher / 2).softmax(-1), (heads.teacher / 2).log_softmax(-1)
    divergence = (p * (p.log() - log_q)).sum(-1)
    expected = 0.3 * cross + 0.7 * 4 * (divergence[:3].mean() + divergence[3:].mean())
    torch.testing.assert_close(found, expected)
    assert gradcheck(
        lambda a, b: dual_head.dual_loss(HeadScores(a, b), teacher, labels, labelled), (heads.label, heads.teacher)
    )


def test_each_head_learns_from_its_own_side() -> None:
    heads, teacher, labels, labelled = draw()
    only_labels = dual_head.dual_loss(heads, teacher, labels, labelled, label_share=1.0)
    torch.testing.assert_close(only_labels, nn.functional.cross_entropy(heads.label[:3], labels[:3]))
    for_label, for_teacher = torch.autograd.grad(only_labels, (heads.label, heads.teacher))
    assert for_label[:3].abs().sum() > 0
    assert (for_label[3:] == 0).all()  # unlabelled rows
    assert (for_teacher == 0).all()
    only_teacher = dual_head.dual_loss(heads, teacher, labels, labelled, label_share=0.0)
    for_label, for_teacher = torch.autograd.grad(only_teacher, (heads.label, heads.teacher))
    assert (for_label == 0).all()
    assert (for_teacher.abs().sum(1) > 0).all()


def test_labels_of_unlabelled_rows_are_not_read() -> None:
    heads, teacher, labels, labelled = draw()
    other = torch.where(labelled, labels, -1)
    assert dual_head.dual_loss(heads, teacher, labels, labelled) == dual_head.dual_loss(heads, teacher, other, labelled)
    none = torch.zeros(8, dtype=torch.bool)
    found = dual_head.dual_loss(heads, teacher, other, none, label_share=0.0, temperature=1.0)
    torch.testing.assert_close(found, objectives.kl(heads.teacher, teacher))
    every = dual_head.dual_loss(heads, teacher, labels, ~none)
    assert torch.isfinite(every)


def test_module_trains_both_heads_on_one_body() -> None:
    model = DualHead(nn.Linear(5, 4), 4, 3).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    _, teacher, labels, labelled = draw()
    dual_head.dual_loss(model(x), teacher, labels, labelled).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    heads = model(x)
    assert heads.label.shape == heads.teacher.shape == (8, 3)
    assert not torch.allclose(heads.label, heads.teacher)


def test_choose_mix() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    right = 4 * nn.functional.one_hot(labels, 3).double()
    wrong = right.roll(1, 1)
    assert dual_head.choose_mix(HeadScores(right, wrong), labels)[0] == 1
    assert dual_head.choose_mix(HeadScores(wrong, right), labels) == (0.0, 0.5)
    # each head knows one half, and is mildly wrong on the other: only a mix is right everywhere
    half = torch.tensor([[True], [True], [False], [False]])
    heads = HeadScores(torch.where(half, right, 0.1 * wrong), torch.where(half, 0.1 * wrong, right))
    share, temperature = dual_head.choose_mix(heads, labels)
    assert 0 < share < 1
    p = dual_head.mixed_probabilities(heads, share=share, temperature=temperature)
    assert torch.equal(p.argmax(1), labels)


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_one_index_serves_both_heads(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q1, d1 = (torch.randn(n, 6, generator=generator) for n in (5, 200))
    q2, d2 = (torch.randn(n, 9, generator=generator) for n in (5, 200))
    mixed = share * q1 @ d1.T + (1 - share) * q2 @ d2.T
    queries, documents = dual_head.joined_queries(q1, q2, share=share), dual_head.joined_documents(d1, d2)
    torch.testing.assert_close(queries @ documents.T, mixed)
    built = index.build(documents.numpy(), kind="flat", metric="ip", device="cpu")
    found = built.search(queries.numpy(), k=10)
    values, rows = mixed.topk(10)
    np.testing.assert_array_equal(found.rows, rows.numpy())
    np.testing.assert_allclose(found.scores, values.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, t, y, m: dual_head.dual_loss(h, t, y, m, label_share=2.0), "label_share 2.0"),
        (lambda h, t, y, m: inspect.unwrap(dual_head.dual_loss)(h, t, y[1:], m), "7 labels, 8 flags for 8 rows"),
        (lambda h, t, y, m: dual_head.mixed_probabilities(h, share=-1.0), "share -1.0"),
        (lambda h, t, y, m: dual_head.mixed_probabilities(h, temperature=0.0), "temperature 0.0"),
        (lambda h, t, y, m: dual_head.choose_mix(h, y[:0]), "0 labels for 8 validation rows"),
        (lambda h, t, y, m: dual_head.joined_queries(t, t, share=1.5), "share 1.5"),
        (lambda h, t, y, m: inspect.unwrap(dual_head.joined_documents)(t, t[1:]), "8 rows of the label head and 7"),
    ],
)
def test_errors(call: Callable[..., object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        call(*draw())
