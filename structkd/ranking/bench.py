"""Compare students and objectives over collections and seeds; teachers answer once, through one score cache.

A folder holds `scores/KEY` (teacher caches), `results/KEY.json` (one finished cell: one student, objective and seed on
one collection, with its value for each query) and the run's own files. Keys are fingerprints of everything that decides
the content, so an interrupted comparison continues with the cell that is missing.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import UsageError
from structkd.files import read_json, write_json
from structkd.ids import fingerprint_json
from structkd.progress import note, track
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import Collection, hold_out
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.distillation import DistillConfig, distill, parse_objective
from structkd.ranking.evaluation.cases import Sample, agreement_figure, cases_of, margin_figure, write_cases
from structkd.ranking.evaluation.frontier import cost_of
from structkd.ranking.evaluation.measures import Encoder, PairScorer, evaluate_run, paired, rerank, retrieve
from structkd.ranking.models.encoders import NeuralScorer, student, weights_sha256
from structkd.ranking.models.students import STUDENTS
from structkd.ranking.teachers.sources import Combine, EnsembleScorer, open_teacher
from structkd.ranking.training.policies import NO_POLICIES, Policies
from structkd.report import finish
from structkd.runs import Figure, Run, Series, plain
from structkd.scores.cache import CachedScorer, Scorer
from structkd.scores.provenance import keep_teachers, teacher_rows
from structkd.trec import Run as RankedRun

PerQuery = Mapping[str, float]

_LAYOUT = 2  # of a kept cell; cells of another layout are made anew
_FROM_NOTHING = ("static", "tk")  # students that are compared without starting weights


@dataclass(frozen=True)
class BenchConfig:
    """A comparison."""

    collections: tuple[str, ...]
    """TEST or TEST,TRAIN: what is measured on, and where the training queries come from. Without TRAIN these are the
    train split, or half of the queries where there is none (their judgements are not used)."""

    teachers: tuple[str, ...]
    "cross-encoder:MODEL, bi-encoder:MODEL, bm25; several joined by + are one ensemble."

    students: tuple[str, ...] = ("dot",)
    "Kinds of students."

    objectives: tuple[str, ...] = ("margin-mse", "kl", "plackett-luce")
    "Objectives; the others are tested against the first."

    seeds: tuple[int, ...] = (0,)
    "Seeds of students, batches and dropout."

    init: str | None = None
    "Starting weights of students that need some: folder or hub id."

    depth: int = 16
    "BM25 candidates of each query, trained on and re-ranked."

    train_queries: int = 64
    "Most training queries."

    test_queries: int = 100
    "Most test queries with a relevant document."

    max_length: int | None = 128
    "Tokens of a text (a pair for cat)."

    measure: str = "nDCG@10"
    "What is measured."

    retrieve: bool = False
    "Search all documents as well, with students that have vectors."

    combine: Combine = "z-mean"
    "How several teachers become one."

    distill: DistillConfig = field(default_factory=lambda: DistillConfig(epochs=2, held_out=0.0, validate_on="none"))
    "Settings of every distillation."

    policies: Policies = NO_POLICIES
    "What is switched on beside every objective."

    def __post_init__(self) -> None:
        if not (self.collections and self.teachers and self.students and self.objectives and self.seeds):
            raise UsageError("a comparison needs a collection, a teacher, a student, an objective and a seed or more.")
        for objective in self.objectives:
            parse_objective(objective)
        for kind in self.students:  # before a teacher is asked
            if kind not in STUDENTS:
                raise UsageError(f"student {kind!r} is unknown; expected one of {', '.join(STUDENTS)}.")
            if self.init is None and kind not in _FROM_NOTHING:
                raise UsageError(f"student {kind!r} needs starting weights: give --init with a folder or hub id.")
        if min(self.depth, self.train_queries, self.test_queries) < 1:
            raise UsageError(
                "expected depth, train_queries and test_queries of 1 or more; found "
                f"{self.depth}, {self.train_queries}, {self.test_queries}."
            )
        for name in ("collections", "teachers", "students", "objectives", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise UsageError(f"{name} {', '.join(map(str, values))}: one is named twice.")


def bench(config: BenchConfig, out: str | Path) -> dict[str, Any]:
    """Run every cell that is not finished, and draw the table of all.

    Returns:
        rows (one per collection, teacher, student and objective: means over seeds before and after, the teacher's and
        BM25's value, the share of the gap between student and teacher that was recovered, the p-values of a paired
        test over queries against the student before and against the first objective), frontier (queries per second
        and bytes per document), asked (pairs that a teacher was asked for by this call), out.

    Raises:
        UsageError: unknown names, or a student without starting weights.
        DataError: a collection without judged queries or lists.
    """
    folder = Path(out)
    run = Run.create(folder, "ranking bench", config)
    rows, frontier, asked = [], [], 0
    done: list[_Cells] = []
    for name in config.collections:
        task = _Task.open(name, config)
        for teacher_name in config.teachers:
            cells = _Cells(config, folder, task, teacher_name)
            for kind in track(list(config.students), f"{task.test.name}, {teacher_name}"):
                rows += cells.rows(kind)
                frontier += cells.costs
                cells.costs = []
            asked += cells.asked
            done.append(cells)
    summary = {"rows": rows, "frontier": frontier, "asked": asked, "out": str(folder)}
    run.write_table("objectives", f"{config.measure}, means over {len(config.seeds)} seeds", rows)
    run.write_table("frontier", "Quality, queries per second, bytes per document", frontier)
    for name, figure in figures(rows, frontier, config.measure).items():
        run.write_figure(name, figure)
    keep_teachers(run, [row for cells in done for row in teacher_rows(cells.teacher)])
    write_shown(run, config, done)
    finish(run, summary)
    return summary


def write_shown(run: Run, config: BenchConfig, done: Sequence["_Cells"]) -> None:
    """Every seed's value; and of the first seed of the first objective: wins and losses, agreement, margins."""
    values: dict[str, list[float]] = {}
    for cells in done:
        place = f"{cells.task.test.name} " if len(config.collections) > 1 else ""
        place += f"{_short(cells.name)} " if len(config.teachers) > 1 else ""
        for (kind, objective), seeds in cells.finished.items():
            values[f"{place}{kind} {objective}"] = [_value(one["after"]) for one in seeds]
        for kind in config.students:
            first, name = cells.finished[kind, config.objectives[0]][0], f"{place}{kind}".replace(" ", "-")
            before, after = (Sample(**first[f"{part}_shown"]) for part in ("before", "after"))
            cases = cases_of(cells.task.test, first["before"], first["after"], before.first, after.first)
            title = f"{place}{kind}, {config.objectives[0]}, before and after"
            write_cases(run, f"cases-{name}", title, config.measure, cases)
            pupils = {"before": before.scores, "after": after.scores}
            for figure_name, draw in (("agreement", agreement_figure), ("margins", margin_figure)):
                figure = draw(cells.teacher_sample.scores, pupils)
                figure = dataclasses.replace(figure, title=f"{figure.title}: {place}{kind}")
                run.write_figure(f"{figure_name}-{name}", figure)
    names = [name for name, own in values.items() for _ in own]
    series = [Series("seeds", names, [value for own in values.values() for value in own])]
    said = f"{len(config.seeds)} seeds; dots: seeds, bar: 95 % confidence interval of the mean"
    run.write_figure(
        "seeds", Figure("samples", f"{config.measure} over seeds", "student", config.measure, series, said)
    )


