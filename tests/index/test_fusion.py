"""Fusion of runs against the formulas by hand: ranks only, absent documents, ties, invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structkd.errors import DataError, UsageError
from structkd.index.fusion import reciprocal_rank, weighted
from structkd.trec import Run, run_of


def run(**lists: dict[str, float]) -> Run:
    flat = [(query, name, score) for query, scores in lists.items() for name, score in scores.items()]
    queries, names, scores = zip(*flat, strict=True)
    return run_of(queries, names, np.asarray(scores))


ONE = run(q={"a": 9.0, "b": 5.0, "c": 1.0}, only={"x": 2.0})
TWO = run(q={"c": 0.9, "a": 0.5, "d": 0.1})


def scores_of(fused: Run, query: str = "q") -> dict[str, float]:
    names, scores = fused.lists[query]
    return dict(zip(names, scores.tolist(), strict=True))


def test_reciprocal_rank_by_hand() -> None:
    fused = reciprocal_rank([ONE, TWO])
    expected = {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63}
    assert scores_of(fused) == pytest.approx(expected)
    assert fused.lists["q"][0] == ["a", "c", "b", "d"]
    assert scores_of(fused, "only") == pytest.approx({"x": 1 / 61})
    shallow = reciprocal_rank([ONE, TWO], constant=0, weights=[2, 1], depth=1)
    assert scores_of(shallow) == pytest.approx({"a": 2.0, "c": 1.0})


def test_weighted_min_max_by_hand() -> None:
    fused = weighted([ONE, TWO], [0.25, 1.0])
    expected = {"a": 0.25 + 0.5, "b": 0.25 * 0.5, "c": 0 + 1.0, "d": 0.0}
    assert scores_of(fused) == pytest.approx(expected)
    assert fused.lists["q"][0] == ["c", "a", "b", "d"]
    assert scores_of(fused, "only") == {"x": 0.25}


def test_weighted_raw_and_z_scores_by_hand() -> None:
    raw = scores_of(weighted([ONE, TWO], [1, 10], normalise="none"))
    assert raw == pytest.approx({"a": 9 + 5, "b": 5 + 1, "c": 1 + 9, "d": 1 + 1})
    first = {name: (score - 5) / np.std([9, 5, 1]) for name, score in {"a": 9, "b": 5, "c": 1, "d": 1}.items()}
    second = {
        name: (score - 0.5) / np.std([0.9, 0.5, 0.1])
        for name, score in {"c": 0.9, "a": 0.5, "d": 0.1, "b": 0.1}.items()
    }
    assert scores_of(weighted([ONE, TWO], normalise="z-score")) == pytest.approx(
        {name: first[name] + second[name] for name in first}
    )


def test_equal_sums_follow_the_tie_rule() -> None:
    fused = reciprocal_rank([run(q={"b": 2.0, "a": 1.0}), run(q={"a": 2.0, "b": 1.0})])
    assert fused.lists["q"][0] == ["a", "b"]


SCORES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(-50, 50).map(float), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0.1, 20), st.floats(-100, 100))
def test_invariances(lists: list[dict[str, float]], scale: float, shift: float) -> None:
    runs = [run(q=scores) for scores in lists]
    moved = [run(q={name: score * scale + shift for name, score in scores.items()}) for scores in lists]
    assert scores_of(reciprocal_rank(runs)) == scores_of(reciprocal_rank(moved))
    for normalise in ("min-max", "z-score"):
        assert scores_of(weighted(moved, normalise=normalise)) == pytest.approx(
            scores_of(weighted(runs, normalise=normalise)), abs=1e-9
        )
    assert scores_of(weighted(runs[::-1])) == pytest.approx(scores_of(weighted(runs)))
    assert reciprocal_rank(runs[:1]).lists["q"][0] == runs[0].lists["q"][0]
    assert weighted(runs[:1], normalise="none").lists["q"][0] == runs[0].lists["q"][0]


def test_bad_calls() -> None:
    with pytest.raises(UsageError, match="found no runs to fuse"):
        reciprocal_rank([])
    with pytest.raises(UsageError, match="found 1 weights for 2 runs"):
        weighted([ONE, TWO], [1.0])
    with pytest.raises(UsageError, match="expected finite numbers"):
        weighted([ONE], [float("nan")])
    with pytest.raises(UsageError, match=r"constant is -1"):
        reciprocal_rank([ONE], constant=-1)
    with pytest.raises(UsageError, match="normalise 'softmax' is unknown; expected one of min-max, z-score, none"):
        weighted([ONE], normalise="softmax")
    endless = Run({"q": (["a"], np.asarray([np.inf]))})
    with pytest.raises(DataError, match="run 2: a score is not finite"):
        weighted([ONE, endless])


def test_a_depth_below_one_is_refused() -> None:
    for fuse in (reciprocal_rank, weighted):
        with pytest.raises(UsageError, match="depth is 0; expected a whole number of at least 1"):
            fuse([Run({"q": (["a"], np.ones(1))})], depth=0)
