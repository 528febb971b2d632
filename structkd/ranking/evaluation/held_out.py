"""Held-out lists under the student before and after it learned: what the report of a distillation shows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from structkd.ranking.data.collection import Collection
from structkd.ranking.evaluation.cases import (
    Sample,
    agreement_figure,
    cases_of,
    margin_figure,
    run_of_lists,
    write_cases,
)
from structkd.ranking.models.scorer import NeuralScorer
from structkd.ranking.teachers.teacher import ndcg_each
from structkd.ranking.training.train import Lists
from structkd.runs import Figure, Run, Series


@dataclass(frozen=True)
class HeldOut:
    """Some held-out lists and the untrained student's scores of them, to be shown beside the trained one's."""

    lists: Lists
    before: NDArray[np.float32]

    @classmethod
    def of(cls, held: Lists, student: NeuralScorer, most: int = 64) -> "HeldOut | None":
        """None without held-out lists."""
        lists = held.take(range(min(len(held), most)))
        return cls(lists, student.score(lists.pairs()).numpy()) if len(lists) else None

    def write(self, run: Run, student: NeuralScorer, collection: Collection, valid: Lists, measure: str) -> None:
        """Scores, agreement and margins against the teacher, and the queries that changed most."""
        after = student.score(self.lists.pairs()).numpy()
        teacher, *pupils = (run_of_lists(self.lists, one) for one in (self.lists.targets, self.before, after))
        wanted = Sample.of(teacher).scores
        samples = {name: Sample.of(one) for name, one in zip(("before", "after"), pupils, strict=True)}
        known = {name: sample.scores for name, sample in samples.items()}
        run.write_figure("agreement", agreement_figure(wanted, known))
        run.write_figure("margins", margin_figure(wanted, known))
        series = [
            Series(name, [], _standard(one))
            for name, one in (("teacher", self.lists.targets), ("before", self.before), ("after", after))
        ]
        title = "Scores on held-out lists (standardised)"
        run.write_figure("scores", Figure("histogram", title, "score", "density", series))
        if len(valid):
            judged = valid.take(range(len(self.lists)))
            ids = judged.queries.ids.strings(judged.query_rows.tolist())
            before, now = (dict(zip(ids, ndcg_each(one, judged), strict=True)) for one in (self.before, after))
            cases = cases_of(collection, before, now, samples["before"].first, samples["after"].first)
            write_cases(run, "cases", "Held-out queries that changed most", measure, cases)


def _standard(scores: NDArray[np.float32]) -> list[float]:
    values = scores.astype(np.float64)
    deviation = values.std() or 1.0
    return [float(value) for value in (values - values.mean()) / deviation]
