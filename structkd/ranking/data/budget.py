"""Which lists of candidates a teacher is asked about when it may not be asked about all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from structkd import acquisition
from structkd.errors import DataError, UsageError
from structkd.ranking.data.collection import Collection
from structkd.scores.cache import Scorer
from structkd.trec import Run, read_lines


@dataclass(frozen=True)
class BudgetConfig:
    """How many pairs are asked, and which."""

    budget: float | None = None
    "Pairs that the teacher may be asked: a whole number, or a share below 1 of those that are missing."

    policy: Literal["random", "margin", "rad"] = "random"
    "Which lists: by chance, where the student's margin is smallest, or robustly against teacher errors (rad)."

    teacher_accuracy: float | None = None
    "Share of lists that the teacher gets right, from held-out judgements; rad needs it."

    seed: int = 0
    "Of the draws."

    def __post_init__(self) -> None:
        if self.budget is not None and not (0 < self.budget < 1 or (self.budget >= 1 and self.budget % 1 == 0)):
            raise UsageError(f"budget {self.budget}: expected a whole number of pairs, or a share between 0 and 1.")
        if self.policy == "rad" and self.teacher_accuracy is None:
            raise UsageError("policy rad needs --teacher-accuracy, the teacher's on held-out judgements.")


Stored = Callable[[list[str], list[str]], NDArray[np.bool_]]


def within_budget(
    candidates: Run, config: BudgetConfig, collection: Collection, student: Scorer | None, stored: Stored
) -> Run:
    """The candidates' lists that fit the budget, whole lists alone: half a list teaches no order.

    Args:
        candidates: every list.
        config: budget and policy; no budget keeps every list.
        collection: of the candidates.
        student: whose margins count; without one the candidates' own scores do.
        stored: tells which pairs (query ids, document ids) have a score already; they cost nothing.

    Raises:
        UsageError: as the policies of `acquisition`.
    """
    if config.budget is None:
        return candidates
    own = candidates
    if student is not None:
        pairs = collection.pairs_of(candidates)
        values = student.score(pairs).double().numpy()
        ends = np.cumsum([len(documents) for documents, _ in candidates.lists.values()])
        parts = np.split(values, ends[:-1])
        own = Run({name: (found[0], part) for (name, found), part in zip(candidates.lists.items(), parts, strict=True)})
    grid, mask = _grid(own)
    costs = np.asarray(
        [int((~stored([query] * len(documents), documents)).sum()) for query, (documents, _) in own.lists.items()]
    )
    known = costs == 0
    limit = int(config.budget * costs.sum()) if config.budget < 1 else int(config.budget)

    def rows(count: int) -> NDArray[np.int64]:
        generator = np.random.default_rng(config.seed)
        if config.policy == "margin":
            return np.asarray(acquisition.margin(grid, count, mask=mask, known=known))
        if config.policy == "rad":
            accuracy = float(config.teacher_accuracy or 0)
            return np.asarray(
                acquisition.rad(grid, count, teacher_accuracy=accuracy, generator=generator, mask=mask, known=known)
            )
        return np.asarray(acquisition.random(grid, count, generator=generator, known=known))

    chosen = _most(rows, costs, limit, int((~known).sum()))
    keep = set(chosen.tolist()) | set(np.flatnonzero(known).tolist())
    return Run({query: found for row, (query, found) in enumerate(candidates.lists.items()) if row in keep})


def _most(
    rows: Callable[[int], NDArray[np.int64]], costs: NDArray[np.int64], limit: int, open_rows: int
) -> NDArray[np.int64]:
    """The policy's choice of most lists whose missing pairs stay within the limit."""
    low, high = 0, open_rows
    best = np.empty(0, dtype=np.int64)
    while low < high:
        middle = (low + high + 1) // 2
        found = rows(middle)
        if costs[found].sum() <= limit:
            low, best = middle, found
        else:
            high = middle - 1
    return best


def _grid(run: Run) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """[lists, longest] scores and what is there."""
    sizes = [len(documents) for documents, _ in run.lists.values()]
    grid = np.zeros((len(sizes), max(sizes, default=0)))
    mask = np.arange(grid.shape[1])[None, :] < np.asarray(sizes)[:, None]
    for row, (_, scores) in enumerate(run.lists.values()):
        grid[row, : len(scores)] = scores
    return grid, mask


def read_triples(path: str | Path) -> Run:
    """The pairs of a file of `query positive negative` ids, tabs or spaces, as lists without an order of their own.

    Raises:
        DataError: another number of columns, with file and line.
    """
    lists: dict[str, dict[str, None]] = {}
    for number, line in read_lines(path):
        columns = line.split()
        if len(columns) != 3:
            raise DataError(f"{path}:{number}: found {len(columns)} columns, expected 3 (query, positive, negative).")
        lists.setdefault(columns[0], {}).update(dict.fromkeys(columns[1:]))
    return Run({query: (list(own), np.zeros(len(own))) for query, own in lists.items()})


def judged(qrels: Mapping[str, Mapping[str, int]]) -> Run:
    """The judged pairs as lists, by grade."""
    lists = {}
    for query, grades in qrels.items():
        documents = sorted(grades, key=lambda name: (-grades[name], name))
        lists[query] = documents, np.asarray([float(grades[name]) for name in documents])
    return Run(lists)


def union(runs: list[Run]) -> Run:
    """Every pair that one of the runs lists; a pair keeps its first score."""
    lists: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, (documents, scores) in run.lists.items():
            own = lists.setdefault(query, {})
            for document, score in zip(documents, scores.tolist(), strict=True):
                own.setdefault(document, score)
    return Run({query: (list(own), np.asarray(list(own.values()))) for query, own in lists.items()})
