"""Acquisition: RAD against the linear program, exact budgets, golden numbers, filters, domain shares."""

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import linprog

from structkd import acquisition
from structkd.errors import UsageError

GAINS = np.array([0.9, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1, 0.05])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def program(gain: np.ndarray, budget: int, errors: float, penalty: float) -> float:
    """max sum z - (1 + penalty) (e c + sum u), u >= z - c: the sum of the e largest z as its dual (CVaR) form."""
    n = len(gain)
    objective = np.concatenate([-gain, [(1 + penalty) * errors], np.full(n, 1 + penalty)])
    excess = np.hstack([np.diag(gain), -np.ones((n, 1)), -np.eye(n)])
    spend = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    result = linprog(
        objective, np.vstack([excess, spend]), np.append(np.zeros(n), budget),
        bounds=[(0, 1)] * n + [(0, None)] * (n + 1),
    )  # fmt: skip
    assert result.success
    return float(-result.fun)


def worth(p: np.ndarray, gain: np.ndarray, errors: float, penalty: float) -> float:
    """The game played out: the adversary takes the e largest z, the next one in part."""
    z = np.sort(p * gain)[::-1]
    whole = int(errors)
    taken = z[:whole].sum() + (errors - whole) * (z[whole] if whole < len(z) else 0)
    return float(z.sum() - (1 + penalty) * taken)


@pytest.mark.parametrize(
    ("errors", "penalty", "level", "probabilities", "value"),
    [
        (0, 1, 0.9, [1, 1, 1, 0, 0, 0, 0, 0], 2.3),
        (1, 1, 0.497696, [0.552995, 0.622120, 0.829493, 0.995392, 0, 0, 0, 0], 0.995392),
        (1, 0, 0.497696, [0.552995, 0.622120, 0.829493, 0.995392, 0, 0, 0, 0], 1.493088),
        (2, 1, 0.213650, [0.237389, 0.267062, 0.356083, 0.427300, 0.712166, 1, 0, 0], 0.413650),
    ],
)
def test_water_level_golden(
    errors: float, penalty: float, level: float, probabilities: list[float], value: float
) -> None:
    found = acquisition.water_level(GAINS, 3, errors=errors, penalty=penalty)
    assert found.level == pytest.approx(level, abs=1e-6)
    assert found.probabilities.tolist() == pytest.approx(probabilities, abs=1e-6)
    assert found.value == pytest.approx(value, abs=1e-6)
    assert found.unspent == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0])
def test_water_level_is_the_linear_program(penalty: float) -> None:
    generator = rng(int(10 * penalty))
    spent = 0
    for _ in range(40):
        n = int(generator.integers(1, 13))
        gain = generator.random(n) if generator.random() < 0.8 else generator.integers(0, 4, n) / 4  # ties and zeros
        budget = int(generator.integers(0, n + 1))
        errors = float(generator.choice([0, 0.3, 1, 1.5, 2, n]))
        found = acquisition.water_level(gain, budget, errors=errors, penalty=penalty)
        assert found.value == pytest.approx(program(gain, budget, errors, penalty), abs=1e-9)
        assert found.probabilities.sum() == pytest.approx(budget, abs=1e-9)
        assert (found.probabilities >= 0).all()
        assert (found.probabilities <= 1 + 1e-12).all()
        if found.unspent < 1e-9:
            spent += 1
            assert worth(found.probabilities, gain, errors, penalty) == pytest.approx(found.value, abs=1e-9)
    assert 10 < spent < 40  # both kinds were drawn


def test_unspent_budget_is_spread_evenly() -> None:
    found = acquisition.water_level(GAINS, 3, errors=8)  # every answer can be wrong: nothing is worth asking
    assert found.level == pytest.approx(0, abs=1e-12)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.unspent == pytest.approx(3)
    np.testing.assert_allclose(found.probabilities, 3 / 8)
    assert acquisition.water_level(GAINS, 8, errors=1).probabilities.tolist() == pytest.approx([1] * 8)


