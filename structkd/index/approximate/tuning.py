"""How thoroughly an approximate index searches: the cheapest setting that reaches the recall asked for.

The index proposes candidates, best first; the first so many per document asked for are scored exactly (`factor`). So
one look at the index per step of thoroughness tells what every factor would give.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from structkd.ids import Ids
from structkd.index.recall import RecallTest
from structkd.index.topk import TopK, ranked

_LARGEST_LIST = 1024  # of ef_search
_FACTORS = {"nprobe": (1, 2, 4, 8, 16)}  # times the kind's own factor; else that alone


@dataclass(frozen=True)
class Tuned:
    """What was chosen and measured."""

    parameters: dict[str, Any]
    recall: dict[str, Any]


@runtime_checkable
class Tunable(Protocol):
    """An index that can look at more or less of itself."""

    @property
    def ids(self) -> Ids:
        """Document ids in row order."""
        ...

    @property
    def ties(self) -> NDArray[np.int64]:
        """Tie rank of each row's id."""
        ...

    def __len__(self) -> int:
        """How many vectors it holds."""
        ...

    def apply(self, parameters: dict[str, Any]) -> None:
        """Set how much of the index a search looks at."""

    def candidates(self, queries: Tensor, fetch: int) -> tuple[Tensor, Tensor]:
        """Rows [queries, fetch] in the order in which the index proposes them (-1: none), and their exact scores."""
        ...

    def search_prepared(self, queries: Tensor, k: int) -> TopK:
        """The k best, as a search gives them."""
        ...


def tune(index: Tunable, test: RecallTest, start: dict[str, Any], target: float, lists: int) -> Tuned:
    """The cheapest search that reaches the recall by one standard error, or the most thorough one when none does.

    Args:
        index: proposes candidates.
        test: queries and what exact search says to them.
        start: what the engine was built with, with its least thorough search.
        target: recall@10 to reach.
        lists: inverted lists of the engine, 1 when it has none.
    """
    if test.k == 0:
        return Tuned(start, test.says(1.0, target))
    reaching = sorted(_reaching(index, test, start, target, lists), key=lambda trial: _cost(trial, len(index), lists))
    for trial in [*reaching, _most_thorough(start, lists)]:
        index.apply(trial)
        value, error = test.of(index.search_prepared(test.queries, test.places))
        if value - error >= target:
            break
    return Tuned(trial, test.says(value, target))


def _reaching(
    index: Tunable, test: RecallTest, start: dict[str, Any], target: float, lists: int
) -> Iterator[dict[str, Any]]:
    """For each step of thoroughness the smallest factor that reaches the recall, while steps can still be cheaper."""
    name, factors = _dial(start), _factors(start)
    least, cheapest = factors[-1] + 1, float("inf")
    for step in _steps(start, lists):
        trials = [step | {"factor": factor} for factor in factors if factor < least]
        if not trials or _cost(trials[0], len(index), lists) >= cheapest:
            return
        index.apply(trials[-1])
        fetch = min(len(index), (test.places) * trials[-1]["factor"])
        rows, scores = index.candidates(test.queries, fetch)
        for trial in trials:
            width = (test.places) * trial["factor"]
            value, error = test.of(_top(rows[:, :width], scores[:, :width], index, test.places))
            if value - error >= target:
                least, cheapest = trial["factor"], min(cheapest, _cost(trial, len(index), lists))
                yield trial
                break
        if name is None:
            return


def _top(rows: Tensor, scores: Tensor, index: Tunable, k: int) -> TopK:
    best_rows, best_scores, valid = ranked(rows, scores, index.ties, k)
    return TopK(best_rows, best_scores, valid, index.ids)


def _dial(start: dict[str, Any]) -> str | None:
    """The parameter that makes the engine look at more."""
    return next((name for name in ("nprobe", "ef_search") if name in start), None)


def _factors(start: dict[str, Any]) -> list[int]:
    return [int(start["factor"]) * times for times in _FACTORS.get(_dial(start) or "", (1,))]


def _steps(start: dict[str, Any], lists: int) -> Iterator[dict[str, Any]]:
    """Ever more thorough searches, each looking at twice as much."""
    name = _dial(start)
    if name is None:
        yield start
        return
    end, value = lists if name == "nprobe" else _LARGEST_LIST, int(start[name])
    while value <= end:
        yield start | {name: value}
        value *= 2


def _most_thorough(start: dict[str, Any], lists: int) -> dict[str, Any]:
    *_, last = _steps(start, lists)
    return last | {"factor": _factors(start)[-1]}


def _cost(parameters: dict[str, Any], count: int, lists: int) -> float:
    """Microseconds per query, roughly (measured at 384 dimensions): codes read, and candidates fetched and scored.

    A fixed model and not the clock, so that the same build makes the same choice on a busy machine.
    """
    read = parameters.get("nprobe", 0) / lists * count
    per_code = 0.0045 if "PQ" in parameters["factory"] else 0.08
    cost: float = read * per_code + parameters.get("ef_search", 0) + 10 * parameters["factor"]
    return cost
