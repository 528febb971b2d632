"""Ensembles with weights of their own: the router and its gate, the set-attention aggregator."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, one_hot

from structkd.errors import UsageError
from structkd.objectives import ensembles, representation
from structkd.objectives.ensembles import Router, SetAttention

DOUBLE = torch.float64


def draw(teachers: int = 3, lists: int = 6, items: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(teachers, lists, items, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def some_shares(teachers: int = 3, lists: int = 6) -> Tensor:
    return draw(teachers, lists, 1, seed=1)[:, :, 0].softmax(0)


def test_uniform_gate_is_the_mean() -> None:
    teachers = draw()
    mask = torch.rand(6, 4) < 0.7
    router = Router(4, 3).double()
    shares = router(teachers[0])
    torch.testing.assert_close(shares, torch.full((3, 6), 1 / 3, dtype=DOUBLE))
    torch.testing.assert_close(ensembles.routed(teachers, shares, mask=mask), ensembles.mean(teachers, mask=mask))


def test_routed_is_the_weighted_mean_with_gradients() -> None:
    teachers, shares = draw(), some_shares()
    torch.testing.assert_close(ensembles.routed(teachers, shares), ensembles.weighted_mean(teachers, shares))
    order = torch.tensor([2, 0, 1])  # teachers and gate outputs change places together
    torch.testing.assert_close(ensembles.routed(teachers[order], shares[order]), ensembles.routed(teachers, shares))
    same = teachers[:1].expand(3, -1, -1)
    torch.testing.assert_close(ensembles.routed(same, shares), teachers[0])
    assert gradcheck(lambda c: ensembles.routed(teachers, c), (shares.requires_grad_(),))
    assert gradcheck(lambda c: ensembles.routed(teachers, c, top=2), (shares,))


def test_top_teachers() -> None:
    teachers, shares = draw(), some_shares()
    torch.testing.assert_close(ensembles.routed(teachers, shares, top=3), ensembles.routed(teachers, shares))
    best = teachers[shares.argmax(0), torch.arange(6)]
    torch.testing.assert_close(ensembles.routed(teachers, shares, top=1), best)
    two = ensembles.routed(teachers, shares, top=2)[0]
    kept = shares[:, 0].argsort(descending=True)[:2]
    expected = (shares[kept, 0, None] * teachers[kept, 0]).sum(0) / shares[kept, 0].sum()
    torch.testing.assert_close(two, expected)


def test_gate_loss_by_hand() -> None:
    teachers, shares = draw(), some_shares()
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    positive = one_hot(labels, 4).bool()
    mixed = ensembles.routed(teachers, shares)
    torch.testing.assert_close(ensembles.gate_loss(teachers, shares, positive), cross_entropy(mixed, labels))
    positive[4:] = False
    part = ensembles.gate_loss(teachers, shares, positive)
    torch.testing.assert_close(part, cross_entropy(mixed[:4], labels[:4]))
    mean_share = shares.mean(1)
    divergence = (torch.log(torch.tensor(1 / 3, dtype=DOUBLE)) - mean_share.log()).mean()
    torch.testing.assert_close(ensembles.gate_loss(teachers, shares, positive, balance=2.0), part + 2 * divergence)
    uniform = torch.full_like(shares, 1 / 3)
    torch.testing.assert_close(
        ensembles.gate_loss(teachers, uniform, positive, balance=5.0), ensembles.gate_loss(teachers, uniform, positive)
    )
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 2] = False
    junk = teachers.masked_fill(~mask, float("nan"))
    removed = ensembles.gate_loss(teachers[..., [0, 1, 3]], shares, positive[:, [0, 1, 3]])
    torch.testing.assert_close(ensembles.gate_loss(junk, shares, positive, mask=mask), removed)
    assert ensembles.gate_loss(teachers, shares, torch.zeros_like(positive)) == 0
    assert gradcheck(
        lambda c: ensembles.gate_loss(teachers, c, positive, balance=0.5), (shares.clone().requires_grad_(),)
    )


def test_gradients_reach_the_gate_and_it_learns_to_route() -> None:
    """Teacher 0 is right where the feature is positive, teacher 1 elsewhere: only a router can be right everywhere."""
    torch.manual_seed(0)
    features = torch.randn(200, 2)
    labels = torch.randint(3, (200,))
    right, wrong = 4.0 * one_hot(labels, 3), 4.0 * one_hot((labels + 1) % 3, 3)
    first = features[:, :1] > 0
    teachers = torch.stack([torch.where(first, right, wrong), torch.where(first, wrong, right)])
    router = Router(2, 2)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    positive = one_hot(labels, 3).bool()
    loss = ensembles.gate_loss(teachers, router(features.requires_grad_()), positive)
    loss.backward()
    assert features.grad is None  # the gate must not train the student through its features
    last = router.gate[-1]
    assert isinstance(last, torch.nn.Linear)
    assert last.weight.grad is not None
    assert last.weight.grad.abs().sum() > 0.1
    for _ in range(60):
        optimizer.zero_grad()
        ensembles.gate_loss(teachers, router(features), positive, balance=0.1).backward()
        optimizer.step()
    for parameter in router.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    mixed = ensembles.routed(teachers, router(features))
    assert (mixed.argmax(1) == labels).float().mean() > 0.95
    assert (ensembles.mean(teachers).argmax(1) == labels).float().mean() < 0.75


def aggregator(dims: int = 8, heads: int = 4) -> SetAttention:
    torch.manual_seed(0)
    return SetAttention(dims, heads).double().eval()


def test_set_attention_does_not_care_for_the_order() -> None:
    embeddings = draw(5, 6, 8)
    model = aggregator()
    known = torch.rand(5, 6) < 0.7
    known[0] = True
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(embeddings[order], known[order]), model(embeddings, known))
    assert not torch.allclose(model(embeddings), model(embeddings.roll(1, 1)))


@pytest.mark.parametrize("training", [False, True])
def test_unknown_teachers_are_as_if_absent(training: bool) -> None:
    model = SetAttention(8, 4, dropout=0.0).double().train(training)
    embeddings = draw(3, 6, 8)
    known = torch.ones(3, 6, dtype=torch.bool)
    known[1] = False
    known[:, 5] = False
    junk = embeddings.masked_fill(~known[:, :, None], float("nan"))
    found = model(junk, known)
    torch.testing.assert_close(found[:5], model(embeddings[[0, 2]])[:5])
    assert (found[5] == 0).all()
    with torch.no_grad():  # torch takes another path here
        torch.testing.assert_close(model(junk, known), found)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_set_attention_learns_and_teaches() -> None:
    torch.manual_seed(0)
    model = SetAttention(8, 4).double()
    embeddings = draw(3, 6, 8).requires_grad_()
    student = draw(1, 6, 8, seed=2)[0].requires_grad_()
    representation.feature_mse(student, model(embeddings)).backward()
    assert student.grad is not None
    assert embeddings.grad is None  # teachers are data
    assert all(parameter.grad is None for parameter in model.parameters())  # and so is the target
    head = torch.nn.Linear(8, 2).double()
    cross_entropy(head(model(embeddings)), torch.tensor([0, 1, 0, 1, 1, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Router(4, 1), "4 features, 1 teachers"),
        (lambda: inspect.unwrap(ensembles.routed)(draw(), some_shares(2)), "shares have shape [2, 6]; expected [3, 6]"),
        (lambda: ensembles.routed(draw(), some_shares(), top=4), "top 4: expected 1 to 3"),
        (
            lambda: ensembles.gate_loss(draw(), some_shares(), torch.ones(6, 4, dtype=torch.bool), balance=-1.0),
            "balance -1.0",
        ),
        (lambda: SetAttention(10, 4), "4 heads do not divide 10 dimensions"),
        (
            lambda: inspect.unwrap(SetAttention.forward)(aggregator(), draw(3, 6, 8), torch.ones(2, 6).bool()),
            "known has shape [2, 6]",
        ),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        call()