def test_cutting_the_uncapped_rule_is_worse() -> None:
    """p = min(1, b / (g H_m)), m = argmax (k - 2e) / H_k, wastes budget that the exact level spends."""
    sums = np.cumsum(1 / GAINS)
    m = int(np.argmax((np.arange(1, 9) - 2) / sums)) + 1
    cut = np.where(np.arange(8) < m, np.minimum(1, 3 / (GAINS * sums[m - 1])), 0)
    exact = acquisition.water_level(GAINS, 3, errors=1)
    assert worth(cut, GAINS, 1, 1) <= exact.value + 1e-12
    zero_errors = np.minimum(1, np.where(np.arange(8) < 1, 3 / (GAINS * sums[0]), 0))
    assert zero_errors.sum() == 1  # of a budget of 3


def test_large_water_level() -> None:
    gain = rng().random(20_000)
    found = acquisition.water_level(gain, 2_000, errors=1_000.0)
    assert found.probabilities.sum() == pytest.approx(2_000)
    assert worth(found.probabilities, gain, 1_000, 1) == pytest.approx(found.value)
    for nearby in (0.999, 1.001):  # concave: both sides are lower
        p = acquisition._filled(np.sort(gain)[::-1], 2_000, found.level * nearby)
        assert p @ np.sort(gain)[::-1] - 2_000 * found.level * nearby < found.value


def test_systematic_sample_keeps_budget_and_marginals() -> None:
    p = acquisition.water_level(GAINS, 3, errors=1).probabilities
    generator = rng()
    counts = np.zeros(8)
    for _ in range(4_000):
        rows = acquisition.systematic_sample(p, generator)
        assert len(set(rows.tolist())) == 3
        assert (np.diff(rows) > 0).all()
        counts[rows] += 1
    # five standard errors of a Bernoulli mean
    assert (np.abs(counts / 4_000 - p) <= 5 * np.sqrt(p * (1 - p) / 4_000) + 1e-9).all()
    assert acquisition.systematic_sample(np.ones(5), generator).tolist() == [0, 1, 2, 3, 4]
    assert acquisition.systematic_sample(np.zeros(5), generator).tolist() == []


def test_systematic_sample_survives_rounding() -> None:
    p = np.full(1_000, 0.1) + rng().normal(0, 1e-12, 1_000)
    ones = np.concatenate([np.full(7, 1 + 1e-10), np.full(10, 0.3)])
    for seed in range(200):
        assert len(acquisition.systematic_sample(p, rng(seed))) == 100
        assert len(acquisition.systematic_sample(ones, rng(seed))) == 10


def test_systematic_sample_lets_any_two_rows_meet() -> None:
    """In their own order, rows 0 and 1 of p = 1/2 would exclude each other."""
    generator = rng()
    pairs = {tuple(acquisition.systematic_sample(np.full(4, 0.5), generator).tolist()) for _ in range(200)}
    assert len(pairs) == 6


def test_a_row_hit_twice_gives_its_second_place_away() -> None:
    class Fixed(np.random.Generator):
        def permutation(self, x: int) -> np.ndarray:  # type: ignore[override]
            return np.arange(x)

        def random(self) -> float:  # type: ignore[override]
            return 5e-10

    generator = Fixed(np.random.PCG64(0))
    p = np.array([1 + 1e-9, 0.4, 0.6 - 1e-9])
    assert acquisition.systematic_sample(p, generator).tolist() == [0, 2]


STUDENT = np.array([[2.0, 0, 0], [1, 1, -9], [0, 5, -1], [0.4, 0, 0.1]])


def test_gains() -> None:
    q = np.exp(STUDENT) / np.exp(STUDENT).sum(1, keepdims=True)
    top = np.sort(q, axis=1)
    np.testing.assert_allclose(acquisition.gains(STUDENT), 1 - (top[:, 2] - top[:, 1]))
    sigmoid = np.sort(1 / (1 + np.exp(-STUDENT)), axis=1)
    np.testing.assert_allclose(acquisition.gains(STUDENT, form="sigmoid"), 1 - (sigmoid[:, 2] - sigmoid[:, 1]))
    mask = np.array([[True, False, True], [True, True, False], [False] * 3, [True, False, False]])
    junk = np.where(mask, STUDENT, np.nan)
    for form in ("softmax", "sigmoid"):
        found = acquisition.gains(junk, mask=mask, form=form)
        assert found[0] == pytest.approx(acquisition.gains(STUDENT[:1, [0, 2]], form=form)[0])
        assert found[1] == pytest.approx(1)
        assert found[2] == 0
    assert acquisition.gains(np.array([[1e30, -1e30]]))[0] == 0


