import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from structkd.errors import UsageError
from structkd.objectives import REPRESENTATIONS, representation

NEIGHBOURS = torch.tensor([[1, 2, 3], [0, 2, -1], [3, 4, 1], [0, 4, 2], [1, 0, -1]])
CASES: dict[str, Callable[..., Tensor]] = dict(REPRESENTATIONS) | {
    "affinity-kl": partial(representation.affinity_kl, neighbours=NEIGHBOURS, sigma=4.0)
}
ANY_WIDTH = {"similarity-preserving", "affinity-kl"}
every_case = pytest.mark.parametrize("name", CASES)

F_STUDENT = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
F_TEACHER = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 2]], dtype=torch.float64)
CRITIC = torch.tensor([[2, 0, 1], [0, 1, -1], [0.5, 0, 3]], dtype=torch.float64)
BASELINE = torch.tensor([0.5, 0, 1], dtype=torch.float64)


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    return student, teacher


def unit(row: list[float]) -> list[float]:
    size = math.sqrt(sum(x * x for x in row))
    return [x / size for x in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow(name: str, s: list[list[float]], t: list[list[float]]) -> list[float]:
    rows = range(len(s))
    if name == "feature-mse":
        return [sum((a - b) ** 2 for a, b in zip(s[i], t[i], strict=True)) / len(s[i]) for i in rows]
    if name == "cosine":
        return [1 - dot(unit(s[i]), unit(t[i])) for i in rows]
    if name == "infonce":
        scores = [[dot(unit(s[i]), unit(t[j])) / 0.05 for j in rows] for i in rows]
        return [math.log(sum(math.exp(x - scores[i][i]) for x in scores[i])) for i in rows]
    if name == "similarity-preserving":
        gram = [[unit([dot(f[i], f[j]) for j in rows]) for i in rows] for f in (s, t)]
        return [sum((a - b) ** 2 for a, b in zip(gram[0][i], gram[1][i], strict=True)) / len(s) for i in rows]
    out = []
    for i in rows:
        near = [j for j in NEIGHBOURS[i].tolist() if j >= 0]
        soft = []
        for f in (t, s):
            powers = [math.exp(math.exp(-sum((a - b) ** 2 for a, b in zip(f[i], f[j], strict=True)) / 8)) for j in near]
            soft.append([power / sum(powers) for power in powers])
        out.append(sum(p * math.log(p / q) for p, q in zip(*soft, strict=True)))
    return out


@every_case
def test_value_is_the_slow_loop(name: str) -> None:
    student, teacher = draw()
    expected = torch.tensor(slow(name, student.tolist(), teacher.tolist()), dtype=torch.float64)
    found = CASES[name](student, teacher, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(CASES[name](student, teacher), expected.mean())


@every_case
def test_gradient_is_the_finite_difference(name: str) -> None:
    student, teacher = draw()
    mask = torch.tensor([True, True, False, True, True])
    assert gradcheck(lambda s: CASES[name](s, teacher, mask=mask, reduction="none"), (student.requires_grad_(),))


@every_case
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_masked_rows_never_matter(name: str, junk: float) -> None:
    student, teacher = draw()
    mask = torch.tensor([True, False, True, True, False])

    def value_and_gradient(fill: float) -> tuple[Tensor, Tensor]:
        s = student.masked_fill(~mask[:, None], fill).requires_grad_()
        value = CASES[name](s, teacher.masked_fill(~mask[:, None], fill), mask=mask)
        return value, torch.autograd.grad(value, s)[0]

    (value, gradient), (other, other_gradient) = value_and_gradient(0), value_and_gradient(junk)
    assert torch.equal(value, other)
    assert torch.equal(gradient, other_gradient)
    assert (gradient[~mask] == 0).all()
    if name != "affinity-kl":  # its neighbours are rows of the whole
        torch.testing.assert_close(value, CASES[name](student[mask], teacher[mask]))


@every_case
def test_all_masked_zero_rows_and_extremes(name: str) -> None:
    nothing = torch.full((5, 4), math.nan, requires_grad=True)
    value = CASES[name](nothing, nothing.detach(), mask=torch.zeros(5, dtype=torch.bool))
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value, nothing)[0], torch.zeros(5, 4))
    for size in (0.0, 1e-30, 1e30):
        student = (size * draw()[0].float()).requires_grad_()
        value = CASES[name](student, draw(1)[0].float())
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


@every_case
def test_identical_embeddings_are_the_minimum(name: str) -> None:
    student, _ = draw()
    value = CASES[name](student, student, reduction="none")
    if name == "infonce":  # its floor is not 0: the other rows stay in the sum
        assert (value < CASES[name](student, draw(1)[1], reduction="none")).all()
    else:
        torch.testing.assert_close(value, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
        assert CASES[name](student, draw(1)[1]) > 1e-4


@every_case
def test_rotation_of_both_sides_changes_nothing(name: str) -> None:
    student, teacher = draw()
    rotation = torch.linalg.qr(draw(3)[0][:4]).Q
    torch.testing.assert_close(CASES[name](student @ rotation, teacher @ rotation), CASES[name](student, teacher))
    alone = torch.allclose(CASES[name](student @ rotation, teacher), CASES[name](student, teacher))
    assert alone is (name in ANY_WIDTH)


@every_case
def test_weights_and_teacher_gradient(name: str) -> None:
    student, teacher = draw()
    weight = torch.tensor([0.0, 1, 2, 3, 0.5], dtype=torch.float64)
    values = CASES[name](student, teacher, reduction="none")
    torch.testing.assert_close(CASES[name](student, teacher, weight=weight), (weight * values).mean())
    CASES[name](student.requires_grad_(), teacher.requires_grad_()).backward()
    assert teacher.grad is None


def test_golden_numbers() -> None:
    assert representation.similarity_preserving(F_STUDENT, F_TEACHER).item() == pytest.approx(0.233566, abs=1e-6)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]])
    teacher_first = representation.affinity_kl(F_STUDENT, F_TEACHER, neighbours=others)
    student_first = representation.affinity_kl(F_TEACHER, F_STUDENT, neighbours=others)
    assert teacher_first.item() == pytest.approx(0.049280, abs=1e-6)
    assert student_first.item() == pytest.approx(0.050240, abs=1e-6)