@dataclass(frozen=True)
class _Task:
    """What is trained on and measured on."""

    train: Collection
    train_lists: RankedRun
    test: Collection
    test_lists: RankedRun

    @classmethod
    def open(cls, name: str, config: BenchConfig) -> "_Task":
        """Queries that are measured never train: another split, another collection, or the other half."""
        test_name, _, train_name = name.partition(",")
        test = datasets.load(test_name)
        judged = [query for query in test.queries.ids if test.positives(query)]
        if train_name:
            train = datasets.load(train_name, "train" if "train" in datasets.splits(train_name) else None)
        elif "train" in datasets.splits(test_name):
            train = datasets.load(test_name, "train")
        else:
            chosen, judged = hold_out(judged, 0.5, 0)
            train = test.with_queries(chosen)
        test = test.with_queries(sorted(judged)[: config.test_queries])
        train = dataclasses.replace(
            train.with_queries(list(train.queries.ids)[: config.train_queries]),
            name=test.name,
            qrels=train.qrels if config.policies.reads_judgements else {},
        )
        return cls(train, bm25_candidates(train, config.depth), test, bm25_candidates(test, config.depth))

    def fingerprint(self) -> str:
        """Identity of queries, documents and lists."""
        parts = [part.ids.fingerprint() for part in (self.train.queries, self.test.queries, self.test.documents)]
        return fingerprint_json([*parts, [self.train_lists.pairs()[1], self.test_lists.pairs()[1]], self.train.name])


