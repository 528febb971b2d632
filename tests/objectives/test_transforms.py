"""Target transforms, list weights, ensembles."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from structkd import objectives
from structkd.errors import UsageError
from structkd.objectives import ensembles, targets, weights

G_STUDENT = torch.tensor([[0.5, -1, 2, 0.3]], dtype=torch.float64)
G_TEACHER = torch.tensor([[2, 1, 0.5, -1]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False, True], [False, False, False, False]])
SCORES = torch.tensor([[3, 1, math.nan, 1], [math.inf, 0, 0, 0]], dtype=torch.float64)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_standardise() -> None:
    population = targets.standardise(G_TEACHER)[0].tolist()
    assert population == pytest.approx([1.270171, 0.346410, -0.115470, -1.501111], abs=1e-6)
    assert targets.standardise(G_TEACHER, ddof=1)[0].tolist() == pytest.approx([1.1, 0.3, -0.1, -1.3])
    assert torch.equal(targets.standardise(row(7, 7, 7)), row(0, 0, 0))
    assert torch.equal(targets.standardise(torch.full((1, 3), 0.1)), torch.zeros(1, 3))
    masked = targets.standardise(SCORES, mask=MASK)
    torch.testing.assert_close(masked[0, [0, 1, 3]], targets.standardise(row(3, 1, 1))[0])
    assert (masked[~MASK] == 0).all()
    huge = targets.standardise(torch.tensor([[1e30, -1e30, 0]]))
    torch.testing.assert_close(huge, targets.standardise(torch.tensor([[1.0, -1, 0]])))


def test_temperature_and_detachment() -> None:
    teacher = G_TEACHER.clone().requires_grad_()
    cooled = targets.temperature(teacher, 4.0)
    assert torch.equal(cooled, G_TEACHER / 4)
    assert not cooled.requires_grad
    torch.testing.assert_close(
        objectives.kl(G_STUDENT, cooled), objectives.kl(G_STUDENT, G_TEACHER, temperature=4.0, student_temperature=1.0)
    )


def test_ranks() -> None:
    assert targets.rank(row(5, 1, 9, 1)).tolist() == [[2 / 3, 1 / 6, 1, 1 / 6]]
    torch.testing.assert_close(targets.rank(row(5, 1, 9), form="reciprocal"), row(1 / 62, 1 / 63, 1 / 61))
    assert torch.equal(targets.rank(SCORES, mask=MASK), torch.tensor([[1, 0.25, 0, 0.25], [0, 0, 0, 0]]).double())
    assert targets.rank(row(3)).tolist() == [[0]]


def test_truncate_keeps_the_best() -> None:
    assert targets.truncate(row(1, 5, 5, 2), 2).tolist() == [[False, True, True, False]]
    assert targets.truncate(row(5, 5, 5), 2).tolist() == [[True, True, False]]  # ties: what stands first
    assert targets.truncate(SCORES, 2, mask=MASK).tolist() == [[True, True, False, False], [False] * 4]
    assert torch.equal(targets.truncate(SCORES, 9, mask=MASK), MASK)


def test_taid_golden() -> None:
    taid = targets.Taid(targets.TaidConfig(start=0.4))
    student = G_STUDENT.clone().requires_grad_()
    target = taid.target(student, G_TEACHER)
    assert torch.softmax(target, -1)[0].tolist() == pytest.approx([0.346078, 0.094317, 0.467156, 0.092450], abs=1e-6)
    value = objectives.kl(student, target)
    assert value.item() == pytest.approx(0.169059, abs=1e-6)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[0].tolist() == pytest.approx([-0.192787, -0.060113, 0.219846, 0.033054], abs=1e-6)
    assert objectives.listnet(G_STUDENT, target).item() == pytest.approx(1.334651, abs=1e-6)
    # the ends: the student itself, and the plain teacher
    assert objectives.kl(G_STUDENT, targets.Taid(targets.TaidConfig(start=0.0)).target(G_STUDENT, G_TEACHER)) == 0
    whole = targets.Taid(targets.TaidConfig(start=1.0)).target(G_STUDENT, G_TEACHER)
    assert torch.equal(whole, G_TEACHER)


@pytest.mark.parametrize(
    ("alpha", "adaptive", "shares"),
    [(5e-4, True, [0.4, 0.4006, 0.4012]), (0.2, True, [0.4, 0.460075, 0.514116]), (0.2, False, [0.4, 0.4006, 0.4012])],
)
def test_taid_updates(alpha: float, adaptive: bool, shares: list[float]) -> None:
    taid = targets.Taid(targets.TaidConfig(steps=1000, alpha=alpha, adaptive=adaptive))
    found, momenta = [], []
    for step, loss in enumerate((2.0, 1.5, 1.6)):
        taid.update(loss, step)
        found.append(taid.share)
        momenta.append(taid.state_dict()["momentum"])
    assert found == pytest.approx(shares, abs=1e-6)
    assert momenta == pytest.approx([0, 0.0025, 0.00180833], abs=1e-8)
    taid.update(1.0, 1_000_000)
    assert taid.share == 1


def test_taid_resumes() -> None:
    config = targets.TaidConfig(alpha=0.2)
    whole, first, second = (targets.Taid(config) for _ in range(3))
    for step, loss in enumerate((2.0, 1.5)):
        whole.update(loss, step)
        first.update(torch.tensor(loss), step)
    second.load_state_dict(first.state_dict())
    whole.update(1.6, 2)
    second.update(1.6, 2)
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(UsageError, match="expected share, momentum and previous"):
        second.load_state_dict({"share": 1.0})
    with pytest.raises(UsageError, match="0 <= start <= end <= 1"):
        targets.Taid(targets.TaidConfig(start=0.9, end=0.5))


def test_interpolation_mixes_the_soft_targets() -> None:
    mixing = targets.Interpolation(0.3, torch.tensor([1, 2, 0, 3]))
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.stack([0.3 * x[i] + 0.7 * x[j] for i, j in ((0, 1), (1, 2), (2, 0))])
    torch.testing.assert_close(mixing.mix(x)[:3], expected)
    assert torch.equal(mixing.mix(x)[3], x[3])
    teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = mixing.mix_targets(teacher)
    torch.testing.assert_close(target.softmax(-1), mixing.mix(teacher.softmax(-1)).detach())
    torch.testing.assert_close(target.exp(), target.softmax(-1))  # they are log-probabilities
    assert not target.requires_grad
    for share, same in ((1.0, teacher), (0.0, teacher[mixing.partner])):  # the ends are the plain teacher
        found = targets.Interpolation(share, mixing.partner).mix_targets(teacher)
        torch.testing.assert_close(found, same.log_softmax(-1).detach())
    extreme = mixing.mix_targets(torch.tensor([[1e30, -1e30], [-1e30, 1e30], [0, 0], [0, 0]]))
    torch.testing.assert_close(extreme[0].exp(), torch.tensor([0.3, 0.7]))


def test_interpolation_is_a_permutation() -> None:
    generator = np.random.default_rng(0)
    shares = []
    for mixed, count in ((1.0, 20), (0.1, 2), (0.0, 0)):
        for _ in range(100):
            found = targets.interpolation(20, generator=generator, alpha=0.5, mixed=mixed)
            partner = found.partner.tolist()
            assert sorted(partner) == list(range(20))
            assert sum(i != j for i, j in enumerate(partner)) == count
            shares.append(found.share)
    # Beta(1/2, 1/2): mean 1/2, variance 1/8
    assert np.mean(shares) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 8 / 300))
    assert np.var(shares) == pytest.approx(1 / 8, abs=0.03)
    one = [targets.interpolation(20, generator=np.random.default_rng(3)) for _ in range(2)]
    assert one[0].share == one[1].share
    assert torch.equal(one[0].partner, one[1].partner)


def test_weights_by_hand() -> None:
    p = [0.609460, 0.224208, 0.135989, 0.030343]
    assert weights.confidence(G_TEACHER).item() == pytest.approx(p[0], abs=1e-6)
    assert weights.margin(G_TEACHER).item() == pytest.approx(p[0] - p[1], abs=1e-6)
    assert weights.certainty(G_TEACHER).item() == pytest.approx(1 - 1.014403 / math.log(4), abs=1e-6)
    assert weights.certainty(row(3, 3, 3)).item() == pytest.approx(0, abs=1e-12)
    assert weights.certainty(row(0, 1e30)).item() == 1
    assert weights.margin(row(5)).item() == 1
    for weight in (weights.confidence, weights.certainty, weights.margin):
        found = weight(SCORES, mask=MASK)
        assert found[1] == 0
        torch.testing.assert_close(found[:1], weight(row(3, 1, 1)))
        torch.testing.assert_close(weight(G_TEACHER, temperature=2.0), weight(G_TEACHER / 2))


def test_entropy_balance() -> None:
    forward, backward = weights.entropy_balance(G_STUDENT, G_TEACHER)  # H(p) = 1.01 > H(q) = .92
    assert (forward.item(), backward.item()) == (2, 1)
    swapped = weights.entropy_balance(G_TEACHER, G_STUDENT)
    assert (swapped[0].item(), swapped[1].item()) == (1, 2)
    soft = weights.entropy_balance(G_STUDENT, G_TEACHER, sharpness=3.0)
    expected = 1 + 1 / (1 + math.exp(-3 * (1.014403 - 0.921323)))
    assert soft[0].item() == pytest.approx(expected, abs=1e-6)
    assert (soft[0] + soft[1]).item() == pytest.approx(3)


TEACHERS = torch.tensor([[[4, 3, 2, 1], [0, 0, 0, 0]], [[1, 4, 3, -20], [5, 6, 7, 8]]], dtype=torch.float64)
JOINT: dict[str, Callable[..., Tensor]] = {
    "mean": ensembles.mean,
    "median": ensembles.median,
    "standardised_mean": ensembles.standardised_mean,
    "reciprocal_rank": ensembles.reciprocal_rank,
    "weighted_mean": lambda t, mask=None: ensembles.weighted_mean(t, torch.ones(len(t)), mask=mask),
}


@pytest.mark.parametrize("name", JOINT)
def test_ensembles_do_not_care_which_teacher_comes_first(name: str) -> None:
    torch.testing.assert_close(JOINT[name](TEACHERS.flip(0)), JOINT[name](TEACHERS))


@pytest.mark.parametrize("name", ["mean", "median", "weighted_mean"])
def test_identical_teachers_are_one(name: str) -> None:
    same = TEACHERS[1].expand(3, 2, 4)
    torch.testing.assert_close(JOINT[name](same), TEACHERS[1])
    torch.testing.assert_close(
        ensembles.standardised_mean(same), targets.standardise(TEACHERS[1]), msg="z-scores of one teacher"
    )


@pytest.mark.parametrize("name", JOINT)
def test_ensembles_leave_masked_items_out(name: str) -> None:
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    junk = TEACHERS.masked_fill(~mask, math.nan)
    found = JOINT[name](junk, mask=mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[0, mask[0]], JOINT[name](TEACHERS[:, :1][..., mask[0]])[0])


def test_ensembles_by_hand() -> None:
    assert ensembles.mean(TEACHERS)[0].tolist() == [2.5, 3.5, 2.5, -9.5]
    assert ensembles.median(torch.cat([TEACHERS, TEACHERS[:1]]))[0].tolist() == [4, 3, 2, 1]
    weighted = ensembles.weighted_mean(TEACHERS, torch.tensor([3.0, 1.0]))
    assert weighted[0].tolist() == [3.25, 3.25, 2.25, -4.25]
    per_list = ensembles.weighted_mean(TEACHERS, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert torch.equal(per_list, torch.stack([TEACHERS[0, 0], TEACHERS[1, 1]]))
    ranks = torch.tensor([[[4.0, 3, 2, 1]], [[2, 4, 3, 1]]])  # ranks 1 2 3 4 and 3 1 2 4
    expected = [0.032266, 0.032522, 0.032002, 0.031250]
    assert ensembles.reciprocal_rank(ranks)[0].tolist() == pytest.approx(expected, abs=1e-6)
    known = torch.ones(2, 1, 4, dtype=torch.bool)
    known[1, 0, 0] = False
    partly = ensembles.reciprocal_rank(ranks, known=known)[0]
    assert partly[0].item() == pytest.approx(1 / 61)
    assert partly[1].item() == pytest.approx(1 / 62 + 1 / 61)


def test_confidence_weights() -> None:
    label = torch.tensor([[False, True, False, False], [False] * 4])
    found = ensembles.confidence_weights(TEACHERS, positive=label, temperature=2.0)
    log_p = torch.log_softmax(TEACHERS, -1)
    labelled = torch.exp(log_p[:, 0, 1] / 2)
    torch.testing.assert_close(found[:, 0], labelled / labelled.sum())
    surprise = -(log_p[:, 1].exp() * log_p[:, 1]).sum(-1)  # no label: entropy
    torch.testing.assert_close(found[:, 1], torch.softmax(-surprise / 2, 0))
    torch.testing.assert_close(ensembles.confidence_weights(TEACHERS, temperature=2.0)[:, 1], found[:, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: targets.temperature(G_TEACHER, 0.0), "temperature 0.0"),
        (lambda: weights.confidence(G_TEACHER, temperature=0.0), "temperature 0.0"),
        (lambda: weights.certainty(G_TEACHER, temperature=-1.0), "temperature -1.0"),
        (lambda: weights.margin(G_TEACHER, temperature=0.0), "temperature 0.0"),
        (lambda: targets.truncate(G_TEACHER, 0), "keep 0"),
        (lambda: targets.interpolation(3, generator=np.random.default_rng(), alpha=0.0), "alpha 0.0"),
        (lambda: targets.interpolation(3, generator=np.random.default_rng(), mixed=1.5), "mixed 1.5"),
        (lambda: targets.Interpolation(0.5, torch.arange(3)).mix(torch.ones(2, 2)), "of 3 rows got 2 rows"),
        (lambda: ensembles.mean(torch.empty(0, 2, 3)), "one or more"),
        (lambda: inspect.unwrap(ensembles.weighted_mean)(TEACHERS, torch.ones(3)), r"weights have shape \[3\]"),
        (lambda: ensembles.weighted_mean(TEACHERS, torch.tensor([1.0, -1])), "at least 0"),
        (lambda: ensembles.confidence_weights(TEACHERS, temperature=0.0), "temperature 0.0"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
