"""Single queries behind a mean: where a model won and lost, with the texts; agreement with a teacher's scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.ranking.data.collection import Collection
from structkd.ranking.evaluation.selection import spearman
from structkd.ranking.training.train import Lists
from structkd.runs import Figure, Run, Series
from structkd.trec import Run as RankedRun
from structkd.trec import run_of

SHOWN = 5
"Wins, and losses, in a table."

_LETTERS = 200
_PAIRS = 600
_KEPT = 24  # queries whose scores are kept

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Case:
    """One query under two models.

    Attributes:
        query: its text.
        before: the measure under the first model.
        after: under the second.
        first_before: text of the document that the first model puts first.
        first_after: of the second's.
    """

    query: str
    before: float
    after: float
    first_before: str
    first_after: str


@dataclass(frozen=True)
class Sample:
    """What is kept of a run to show cases.

    Attributes:
        first: query -> the document at the top.
        scores: query -> document -> score, of a few queries.
    """

    first: Mapping[str, str]
    scores: Scores

    @classmethod
    def of(cls, run: RankedRun) -> "Sample":
        """The sample of a run."""
        kept = dict(list(run.lists.items())[:_KEPT])
        return cls(
            {query: documents[0] for query, (documents, _) in run.lists.items() if documents},
            {query: dict(zip(ids, map(float, values), strict=True)) for query, (ids, values) in kept.items()},
        )


def run_of_lists(lists: Lists, scores: NDArray[np.float32]) -> RankedRun:
    """Lists in the order of these scores (flat, in the order of the lists)."""
    pairs = lists.pairs()
    return run_of(pairs.query_ids, pairs.document_ids, scores)


def cases_of(
    collection: Collection,
    before: Mapping[str, float],
    after: Mapping[str, float],
    first_before: Mapping[str, str],
    first_after: Mapping[str, str],
) -> list[Case]:
    """Cases of the queries that both were measured on."""
    queries, documents = collection.queries, collection.documents

    def text(of: Mapping[str, str], query: str) -> str:
        found = of.get(query)
        if found is None or found not in documents.ids:
            return "(no document)" if found is None else f"({found}, not in the collection)"
        return documents.texts[int(documents.ids.rows([found])[0])]

    return [
        Case(
            queries.texts[int(queries.ids.rows([query])[0])], before[query], after[query],
            text(first_before, query), text(first_after, query),
        )
        for query in before
        if query in after
    ]  # fmt: skip


def write_cases(run: Run, name: str, title: str, measure: str, cases: Sequence[Case]) -> None:
    """The table of the largest wins and losses; none when no query changed."""
    ordered = sorted(cases, key=lambda case: (case.before - case.after, case.query))
    wins = [case for case in ordered if case.after > case.before]
    losses = [case for case in reversed(ordered) if case.after < case.before]
    rows = [_row(kind, case, measure) for kind, some in (("win", wins), ("loss", losses)) for case in some[:SHOWN]]
    if rows:
        even = len(cases) - len(wins) - len(losses)
        run.write_table(name, f"{title}: {len(wins)} won, {len(losses)} lost, {even} even", rows)


def _row(kind: str, case: Case, measure: str) -> dict[str, Any]:
    return {
        "outcome": kind,
        "query": _short(case.query),
        f"{measure} before": case.before,
        "after": case.after,
        "first document before": _short(case.first_before),
        "first document after": _short(case.first_after),
    }


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LETTERS else text[:_LETTERS].rsplit(" ", 1)[0] + " ..."


def agreement_figure(teacher: Scores, students: Mapping[str, Scores]) -> Figure:
    """Rank correlation with the teacher's scores, one value a list."""
    series, said = [], []
    for name, scores in students.items():
        values = [spearman(*_columns(teacher[query], scores[query])) for query in teacher if query in scores]
        series.append(Series(name, [], values))
        said.append(f"{name} {np.mean(values):.3f}" if values else name)
    note = f"means over lists: {', '.join(said)}"
    return Figure("histogram", "Agreement with the teacher's order", "Spearman's correlation", "density", series, note)


def margin_figure(teacher: Scores, students: Mapping[str, Scores]) -> Figure:
    """Score differences of document pairs of one list: the student's against the teacher's."""
    series, said = [], []
    for name, scores in students.items():
        theirs, ours = _margins(teacher, scores)
        series.append(Series(name, theirs.tolist(), ours.tolist()))
        said.append(f"{name} {np.mean(theirs * ours > 0):.0%}" if len(theirs) else name)
    note = f"{_PAIRS} pairs of documents at most; ordered as the teacher orders them: {', '.join(said)}"
    return Figure("cloud", "Margins of teacher and student", "teacher", "student", series, note=note)


def _columns(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scores of the documents that both have, in one order."""
    shared = sorted(first.keys() & second.keys())
    return np.asarray([first[one] for one in shared]), np.asarray([second[one] for one in shared])


def _margins(teacher: Scores, student: Scores) -> tuple[NDArray[Any], NDArray[Any]]:
    """Differences over random pairs, teacher's and student's."""
    generator, parts = np.random.default_rng(0), []
    queries = [query for query in teacher if query in student]
    for query in queries:
        scores = np.stack(_columns(teacher[query], student[query]))
        if scores.shape[1] > 1:
            shuffled = generator.permutation(scores.shape[1])
            pairs = max(1, min(_PAIRS // len(queries), scores.shape[1] - 1))
            parts.append((scores[:, shuffled[:-1]] - scores[:, shuffled[1:]])[:, :pairs])
    theirs, ours = np.concatenate(parts, axis=1) if parts else np.empty((2, 0))
    return theirs, ours