@pytest.mark.parametrize(("alpha", "bound"), [(0.0, 1.733743), (0.5, 1.043071), (0.9, 0.629584), (1.0, 0.525171)])
def test_mutual_information_golden(alpha: float, bound: float) -> None:
    found = -representation.mutual_information(CRITIC, alpha=alpha, baseline=BASELINE)
    assert found.item() == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mutual_information_is_the_slow_loop(alpha: float) -> None:
    """Every sum spelt out, with pairs that are no negatives."""
    generator = torch.Generator().manual_seed(2)
    critic = 3 * torch.randn(7, 7, generator=generator, dtype=torch.float64)
    baseline = torch.randn(7, generator=generator, dtype=torch.float64)
    distinct = torch.rand(7, 7, generator=generator) < 0.7
    distinct[4] = False  # all others are its duplicates: nothing to tell it from
    s, rows, expected = critic.tolist(), range(7), []
    for i in rows:
        negatives = [j for j in rows if j != i and distinct[i, j]]

        def log_mean(i: int, j: int, negatives: list[int] = negatives) -> float:
            others = [math.exp(s[i][k]) for k in (*negatives, i) if k != j]
            return math.log(alpha * sum(others) / max(1, len(others)) + (1 - alpha) * math.exp(baseline[i].item()))

        if not negatives:
            expected.append(0.0)
            continue
        joint = sum(s[i][i] - log_mean(i, j) for j in negatives) / len(negatives)
        marginal = sum(math.exp(s[i][j] - log_mean(i, i)) for j in negatives) / len(negatives)
        expected.append(marginal - joint - 1)
    found = representation.mutual_information(
        critic, alpha=alpha, baseline=baseline, distinct=distinct, reduction="none"
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_mutual_information_of_many_rows_needs_no_cube_of_memory() -> None:
    critic = torch.randn(1500, 1500, requires_grad=True)  # 13.5 GB if every negative were left out by hand
    value = representation.mutual_information(critic)
    (gradient,) = torch.autograd.grad(value, critic)
    assert torch.isfinite(gradient).all()
    # one pair far above all others: sum minus own would leave nothing of the rest
    steep = torch.zeros(3, 3)
    steep[0, 1] = 90.0
    assert torch.isfinite(representation._leave_one_out(steep, ~torch.eye(3, dtype=torch.bool))).all()
    assert representation._leave_one_out(steep, ~torch.eye(3, dtype=torch.bool))[0, 1] == 0


def test_mutual_information_special_cases() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    nwj = -representation.mutual_information(CRITIC, alpha=0.0, baseline=ones)
    assert nwj.item() == pytest.approx(1.525749, abs=1e-6)
    # leave-one-out InfoNCE: bounded by log(K - 1), and a shift of a row changes nothing
    shifted = representation.mutual_information(CRITIC + torch.tensor([[5.0], [-3], [40]], dtype=torch.float64))
    torch.testing.assert_close(shifted, representation.mutual_information(CRITIC))
    sure = -representation.mutual_information(60 * torch.eye(9, dtype=torch.float64))
    assert sure.item() <= math.log(8) + 1e-9
    # a duplicate of row 0 as row 2 is no negative: the rest is the bound of the two others
    distinct = torch.ones(3, 3, dtype=torch.bool)
    distinct[0, 2] = distinct[2, 0] = False
    value = representation.mutual_information(CRITIC, distinct=distinct, reduction="none")
    moved = CRITIC.clone()
    moved[0, 2] = 50.0
    assert value[0] == representation.mutual_information(moved, distinct=distinct, reduction="none")[0]
    assert gradcheck(
        lambda c: representation.mutual_information(c, alpha=0.7, baseline=BASELINE), (CRITIC.clone().requires_grad_(),)
    )


def test_plain_infonce_golden() -> None:
    """On unit rows the critic is the matrix of cosines; temperature 1 gives cross-entropy of it."""
    rows = torch.nn.functional.normalize(draw()[0], dim=-1)
    expected = torch.nn.functional.cross_entropy(rows @ rows.T, torch.arange(5))
    torch.testing.assert_close(representation.infonce(rows, rows, temperature=1.0), expected)
    assert torch.nn.functional.cross_entropy(CRITIC, torch.arange(3)).item() == pytest.approx(0.313028, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: representation._rows(torch.ones(2, 3), torch.ones(2, 4), None, True), r"expected equal shapes"),
        (lambda: representation._rows(torch.ones(2, 3), torch.ones(3, 3), None, False), "equally many rows"),
        (
            lambda: representation._rows(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), True),
            "mask is torch.float32",
        ),
        (lambda: representation.infonce(torch.ones(2, 3), torch.ones(2, 3), temperature=0.0), "temperature 0.0"),
        (lambda: representation.affinity_kl(F_STUDENT, F_TEACHER, neighbours=NEIGHBOURS[:3], sigma=0.0), "sigma 0.0"),
        (lambda: representation.mutual_information(CRITIC, alpha=1.5), "alpha 1.5"),
        (lambda: representation.mutual_information(CRITIC, alpha=0.5), "with a baseline when it is below 1"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