@pytest.mark.parametrize("name", acquisition.POLICIES)
def test_policies_respect_the_budget(name: str) -> None:
    student = rng().normal(size=(50, 4))
    known = rng(1).random(50) < 0.3
    options = {} if name == "margin" else {"generator": rng(2)}
    options |= {"teacher_accuracy": 0.8} if name == "rad" else {}
    for budget in (0, 1, 17, int((~known).sum())):
        rows = acquisition.POLICIES[name](student, budget, known=known, **options)
        assert rows.dtype == np.int64
        assert len(rows) == budget
        assert (np.diff(rows) > 0).all()
        assert not known[rows].any()
    with pytest.raises(UsageError, match="the number of lists not asked about yet"):
        acquisition.POLICIES[name](student, 50, known=known, **options)


def test_margin_takes_the_least_sure() -> None:
    assert acquisition.margin(STUDENT, 2).tolist() == [1, 3]
    assert acquisition.margin(np.zeros((4, 2)), 2).tolist() == [0, 1]  # ties: the smaller row
    assert acquisition.margin(STUDENT, 2, known=np.array([False, True, False, False])).tolist() == [0, 3]


def test_rad_with_a_perfect_teacher_is_margin() -> None:
    student = rng().normal(size=(40, 3))
    asked = acquisition.rad(student, 9, teacher_accuracy=1.0, generator=rng())
    assert asked.tolist() == acquisition.margin(student, 9).tolist()
    again = [acquisition.rad(student, 9, teacher_accuracy=0.8, generator=rng(5)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_random_is_uniform() -> None:
    generator = rng()
    counts = np.zeros(10)
    for _ in range(2_000):
        counts[acquisition.random(np.zeros((10, 1)), 3, generator=generator)] += 1
    assert np.abs(counts / 2_000 - 0.3).max() < 5 * np.sqrt(0.21 / 2_000)


def test_agreement() -> None:
    teacher = np.array([[3.0, 0, 0], [0, 3, 0], [0, 3, 0], [3, 0, 0]])
    assert acquisition.agreement(STUDENT, teacher).tolist() == [True, False, True, False]
    # row 3: the student is right but unsure, .40
    assert acquisition.agreement(STUDENT, teacher, student_confidence=0.4).tolist() == [True, False, True, True]
    assert not acquisition.agreement(STUDENT, teacher, teacher_confidence=0.95).any()
    mask = np.array([[True, False, True], [True, False, True], [False] * 3, [True] * 3])
    junk = np.where(mask, teacher, np.nan)
    assert acquisition.agreement(STUDENT, junk, mask=mask).tolist() == [True, False, False, False]
    assert acquisition.agreement(np.empty((2, 0)), np.empty((2, 0))).tolist() == [False, False]


def test_teacher_filter() -> None:
    teacher = np.array([[5.0, 4, 3], [5, 5, 5], [1, 2, 9], [-1, -2, -3]])
    own = np.array([1, 2, 0, 0])
    assert acquisition.teacher_filter(teacher, own, top=1).tolist() == [False, True, False, True]
    assert acquisition.teacher_filter(teacher, own, top=2).tolist() == [True, True, False, True]
    assert acquisition.teacher_filter(teacher, own, threshold=4.0).tolist() == [True, True, False, False]
    assert acquisition.teacher_filter(teacher, own, top=1, threshold=4.0).tolist() == [True, True, False, True]
    mask = np.array([[False, True, True], [True, True, False], [True, False, False], [True] * 3])
    found = acquisition.teacher_filter(np.where(mask, teacher, np.nan), own, top=1, mask=mask)
    assert found.tolist() == [True, False, True, True]


def losses(*ratios: float) -> tuple[np.ndarray, np.ndarray]:
    teacher = np.linspace(0.5, 2, len(ratios))
    return teacher + np.log(ratios), teacher


def test_domain_weights_golden() -> None:
    student, teacher = losses(2, 3, 1)
    shares = acquisition.domain_weights(student, teacher)
    assert shares.tolist() == pytest.approx([0.244728, 0.665241, 0.090031], abs=1e-6)
    for expected in ([0.225322, 0.600073, 0.174605], [0.225322, 0.591290, 0.183388]):
        shares = acquisition.domain_weights(student, teacher, previous=shares)
        assert shares.tolist() == pytest.approx(expected, abs=1e-6)


def test_domain_weights_rules() -> None:
    generator = rng()
    shares = acquisition.domain_weights(*losses(1.7, 1.7, 1.7, 1.7))
    for _ in range(20):
        shares = acquisition.domain_weights(*losses(1.7, 1.7, 1.7, 1.7), previous=shares)
        np.testing.assert_allclose(shares, 0.25)  # equal gaps stay uniform
    for _ in range(50):
        student, teacher = 3 * generator.random((2, 4))
        shares = acquisition.domain_weights(student, teacher, previous=shares, smoothing=0.7)
        assert shares.sum() == pytest.approx(1)
        assert (shares >= 0.3 / 4 - 1e-12).all()
    huge = acquisition.domain_weights(np.array([500.0, 20.0, 0.0]), np.zeros(3))  # both cut at the limit of 10
    assert huge[0] == huge[1] == pytest.approx(0.5, abs=1e-3)
    lone = acquisition.domain_weights(np.array([9.0, 0]), np.zeros(2), previous=np.array([0.0, 1]), limit=5e3)
    assert lone.tolist() == [0.75, 0.25]


SQUARE = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: inspect.unwrap(f.gains)(SQUARE, form="cube"), "form 'cube' is unknown"),
        (lambda f: f.gains(np.full((1, 2), np.nan)), "2 valid scores are not numbers"),
        (lambda f: f._checked(np.zeros(3), None), "expected [lists, items]"),
        (lambda f: f._checked(SQUARE, np.ones((2, 2), dtype=bool)), "mask has shape [2, 2]"),
        (lambda f: f._open_rows(3, 1, np.ones(2, dtype=bool)), "one flag for each of 3 lists"),
        (lambda f: f.random(SQUARE, -1, generator=rng()), "budget -1: expected 0 to 3"),
        (lambda f: f.rad(SQUARE, 1, teacher_accuracy=80.0, generator=rng()), "teacher_accuracy 80.0"),
        (lambda f: f.water_level(np.array([0.1, -1]), 1, errors=0), "at least 0 per point"),
        (lambda f: f.water_level(GAINS, 9, errors=0), "budget 9: expected 0 to 8"),
        (lambda f: f.water_level(GAINS, 3, errors=-1.0), "errors -1.0"),
        (lambda f: f.systematic_sample(np.array([0.5, 0.2]), rng()), "they sum to 0.7"),
        (lambda f: f.systematic_sample(np.array([1.5, 0.5]), rng()), "must lie in [0, 1]"),
        (lambda f: f.agreement(SQUARE, SQUARE, student_confidence=50.0), "confidences 50.0, 0.5"),
        (lambda f: inspect.unwrap(f.agreement)(SQUARE, SQUARE.T), "expected the same"),
        (lambda f: f.teacher_filter(SQUARE, np.zeros(3, dtype=int)), "neither top nor threshold"),
        (lambda f: f.teacher_filter(SQUARE, np.zeros(3, dtype=int), top=0), "top 0"),
        (lambda f: f.teacher_filter(SQUARE, np.array([0, 1, 2]), top=1), "item number in 0 ... 1"),
        (lambda f: inspect.unwrap(f.domain_weights)(np.ones(2), np.ones(3)), "one cross-entropy per domain"),
        (lambda f: f.domain_weights(np.array([np.nan]), np.ones(1)), "not a finite number"),
        (lambda f: f.domain_weights(np.ones(2), np.ones(2), smoothing=2.0), "smoothing 2.0"),
        (lambda f: f.domain_weights(np.ones(2), np.ones(2), previous=np.ones(2)), "with sum 1"),
    ],
)
def test_errors(call: Callable[[object], object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        call(acquisition)