class _Cells:
    """All students of one teacher on one collection."""

    def __init__(self, config: BenchConfig, folder: Path, task: _Task, teacher: str) -> None:
        self.config, self.folder, self.task, self.name = config, folder, task, teacher
        members = [open_teacher(part, task.train.documents) for part in teacher.split("+")]
        self.cached = [CachedScorer(one, folder / "scores" / one.spec.fingerprint[:16]) for one in members]
        self.teacher: Scorer = self.cached[0] if len(members) == 1 else EnsembleScorer(self.cached, config.combine)
        self.key = [task.fingerprint(), self.teacher.spec.fingerprint, config.measure, config.max_length, _LAYOUT]
        self.costs: list[dict[str, Any]] = []
        self.finished: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.teacher_sample = Sample({}, {})

    @property
    def asked(self) -> int:
        """Pairs that were not in a cache."""
        return sum(one.asked for one in self.cached)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """One row per objective."""
        bm25 = self._measured(self.task.test_lists)
        asked = self._kept(["teacher"], lambda: self._judged(self._test_teacher(), "rerank"))
        teacher, self.teacher_sample = asked["rerank"], Sample(**asked["rerank_shown"])
        rows = []
        first: PerQuery = {}
        for objective in self.config.objectives:
            done = self.finished[kind, objective] = [self._cell(kind, objective, seed) for seed in self.config.seeds]
            before, after = _mean([one["before"] for one in done]), _mean([one["after"] for one in done])
            first = first or after
            rows.append(self._row(kind, objective, done, before, after, teacher, bm25) | _against(first, after))
        return rows

    def _row(
        self,
        kind: str,
        objective: str,
        done: Sequence[Mapping[str, Any]],
        before: PerQuery,
        after: PerQuery,
        teacher: PerQuery,
        bm25: PerQuery,
    ) -> dict[str, Any]:
        test, seeds = paired(before, after), [_value(one["after"]) for one in done]
        gap = _value(teacher) - _value(before)
        row = {
            "collection": self.task.test.name,
            "teacher": _short(self.name),
            "student": kind,
            "objective": objective,
            "bm25": _round(_value(bm25)),
            "before": _round(_value(before)),
            "after": _round(_value(after)),
            "sd": _round(float(np.std(seeds, ddof=1))) if len(seeds) > 1 else None,
            "teacher_value": _round(_value(teacher)),
            "recovered": _round((_value(after) - _value(before)) / gap) if gap > 0 else None,
            "p": _round(test.p_value),
            "low": _round(test.low),
            "high": _round(test.high),
            "queries": len(after),
            "seeds": len(seeds),
            "seconds": round(float(np.mean([one["seconds"] for one in done])), 1),
        }
        if all("search_after" in one for one in done):
            found = [_mean([one[name] for one in done]) for name in ("search_before", "search_after")]
            row |= {"search_before": _round(_value(found[0])), "search_after": _round(_value(found[1]))}
            row["search_p"] = _round(paired(*found).p_value)
        return row

    def _cell(self, kind: str, objective: str, seed: int) -> dict[str, Any]:
        """One finished cell, from disk where it is there."""
        config = dataclasses.replace(self.config.distill, objective=objective, seed=seed)
        policies = self.config.policies
        key = [kind, dataclasses.asdict(config), self.config.init, self.config.retrieve]
        key += [dataclasses.asdict(policies)] if policies.active else []

        def make() -> dict[str, Any]:
            note(f"{self.task.test.name}: {kind}, {objective}, seed {seed}")
            scorer, started = self._start(kind, seed), time.process_time()
            before = self._before(scorer)
            result = distill(
                scorer, self.teacher, self.task.train, config, candidates=self.task.train_lists, policies=policies
            )
            scorer = result.student  # a dual head is another module
            seconds = time.process_time() - started
            found = {name.replace("before", "after"): values for name, values in self._values(scorer).items()}
            rate = {"steps": result.metrics["steps"], "pairs_per_second": result.metrics["pairs_per_second"]}
            return (
                before
                | found
                | rate
                | {"seconds": seconds, "cost": cost_of(scorer, self.task.test_lists, self.task.test)}
            )

        made = self._kept(key, make)
        if objective == self.config.objectives[0] and seed == self.config.seeds[0]:
            place = {"collection": self.task.test.name, "student": kind, "objective": objective}
            self.costs.append(place | {self.config.measure: _round(_value(made["after"])), **made["cost"]})
        return made

    def _start(self, kind: str, seed: int) -> NeuralScorer:
        init = None if kind in _FROM_NOTHING else self.config.init
        return student(kind, init, documents=self.task.train.documents, max_length=self.config.max_length, seed=seed)

    def _before(self, scorer: NeuralScorer) -> dict[str, Any]:
        """The untrained student's values, once for all objectives."""
        return self._kept(["before", weights_sha256(scorer), self.config.retrieve], lambda: self._values(scorer))

    def _values(self, scorer: NeuralScorer) -> dict[str, Any]:
        values = self._judged(scorer, "before")
        if self.config.retrieve and isinstance(scorer, Encoder):
            values["search_before"] = self._measured(retrieve(self.task.test, scorer, depth=100))
        return values

    def _test_teacher(self) -> PairScorer:
        """The teacher over the test collection's own documents (BM25 counts words there)."""
        if self.task.test.documents.ids == self.task.train.documents.ids:
            return self.teacher
        members = [open_teacher(part, self.task.test.documents) for part in self.name.split("+")]
        cached = [CachedScorer(one, self.folder / "scores" / one.spec.fingerprint[:16]) for one in members]
        return cached[0] if len(members) == 1 else EnsembleScorer(cached, self.config.combine)

    def _judged(self, scorer: PairScorer, name: str) -> dict[str, Any]:
        """The value of each query, and what the report shows of the lists."""
        run = rerank(self.task.test, scorer, self.task.test_lists, depth=self.config.depth)
        return {name: self._measured(run), f"{name}_shown": plain(Sample.of(run))}

    def _measured(self, run: RankedRun) -> PerQuery:
        found = evaluate_run(self.task.test, run, self.config.measure).per_query
        return dict(next(iter(found.values())))

    def _kept(self, key: Sequence[Any], make: Any) -> dict[str, Any]:
        """The JSON result under this key, made now when it is not there."""
        path = self.folder / "results" / f"{fingerprint_json([self.key, *key])[:20]}.json"
        if not path.is_file():
            write_json(path, make())
        found: dict[str, Any] = read_json(path)
        return found


