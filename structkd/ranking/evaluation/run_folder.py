"""The run folder of an evaluation: measures, values over queries, and wins and losses against a baseline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structkd.files import write_json
from structkd.ranking.data.collection import Collection
from structkd.ranking.evaluation.cases import Sample, cases_of, write_cases
from structkd.ranking.evaluation.measures import EvaluationResult
from structkd.report import finish
from structkd.runs import Figure, Run, Series
from structkd.trec import Run as RankedRun
from structkd.trec import write_run

Measured = tuple[RankedRun, EvaluationResult]


def write_evaluation(
    out: str | Path,
    config: Mapping[str, Any],
    collection: Collection,
    own: Measured,
    baseline: Measured | None = None,
    tests: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> None:
    """Write run.trec, per_query.json, tables, figures and the page.

    Args:
        own: the lists and what they are worth.
        baseline: the same of what they are compared with; `tests` are the paired tests, one a measure.
    """
    ranked, result = own
    run = Run.create(out, "ranking evaluate", config, seed)
    write_run(run.folder / "run.trec", ranked)
    write_json(run.folder / "per_query.json", result.per_query)
    columns = {"this run": result} | ({} if baseline is None else {"baseline": baseline[1]})
    rows = [
        {"run": name, **one.measures, "queries": one.queries, "missing": one.missing} for name, one in columns.items()
    ]
    run.write_table("measures", f"{collection.name}: means over queries", rows)
    measure = next(iter(result.measures))
    series = [Series(name, [], list(one.per_query[measure].values())) for name, one in columns.items()]
    run.write_figure("per-query", Figure("histogram", f"{measure} of single queries", measure, "density", series))
    if baseline is not None:
        run.write_table("tests", "Paired tests against the baseline", tests)
        _against(run, collection, measure, baseline, own)
    finish(run, {"collection": collection.name, "measures": result.measures, "queries": result.queries})


def _against(run: Run, collection: Collection, measure: str, baseline: Measured, own: Measured) -> None:
    """Differences query by query, and the texts of the largest ones."""
    values = baseline[1].per_query[measure], own[1].per_query[measure]
    change = sorted((values[1][query] - values[0][query] for query in values[0]), reverse=True)
    figure = Figure(
        "lines", "Change of each query", "queries, best change first", f"change of {measure}",
        [Series("change", list(range(1, len(change) + 1)), change)],
    )  # fmt: skip
    run.write_figure("changes", figure)
    firsts = [Sample.of(ranked).first for ranked in (baseline[0], own[0])]
    write_cases(
        run, "cases", "Queries that changed most against the baseline", measure, cases_of(collection, *values, *firsts)
    )
