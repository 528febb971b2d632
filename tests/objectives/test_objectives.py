"""The loss table: every objective of `OBJECTIVES`, and the variants a parameter selects, against one set of rules."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from reference import objectives as loop
from torch import Tensor
from torch.autograd import gradcheck

from structkd import objectives
from structkd.errors import UsageError
from structkd.objectives import OBJECTIVES, ORDER_OBJECTIVES, _masks

Objective = Callable[..., Tensor]

# name -> (objective, slow loop)
CASES: dict[str, tuple[Objective, Callable[[list[float], list[float]], float]]] = {
    name: (function, getattr(loop, name.replace("-", "_"))) for name, function in OBJECTIVES.items()
} | {
    "margin-mse all": (partial(objectives.margin_mse, pairs="all"), loop.margin_mse_all),
    "margin-mse centred": (
        partial(objectives.margin_mse, pairs="centred"),
        lambda s, t: loop.margin_mse_all(s, t) * (len(s) - 1) / (2 * len(s)),
    ),
    "ranknet soft": (partial(objectives.ranknet, target="soft"), loop.soft_ranknet),
    "plackett-luce log": (
        partial(objectives.plackett_luce, steps="log"),
        lambda s, t: loop.likelihood(s, loop.teacher_order(t), _log_weights(t)),
    ),
    "plackett-luce uniform": (
        partial(objectives.plackett_luce, steps="uniform"),
        lambda s, t: loop.listmle(s, t) / len(s),
    ),
}
FIRST_IS_POSITIVE = {"margin-mse"}  # item 0 has a role, so items may not change places
NOT_SHIFT_INVARIANT = {"pointwise-mse"}
PAIRS = {"hinge", "pairwise-logistic"}  # with the ranknets and margins: a list counts when it has a pair
MINIMUM_AT_TEACHER = {  # identical scores are a stationary point; the others only want the order, or offset it
    "balanced-kl", "jeffreys", "jensen-shannon", "kl", "listnet", "margin-mse", "margin-mse all", "margin-mse centred",
    "pointwise-mse", "ranknet soft", "reverse-kl",
}  # fmt: skip

every_case = pytest.mark.parametrize("name", CASES)


def _log_weights(t: list[float]) -> list[float]:
    raw = {item: 1 / math.log2(2 + rank) for rank, item in enumerate(loop.teacher_order(t))}
    return [raw[item] / sum(raw.values()) for item in range(len(t))]


def draw(lists: int = 5, items: int = 7, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, lists, items, generator=generator, dtype=torch.float64)
    return student, teacher


def ragged(lists: int = 5, items: int = 7) -> Tensor:
    """Lists of length items, items - 1, ..., valid items scattered, but item 0 always valid."""
    mask = torch.ones(lists, items, dtype=torch.bool)
    for row in range(lists):
        for gone in range(row):
            mask[row, items - 1 - (gone * 2) % (items - 1)] = False
    return mask


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@every_case
def test_value_is_the_slow_loop(name: str) -> None:
    objective, slow = CASES[name]
    student, teacher = draw()
    expected = [slow(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    found = objective(student, teacher, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(objective(student, teacher), found.mean())


@every_case
def test_masked_is_removed(name: str) -> None:
    objective, slow = CASES[name]
    student, teacher = draw()
    mask = ragged()
    found = objective(student, teacher, mask=mask, reduction="none")
    for position in range(len(student)):
        keep = mask[position]
        expected = slow(student[position, keep].tolist(), teacher[position, keep].tolist())
        assert found[position].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@every_case
@pytest.mark.parametrize("junk", [1e30, -1e30, math.inf, -math.inf, math.nan])
def test_masked_content_never_matters(name: str, junk: float) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    mask = ragged()

    def value_and_gradient(fill: float) -> tuple[Tensor, Tensor]:
        s = student.masked_fill(~mask, fill).requires_grad_()
        value = objective(s, teacher.masked_fill(~mask, fill), mask=mask)
        return value, torch.autograd.grad(value, s)[0]

    (value, gradient), (other_value, other_gradient) = value_and_gradient(0.0), value_and_gradient(junk)
    assert torch.equal(value, other_value)
    assert torch.equal(gradient, other_gradient)
    assert (gradient[~mask] == 0).all()


@every_case
def test_gradient_is_the_finite_difference(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw(3, 5, seed=1)
    mask = ragged(3, 5)
    function = lambda s: objective(s, teacher, mask=mask, reduction="none")  # noqa: E731
    assert gradcheck(function, (student.requires_grad_(),))


@every_case
def test_teacher_has_no_gradient(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    objective(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@every_case
def test_shift_invariance(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    shift = torch.linspace(-30, 50, 5, dtype=torch.float64)[:, None]
    shifted = objective(student + shift, teacher - 2 * shift, reduction="none")
    same = torch.allclose(shifted, objective(student, teacher, reduction="none"), rtol=1e-9)
    assert same is (name not in NOT_SHIFT_INVARIANT)


@every_case
def test_permuting_items_changes_nothing(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    mask = ragged()
    start = 1 if name in FIRST_IS_POSITIVE else 0
    order = torch.cat([torch.arange(start), start + torch.randperm(7 - start)])
    permuted = objective(student[:, order], teacher[:, order], mask=mask[:, order], reduction="none")
    torch.testing.assert_close(permuted, objective(student, teacher, mask=mask, reduction="none"))


@every_case
def test_batch_is_the_loop_over_lists(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    mask = ragged()
    batch = objective(student, teacher, mask=mask, reduction="none")
    single = [objective(student[i : i + 1], teacher[i : i + 1], mask=mask[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(batch, torch.stack(single))


@every_case
def test_empty_lists_are_zero_and_do_not_count(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    mask = ragged()
    mask[1] = False
    mask[3] = False
    student.requires_grad_()
    values = objective(student, teacher, mask=mask, reduction="none")
    value = objective(student, teacher, mask=mask)
    (gradient,) = torch.autograd.grad(value, student)
    keep = [0, 2, 4]
    assert (values[[1, 3]] == 0).all()
    assert (gradient[[1, 3]] == 0).all()
    torch.testing.assert_close(value, objective(student[keep], teacher[keep], mask=mask[keep]))


@every_case
def test_everything_masked(name: str) -> None:
    objective, _ = CASES[name]
    student = torch.full((2, 3), math.nan, requires_grad=True)
    value = objective(student, torch.full((2, 3), math.nan), mask=torch.zeros(2, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros(2, 3))


@every_case
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1)])
def test_no_lists_no_items_one_item(name: str, shape: tuple[int, int]) -> None:
    objective, _ = CASES[name]
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    values = objective(student, teacher, reduction="none")
    assert values.shape == shape[:1]
    expected = (student - teacher).square().sum(-1) if name == "pointwise-mse" and shape[1] else torch.zeros(shape[0])
    torch.testing.assert_close(values, expected)
    objective(student, teacher).backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


@every_case
@pytest.mark.parametrize("size", [1e2, 1e8, 1e30])
def test_extremes_stay_finite(name: str, size: float) -> None:
    objective, _ = CASES[name]
    rows = [[1.0, -1, 0, 0.5], [-1, 1, -1, 1], [1, 1, 1, 1], [0, 0, 1e-30, -1]]
    student = size * torch.tensor(rows)
    for teacher in (student, -student, student.flip(0), torch.zeros_like(student), torch.tensor(rows)):
        for mask in (None, torch.tensor([[True, True, False, True]] * 4)):
            s = student.clone().requires_grad_()
            value = objective(s, teacher, mask=mask)
            (gradient,) = torch.autograd.grad(value, s)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()


@every_case
def test_identical_scores_are_the_minimum(name: str) -> None:
    objective, _ = CASES[name]
    _, teacher = draw()
    student = teacher.clone().requires_grad_()
    value = objective(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert bool(gradient.abs().max() < 1e-9) == (name in MINIMUM_AT_TEACHER)
    if name in MINIMUM_AT_TEACHER:
        for seed in range(5):
            other = teacher + 0.3 * draw(seed=seed)[0]
            assert (objective(other, teacher, reduction="none") > objective(teacher, teacher, reduction="none")).all()


@every_case
def test_weight_multiplies(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    weight = torch.tensor([0.0, 1, 2, 0.5, 3], dtype=torch.float64)
    values = objective(student, teacher, reduction="none")
    torch.testing.assert_close(objective(student, teacher, weight=weight, reduction="none"), weight * values)
    torch.testing.assert_close(objective(student, teacher, weight=weight), (weight * values).mean())


@every_case
def test_reductions_and_places_of_the_common_parameters(name: str) -> None:
    objective, _ = CASES[name]
    student, teacher = draw()
    mask = ragged()
    mask[2] = False
    weight = torch.tensor([0.5, 1, 2, 3, 0.25], dtype=torch.float64)
    values = objective(student, teacher, mask, weight, "none")
    assert torch.equal(values, objective(student, teacher, mask=mask, weight=weight, reduction="none"))
    torch.testing.assert_close(objective(student, teacher, mask, weight, "sum"), values.sum())
    counted = 4 if name.startswith("margin-mse") or "ranknet" in name or name in PAIRS else int(mask.any(1).sum())
    torch.testing.assert_close(objective(student, teacher, mask, weight), values.sum() / counted)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    objective, _ = CASES[name]
    student, teacher = (x.to(dtype) for x in draw())
    value = objective(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, objective(student.double(), teacher.double()).float(), rtol=1e-4, atol=1e-6)


@every_case
def test_signature(name: str) -> None:
    function = OBJECTIVES.get(name.split(" ", maxsplit=1)[0])
    assert function is not None
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:5] == ["student", "teacher", "mask", "weight", "reduction"]
    kinds = [parameter.kind for parameter in parameters.values()]
    assert set(kinds[:5]) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert set(kinds[5:]) <= {inspect.Parameter.KEYWORD_ONLY}
    assert getattr(objectives, name.split(" ", maxsplit=1)[0].replace("-", "_")) is function


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(data=st.data(), lists=st.integers(1, 4), items=st.integers(1, 6))
def test_any_mask_equals_removal(data: st.DataObject, lists: int, items: int) -> None:
    number = st.floats(-8, 8, width=32)
    matrix = lambda: torch.tensor(  # noqa: E731
        data.draw(st.lists(st.lists(number, min_size=items, max_size=items), min_size=lists, max_size=lists)),
        dtype=torch.float64,
    )
    student, teacher = matrix(), matrix()
    bits = data.draw(st.lists(st.booleans(), min_size=lists * items, max_size=lists * items))
    mask = torch.tensor(bits).reshape(lists, items)
    for name, (objective, slow) in CASES.items():
        if name == "margin-mse":
            mask[:, 0] = True  # without its positive the list is empty, which removal cannot say
        found = objective(student, teacher, mask=mask, reduction="none")
        for position in range(lists):
            keep = mask[position]
            s, t = student[position, keep].tolist(), teacher[position, keep].tolist()
            expected = slow(s, t) if s else 0.0
            assert found[position].item() == pytest.approx(expected, rel=1e-7, abs=1e-7), name


# ---- golden numbers: papers, authors' code, independent tools ----

G_STUDENT, G_TEACHER = row(0.5, -1, 2, 0.3), row(2, 1, 0.5, -1)
G_POSITIVE = torch.tensor([[False, True, False, False]])
G3_MASK = torch.tensor([[True, True, True, False]])
GOLDEN = [
    ("kl", {}, 0.999413, [-0.456169, -0.190004, 0.551013, 0.095161]),
    ("kl", {"mask": G3_MASK}, 0.971821, None),
    ("kl", {"temperature": 2.0}, 0.291375, None),
    ("kl", {"temperature": 2.0, "rescale": True}, 1.165500, None),
    ("kl", {"temperature": 2.0, "student_temperature": 1.0}, 0.717409, None),
    ("kl", {"temperature": 1.0, "student_temperature": 2.0}, 0.557584, None),
    ("reverse-kl", {}, 1.015077, [-0.367179, -0.099031, 0.415420, 0.050790]),
    ("reverse-kl", {"mask": G3_MASK}, 1.060293, None),
    ("reverse-kl", {"temperature": 2.0}, 0.293170, None),
    ("jensen-shannon", {}, 0.228426, [-0.087238, -0.026608, 0.098167, 0.015679]),
    ("jensen-shannon", {"mask": G3_MASK}, 0.229625, None),
    ("jensen-shannon", {"temperature": 2.0}, 0.071156, None),
    ("jeffreys", {}, 2.014490, None),
    ("balanced-kl", {}, 3.013903, None),
    ("balanced-kl", {"high": 1.0, "low": 1.0}, 2.014490, None),
    ("balanced-kl", {"high": 1.0, "low": 0.0}, 0.999413, None),
    ("listnet", {}, 2.013816, [-0.456169, -0.190004, 0.551013, 0.095161]),
    ("ranknet", {}, 1.209725, [-0.241694, -0.259331, 0.269281, 0.231744]),
    ("ranknet", {"positive": G_POSITIVE}, 2.097003, None),
    ("ranknet", {"target": "soft"}, 1.070024, [-0.158562, -0.221364, 0.206357, 0.173569]),
    ("listmle", {}, 5.252225, None),
    ("listmle", {"positive": G_POSITIVE}, 5.383821, None),
    ("plackett-luce", {}, 1.885297, [-0.516035, -0.194305, 0.579612, 0.130728]),
    ("plackett-luce", {"positive": G_POSITIVE}, 1.901394, [-0.478358, -0.216539, 0.566554, 0.128343]),
    ("plackett-luce", {"positive": G_POSITIVE, "label_first": False}, 1.885297, None),
    ("plackett-luce", {"temperature": 4.0}, 1.527987, None),
    ("plackett-luce", {"temperature": 4.0, "positive": G_POSITIVE}, 1.560245, None),
    ("plackett-luce", {"steps": "log"}, 1.555266, None),
    ("plackett-luce", {"steps": "log", "positive": G_POSITIVE}, 1.803794, None),
    ("plackett-luce", {"positive": G_POSITIVE, "mask": G3_MASK}, 1.818861, None),
    ("plackett-luce", {"mask": G3_MASK}, 1.799376, None),
    ("plackett-luce", {"positive": G_POSITIVE, "top_k": 2}, 1.878577, None),
]


@pytest.mark.parametrize(("name", "options", "value", "gradient"), GOLDEN)
def test_golden_row(name: str, options: dict[str, object], value: float, gradient: list[float] | None) -> None:
    student = G_STUDENT.clone().requires_grad_()
    found = OBJECTIVES[name](student, G_TEACHER, **options)
    assert found.item() == pytest.approx(value, abs=1.01e-6)
    if gradient is not None:
        assert torch.autograd.grad(found, student)[0][0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_golden_row_itself() -> None:
    """The distributions and entropies that the golden numbers rest on."""
    every = torch.ones(1, 4, dtype=torch.bool)
    p, q = (_masks.log_softmax(x, every).exp()[0].tolist() for x in (G_TEACHER, G_STUDENT))
    assert p == pytest.approx([0.609460, 0.224208, 0.135989, 0.030343], abs=1e-6)
    assert q == pytest.approx([0.153291, 0.034204, 0.687002, 0.125504], abs=1e-6)
    assert _masks.entropy(G_TEACHER, every).item() == pytest.approx(1.014403, abs=1e-6)
    assert _masks.entropy(G_STUDENT, every).item() == pytest.approx(0.921323, abs=1e-6)
    # TAID at share 0 in its cross-entropy form: the student against itself
    assert objectives.listnet(G_STUDENT, G_STUDENT).item() == pytest.approx(0.921323, abs=1e-6)


def test_published_single_values() -> None:
    assert objectives.margin_mse(row(3, 1), row(5, -1)).item() == 16  # by hand: ((3 - 1) - (5 + 1))^2
    # documentation of TensorFlow Ranking: ListMLELoss on y = [1, 0], s = [.6, .8]; ListNet there by hand
    assert objectives.listmle(row(0.6, 0.8), row(1, 0)).item() == pytest.approx(0.7981389, abs=1e-6)
    assert objectives.listnet(row(0.6, 0.8), row(1, 0)).item() == pytest.approx(0.744351, abs=1e-6)
    assert objectives.pairwise_logistic(row(2, 0.5), row(2, 1)).item() == pytest.approx(0.474077, abs=1e-6)
    assert objectives.pairwise_logistic(row(2, 0.5), row(2, 1), offset=0.0).item() == pytest.approx(
        objectives.ranknet(row(2, 0.5), row(2, 1)).item()
    )


def test_kl_equals_torch() -> None:
    student, teacher = draw()
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(objectives.kl(student, teacher), expected)
    soft = torch.nn.functional.cross_entropy(student, torch.softmax(teacher, -1))
    torch.testing.assert_close(objectives.listnet(student, teacher), soft)


def test_ranknet_equals_torch() -> None:
    student, teacher = draw(1, 2)
    target = (teacher[:, :1] > teacher[:, 1:]).double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(student[:, :1] - student[:, 1:], target)
    torch.testing.assert_close(objectives.ranknet(student, teacher), expected)


def test_kl_at_high_temperature_is_centred_margin_mse() -> None:
    student, teacher = draw()
    hot = objectives.kl(student, teacher, temperature=1e4, rescale=True)
    torch.testing.assert_close(hot, objectives.margin_mse(student, teacher, pairs="centred") / 2, rtol=1e-3, atol=0)


# ---- Plackett-Luce: special cases, closed gradient, ties, orders ----


def test_plackett_luce_special_cases() -> None:
    student, teacher = draw(4, 6)
    label = torch.zeros(4, 6, dtype=torch.bool)
    label[torch.arange(4), torch.tensor([3, 0, 5, 2])] = True
    # a teacher that is sure of the label leaves the first term only: cross-entropy
    sure = torch.where(label, 60.0, teacher)
    expected = torch.nn.functional.cross_entropy(student, label.long().argmax(-1))
    torch.testing.assert_close(objectives.plackett_luce(student, sure, positive=label), expected)
    two_s, two_t = student[:, :2], teacher[:, :2]
    first = two_t.argmax(-1, keepdim=True)
    margin = (two_s.gather(1, first) - two_s.gather(1, 1 - first)).squeeze(1)
    pair = torch.softmax(two_t, -1).amax(-1) * torch.nn.functional.softplus(-margin)
    torch.testing.assert_close(objectives.plackett_luce(two_s, two_t, reduction="none"), pair)


def test_plackett_luce_on_the_golden_row_meets_its_relatives() -> None:
    # a teacher that is sure of the label: cross-entropy
    sure = torch.where(G_POSITIVE, 60.0, G_TEACHER)
    assert objectives.plackett_luce(G_STUDENT, sure, positive=G_POSITIVE).item() == pytest.approx(3.375419, abs=1e-6)
    # p-ListMLE (Lan et al. 2014): weights 2^(K - k) - 1; a teacher of these probabilities in this order gives it
    raw = torch.tensor([[7.0, 3, 1, 1e-12]], dtype=torch.float64)
    student = G_STUDENT[0].tolist()
    expected = loop.likelihood(student, [0, 1, 2, 3], (raw / raw.sum())[0].tolist())
    assert objectives.plackett_luce(G_STUDENT, raw.log()).item() == pytest.approx(expected, abs=1e-9)
    # K = 2: q(better) softplus(-(s_better - s_other)), at a temperature too
    for tau in (1.0, 2.5):
        found = objectives.plackett_luce(row(0.4, -1.1), row(2, 0.5), temperature=tau).item()
        assert found == pytest.approx(loop.softmax([2, 0.5], tau)[0] * loop.softplus(-1.5))


def test_raw_cross_encoder_scores_make_the_weights_one_hot() -> None:
    """Reference: top weight .9456 at temperature 1, .4810 at 4; with all other terms 0 the loss is that weight."""
    teacher = row(8, 5, 3, 1, -2, -6, -9, -10, -11)
    student = torch.zeros(1, 9, dtype=torch.float64)
    for tau, top in ((1.0, 0.9456), (4.0, 0.4810)):
        first = objectives.plackett_luce(student, teacher, temperature=tau, top_k=1)
        assert first.item() / math.log(9) == pytest.approx(top, abs=5e-5)


def test_top_k_keeps_the_first_terms_with_their_denominators() -> None:
    student, teacher = draw(3, 6)
    for name in ("listmle", "plackett-luce"):
        whole = OBJECTIVES[name](student, teacher, reduction="none")
        last = OBJECTIVES[name](student, teacher, top_k=5, reduction="none")
        torch.testing.assert_close(last, whole)  # the last step has one item left: 0
        order = loop.teacher_order(teacher[0].tolist())
        alpha = [1.0] * 6 if name == "listmle" else loop.softmax(teacher[0].tolist())
        cut = [a if order.index(i) < 2 else 0.0 for i, a in enumerate(alpha)]
        found = OBJECTIVES[name](student, teacher, top_k=2, reduction="none")[0].item()
        assert found == pytest.approx(loop.likelihood(student[0].tolist(), order, cut))


def test_plackett_luce_is_convex_in_the_student() -> None:
    one, teacher = draw(6, 5)
    other, _ = draw(6, 5, seed=4)
    for share in (0.25, 0.5, 0.9):
        middle = objectives.plackett_luce(share * one + (1 - share) * other, teacher, reduction="none")
        ends = [objectives.plackett_luce(x, teacher, reduction="none") for x in (one, other)]
        assert (middle <= share * ends[0] + (1 - share) * ends[1] + 1e-12).all()


def test_plackett_luce_gradient_is_the_closed_form() -> None:
    student, teacher = draw(1, 9)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(objectives.plackett_luce(student, teacher), student)
    order = loop.teacher_order(teacher[0].tolist())
    alpha, s = loop.softmax(teacher[0].tolist()), student[0].tolist()
    running = 0.0
    for k, item in enumerate(order):
        running += alpha[item] / sum(math.exp(s[i]) for i in order[k:])
        assert gradient[0, item].item() == pytest.approx(math.exp(s[item]) * running - alpha[item], abs=1e-10)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def test_plackett_luce_several_positives_and_ties() -> None:
    student = row(0.1, 0.2, 0.3, 0.4)
    teacher = row(1, 5, 1, 5)
    positive = torch.tensor([[True, False, True, False]])
    # positives first (equal: in place order 0, 2), then 1 and 3 (equal: in place order)
    alpha = loop.softmax([1, 5, 1, 5])
    expected = loop.likelihood(student[0].tolist(), [0, 2, 1, 3], alpha)
    assert objectives.plackett_luce(student, teacher, positive=positive).item() == pytest.approx(expected)


def test_given_order_replaces_the_teachers() -> None:
    student, teacher = draw(2, 5)
    order = torch.tensor([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]])
    found = objectives.plackett_luce(student, teacher, order=order, steps="uniform", reduction="none")
    for position in range(2):
        expected = loop.likelihood(student[position].tolist(), order[position].tolist(), [0.2] * 5)
        assert found[position].item() == pytest.approx(expected)
    mask = torch.tensor([[True, False, True, True, True]] * 2)
    masked = objectives.listmle(student, teacher, order=order, mask=mask, reduction="none")
    assert masked[0].item() == pytest.approx(loop.likelihood(student[0].tolist(), [4, 2, 0, 3], [1.0] * 5))


def test_order_objectives_use_only_the_order() -> None:
    student, teacher = draw()
    stretched = teacher.exp() * 7 - 3
    for name in ORDER_OBJECTIVES:
        options = {"steps": "log"} if name == "plackett-luce" else {}
        same = OBJECTIVES[name](student, stretched, **options)
        torch.testing.assert_close(same, OBJECTIVES[name](student, teacher, **options))
    for name in set(OBJECTIVES) - ORDER_OBJECTIVES:
        assert not torch.allclose(OBJECTIVES[name](student, stretched), OBJECTIVES[name](student, teacher)), name


def test_long_lists_need_no_square_of_memory() -> None:
    student = torch.randn(1, 200_000, requires_grad=True)
    teacher = torch.randn(1, 200_000)  # all pairs would be 160 GB
    for objective in (objectives.plackett_luce, objectives.listmle, partial(objectives.margin_mse, pairs="all")):
        value = objective(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(gradient).all()


def test_plackett_luce_in_float32_is_accurate_on_a_wide_list() -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(4, 500, generator=generator) * 10
    teacher = torch.randn(4, 500, generator=generator)
    exact = objectives.plackett_luce(student.double(), teacher.double())
    assert objectives.plackett_luce(student, teacher).item() == pytest.approx(exact.item(), rel=1e-5)


def test_lambda_never_pushes_a_pair_the_wrong_way() -> None:
    """The reference's weighted RankNet does when the teacher prefers the 'negative'."""
    student = row(0, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(objectives.weighted_ranknet(student, row(-1, 2)), student)
    assert gradient[0, 0] > 0 > gradient[0, 1]


def test_square_is_smooth_where_it_turns_linear() -> None:
    limit = _masks._SQUARE_LIMIT
    at = torch.tensor([limit * (1 - 1e-9), limit * (1 + 1e-9)], dtype=torch.float64, requires_grad=True)
    value = _masks.square(at)
    (gradient,) = torch.autograd.grad(value.sum(), at)
    assert value[0].item() == pytest.approx(value[1].item(), rel=1e-8)
    assert gradient[0].item() == pytest.approx(gradient[1].item(), rel=1e-8)


# ---- errors ----


def untyped(function: Objective) -> Objective:
    """The function as it runs outside these tests, without the shape checker."""
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objectives.kl(row(1, 2), row(1, 2), temperature=0.0), "temperature 0.0: expected a number above 0"),
        (lambda: objectives.kl(row(1, 2), row(1, 2), student_temperature=-1.0), "temperature -1.0"),
        (lambda: objectives.plackett_luce(row(1, 2), row(1, 2), temperature=-1.0), "temperature -1.0"),
        (lambda: objectives.listmle(row(1, 2), row(1, 2), top_k=0), "top_k 0: expected at least 1"),
        (
            lambda: objectives.listmle(row(1, 2), row(1, 2), order=torch.tensor([[0, 0]])),
            r"expected a permutation of 0..1 in each row",
        ),
        (
            lambda: _masks.lists_of(torch.ones(3, 4), torch.ones(1, 4), None),
            r"teacher has shape \[1, 4\] and student \[3, 4\]; expected the same",
        ),
        (lambda: _masks.lists_of(torch.ones(3), torch.ones(3), None), r"one list of 3 items .* Give student\[None\]"),
        (lambda: _masks.lists_of(torch.ones(2, 3), torch.ones(3), None), "never broadcast"),
        (lambda: _masks.lists_of(torch.ones(1, 2, 3), torch.ones(1, 2, 3), None), "never broadcast"),
        (lambda: untyped(_masks.lists_of)([[1.0, 2]], row(1, 2), None), "student is a list; expected a torch tensor"),
        (lambda: untyped(_masks.lists_of)(row(1, 2), np.ones((1, 2)), None), "teacher is a ndarray; expected a torch"),
        (
            lambda: untyped(objectives.ranknet)(row(1, 2), row(1, 2), positive=torch.tensor([[1, 0]])),
            "positive has dtype torch.int64; expected torch.bool",
        ),
        (
            lambda: untyped(objectives.listmle)(row(1, 2), row(1, 2), positive=torch.tensor([[1, 0]])),
            "positive has dtype torch.int64; expected torch.bool",
        ),
        (
            lambda: untyped(objectives.listmle)(row(1, 2), row(1, 2), order=torch.tensor([[1.0, 0]])),
            "order has dtype torch.float32; expected whole numbers",
        ),
        (
            lambda: objectives.ranknet(row(1, 2), row(1, 2), target="soft", temperature=0.0),
            "temperature 0.0: expected a number above 0",
        ),
        (lambda: _masks.lists_of(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 1, dtype=torch.bool)), "mask has"),
        (lambda: _masks.lists_of(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)), "expected torch.bool"),
        (
            lambda: _masks.reduced(torch.ones(2), torch.ones(2, dtype=torch.bool), None, "median"),
            "reduction 'median' is unknown; expected 'mean', 'sum' or 'none'",
        ),
        (
            lambda: _masks.reduced(torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(1), "mean"),
            r"weight has shape \[1\]; expected one number per list: 2",
        ),
        (
            lambda: objectives.ranknet(row(1, 2), row(1, 2), target="soft", positive=torch.tensor([[True, False]])),
            "'soft' takes no positives",
        ),
        (lambda: untyped(objectives.margin_mse)(row(1, 2), row(1, 2), pairs="some"), "pairs 'some' is unknown"),
        (lambda: untyped(objectives.plackett_luce)(row(1, 2), row(1, 2), steps="x"), "steps 'x' is unknown"),
    ],
)
def test_errors_name_what_was_found(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_objectives_are_deterministic() -> None:
    student, teacher = draw()
    for objective, _ in CASES.values():
        assert np.array_equal(objective(student, teacher).numpy(), objective(student, teacher).numpy())