def figures(
    rows: Sequence[Mapping[str, Any]], frontier: Sequence[Mapping[str, Any]], measure: str
) -> dict[str, Figure]:
    """The share of the gap recovered, and quality against cost."""
    series = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        own = [row for row in rows if row["objective"] == objective and row["recovered"] is not None]
        names = [f"{row['collection']} {row['student']}" for row in own]
        series.append(Series(objective, names, [row["recovered"] for row in own]))
    title = "Share of the gap between student and teacher recovered"
    found = {"recovered": Figure("bars", title, "collection, student", "share", series)}
    for name, column, label in (
        ("latency", "queries_per_second", "queries per second"),
        ("size", "bytes_per_document", "bytes per document"),
    ):
        points = [
            Series(f"{row['collection']} {row['student']}", [max(row[column], 1)], [row[measure]]) for row in frontier
        ]
        found[name] = Figure("scatter", f"{measure} against {label}", label, measure, points, x_log=True)
    return found


def _against(first: PerQuery, after: PerQuery) -> dict[str, Any]:
    """The paired test against the first objective."""
    if first is after:
        return {"p_first": None}
    return {"p_first": _round(paired(first, after).p_value)}


def _mean(values: Sequence[PerQuery]) -> PerQuery:
    """Mean over seeds of each query."""
    return {query: float(np.mean([one[query] for one in values])) for query in values[0]}


def _value(values: PerQuery) -> float:
    return float(np.mean(list(values.values())))


def _round(value: float) -> float:
    return round(value, 4)


def _short(teacher: str) -> str:
    """The teacher without folders."""
    return "+".join(
        f"{kind}:{Path(value).name}" if value else kind
        for kind, _, value in (part.partition(":") for part in teacher.split("+"))
    )
