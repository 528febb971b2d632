"""`structkd ranking evaluate`: measure a run or a model, and test it against another."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from structkd.cli.output import Common, Output, Table
from structkd.errors import UsageError
from structkd.files import write_json
from structkd.progress import note
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import Collection, read_qrels
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.evaluation.measures import (
    EvaluateConfig,
    EvaluationResult,
    check_protocol,
    compare,
    evaluate_run,
    parse_measures,
    rank,
)
from structkd.ranking.evaluation.run_folder import write_evaluation
from structkd.ranking.models.prett import PrettScorer
from structkd.ranking.models.prett_store import DocumentStates
from structkd.ranking.models.scorer import NeuralScorer
from structkd.ranking.models.students import load_student
from structkd.runs import plain
from structkd.trec import Run, read_run


def evaluate_command(
    *,
    collection: str,
    model: str | None = None,
    run: Path | None = None,
    baseline: Path | None = None,
    candidates: Path | None = None,
    split: str | None = None,
    qrels: Path | None = None,
    per_query: Path | None = None,
    out: Path | None = None,
    documents: Path | None = None,
    common: Common = Common(),
    config: Annotated[EvaluateConfig, Parameter(name="*")] = EvaluateConfig(),
) -> Output:
    """Measure a run (--run) or a model (--model) with ir-measures, ties broken by document id.

    Args:
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs.
        model: Folder or hub id of a model of any kind; a run folder stands for its student.
        run: TREC run or four-column run.
        baseline: Run that the result is tested against, query by query: randomisation test, t-test, bootstrap.
        candidates: Run that the model re-ranks; BM25's by default.
        split: Judgements to measure with; the test split by default.
        qrels: Judgements of a file in place of the collection's, for example the full ones of a pooled collection.
        per_query: JSON file for the values of each query.
        out: Run folder for the lists, the values of each query, tables, plots and report.html.
        documents: Stored layers of the documents for a prett model, as `ranking encode` writes them.
    """
    if (model is None) == (run is None):
        raise UsageError("give either --run FILE or --model FOLDER.")
    loaded, measures = datasets.load(collection, split), config.protocol or config.measures
    if qrels is not None:
        loaded = replace(loaded, qrels=read_qrels(qrels, loaded.queries.ids))
    if run is not None:
        # a run file is cut as deep as the protocol goes, as a model's own list is
        ranked = read_run(run).cut(config.depth) if config.protocol else read_run(run)
    else:
        parse_measures(measures)  # before hours of scoring
        first_stage = _candidates(loaded, candidates, config)
        scorer = _scorer(str(model), documents)
        ranked = rank(loaded, scorer, mode=config.mode, candidates=first_stage, depth=config.depth)
    result = evaluate_run(loaded, ranked, measures, drop_same_id=config.drop_same_id)
    if per_query is not None:
        write_json(per_query, result.per_query)
    if config.protocol is not None and (said := check_protocol(config.protocol, result)) is not None:
        note(said)
    found: dict[str, Any] = {
        "collection": collection,
        "model": str(model or run),
        "mode": config.mode if run is None else "retrieve",
        "protocol": config.protocol,
        "measures": result.measures,
        "queries": result.queries,
        "missing": result.missing,
        "without_positive": result.without_positive,
        "unjudged": result.unjudged,
    }
    row = {"model": found["model"], **result.measures, "queries": result.queries, "missing": result.missing}
    tables = [Table(f"{loaded.name}: {config.protocol or found['mode']}", [row])]
    compared, tests = None, []
    if baseline is not None:
        beside = read_run(baseline)
        other = evaluate_run(loaded, beside, measures, drop_same_id=config.drop_same_id)
        compared, tests = (beside, other), _tests(other, result)
        found["baseline"] = {"run": str(baseline), "measures": other.measures, "tests": tests}
        tables.append(Table(f"against {baseline}", tests))
    if out is not None:
        settings = {**vars(config), "collection": collection, "model": model, "run": run, "baseline": baseline}
        write_evaluation(out, settings, loaded, (ranked, result), compared, tests, common.seed)
        found["out"] = str(out)
    return Output(found, tables=tables)


def _tests(first: EvaluationResult, second: EvaluationResult) -> list[dict[str, Any]]:
    """One row per measure."""
    return [plain(vars(compare(first, second, name))) for name in second.measures]


def _candidates(loaded: Collection, given: Path | None, config: EvaluateConfig) -> Run | None:
    """The lists to re-rank: those given, else BM25's."""
    if given is not None:
        return read_run(given)
    if config.mode != "rerank":
        return None
    depth = min(config.depth, 100)
    note(f"{loaded.name}: no --candidates; re-ranking BM25's first {depth}")
    return bm25_candidates(loaded, depth)


def _scorer(model: str, documents: Path | None) -> NeuralScorer:
    """The model; a prett model reads its documents' layers from `documents`."""
    scorer = load_student(model)
    if documents is not None:
        if not isinstance(scorer, PrettScorer):
            raise UsageError(f"--documents holds stored layers of a prett model; {model} is of kind {scorer.kind}.")
        scorer.use(DocumentStates(documents))
    return scorer
