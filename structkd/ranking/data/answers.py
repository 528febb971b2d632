"""Language models as teachers: raw listwise answers ("[2] > [1] > [3]") over windows of a first stage -> an order.

A listwise model is asked about a window of candidates at a time, from the bottom of the list to its top, and each
answer reorders its window before the next is asked (RankGPT, arXiv 2304.09542, section 3.2). An answer has no scores:
what comes out is an order, for objectives that read nothing else (`objectives.ORDER_OBJECTIVES`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from structkd.errors import DataError, UsageError
from structkd.files import read_json
from structkd.trec import Run


@dataclass(frozen=True)
class Answer:
    """One reading of an answer.

    Attributes:
        order: places of the window's candidates, from 0, best first; a permutation whatever was answered.
        exact: whether the answer itself named each candidate once.
        named: how many candidates it named.
    """

    order: list[int]
    exact: bool
    named: int


@dataclass(frozen=True)
class Replay:
    """A first stage after all answers.

    Attributes:
        run: the reordered lists; scores are minus the rank.
        exact: answers that were permutations.
        windows: answers read.
        before: [windows, size], where in its window each candidate stood before the answer, in the answer's order.
        named: [windows, size], whether the answer named it at all.
    """

    run: Run
    exact: int
    windows: int
    before: Int[np.ndarray, "windows size"]
    named: Bool[np.ndarray, "windows size"]


def read_answers(file: str | Path) -> list[str]:
    """A JSON list of answers.

    Raises:
        DataError: anything else.
    """
    found = read_json(Path(file))
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found) or not found:
        raise DataError(f"{file}: expected a JSON list of answers such as '[2] > [1] > [3]'.")
    return found


def read_answer(text: str, size: int) -> Answer:
    """The order that an answer gives to `size` candidates, numbered from 1 in it.

    Numbers in brackets count; where there are none, all numbers do (an answer may begin with "1."). Repeats and numbers
    out of range are dropped, candidates that were not named follow in their old order, as in RankGPT's reference code.
    """
    found = re.findall(r"\[(\d{1,9})\]", text) or re.findall(r"\d{1,9}", text)
    numbers = [int(part) - 1 for part in found]
    named = list(dict.fromkeys(number for number in numbers if 0 <= number < size))
    known = set(named)
    order = named + [place for place in range(size) if place not in known]
    return Answer(order, sorted(numbers) == list(range(size)), len(named))


def replay(first_stage: Run, answers: Sequence[str], *, window: int = 20, step: int = 10, depth: int = 100) -> Replay:
    """The first stage's `depth` first documents of each query, reordered by the answers, query after query.

    Raises:
        UsageError: a window or step that does not fit the depth.
        DataError: another number of answers than there are windows, or a list shorter than a window.
    """
    if not 0 < step <= window <= depth or (depth - window) % step:
        raise UsageError(f"window {window}, step {step}, depth {depth}: the windows do not cover the list.")
    starts = range(depth - window, -1, -step)
    wanted = len(first_stage.lists) * len(starts)
    if len(answers) != wanted:
        raise DataError(
            f"{len(answers)} answers for {len(first_stage.lists)} queries of {len(starts)} windows each; expected "
            f"{wanted}. Was another first stage, window or step asked about?"
        )
    lists, places, named = {}, [], []
    remaining = iter(answers)
    exact = 0
    for query, (documents, _) in first_stage.lists.items():
        order = list(documents[:depth])
        if len(order) < depth:
            raise DataError(f"query {query!r} has {len(order)} documents; the answers were given for {depth}.")
        for start in starts:
            answer = read_answer(next(remaining), window)
            part = order[start : start + window]
            order[start : start + window] = [part[place] for place in answer.order]
            exact += answer.exact
            places.append(answer.order)
            named.append([rank < answer.named for rank in range(window)])
        lists[query] = (order, -np.arange(1.0, len(order) + 1))
    return Replay(Run(lists), exact, len(answers), np.asarray(places), np.asarray(named))


def scores_of(found: Replay) -> Float[np.ndarray, "windows size"]:
    """Minus the rank that each answer gives to the candidate at each place of its window: scores for filters."""
    ranks = np.argsort(found.before, axis=1)
    return -(ranks + 1.0)
