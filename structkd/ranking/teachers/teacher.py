"""Teachers: teach a cross-encoder from judgements, and fill a score cache with what a teacher says of given pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from structkd.errors import DataError
from structkd.files import write_json
from structkd.ids import Pairs, fingerprint_json
from structkd.ordering import order, tie_rank
from structkd.progress import note
from structkd.ranking.data.collection import Collection, hold_out
from structkd.ranking.data.negatives import MineConfig, bm25_candidates, labelled_lists, mine
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.scorer import weights_sha256
from structkd.ranking.training.losses import LOSSES
from structkd.ranking.training.train import (
    Batch,
    FitConfig,
    FitResult,
    Lists,
    clear_checkpoint,
    fit,
    kept_result,
    lists_of,
    main_process,
    scored_grid,
)
from structkd.report import finish
from structkd.runs import Figure, Run, Series, plain
from structkd.scores.cache import CachedScorer, Scorer
from structkd.trec import Run as RankedRun


@dataclass(frozen=True)
class TeacherConfig(FitConfig):
    """How a cross-encoder is taught from judgements."""

    loss: Literal["ranknet", "pointwise", "listwise"] = "ranknet"
    "Loss on the labels; ranknet is the paper's."

    negatives: int = 3
    "Negatives beside the positive in each list."

    negative_depth: int = 100
    "Candidates of the first stage that negatives are drawn from."

    negative_skip: int = 0
    "Candidates at the top that are never negatives."

    max_length: int | None = 256
    "Tokens of query and document together."

    held_out: float = 0.1
    "Share of the judged queries that choose the checkpoint instead of being trained on."

    valid_depth: int = 20
    "Candidates re-ranked per held-out query."

    learning_rate: float = 2e-5
    "Peak learning rate (Adam)."

    epochs: int = 2
    "Passes over all pairs."


@dataclass(frozen=True)
class TeachResult:
    """A taught teacher.

    Attributes:
        teacher: the scorer, with the weights of the best validation.
        history: what the loop logged.
        metrics: held-out nDCG@10 before and after, steps, pairs per second.
        folder: where the model was saved, None when nowhere.
    """

    teacher: CrossScorer
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    folder: Path | None


def teach(
    collection: Collection,
    config: TeacherConfig = TeacherConfig(),
    *,
    init: str | Path | CrossScorer,
    candidates: RankedRun | None = None,
    out: str | Path | None = None,
) -> TeachResult:
    """Teach a cross-encoder on (query, positive, negatives) lists from the collection's judgements.

    Negatives are drawn from the first stage (BM25 unless `candidates` is given); judged positives and their copies are
    never negatives. A share of the judged queries is held out to choose the checkpoint. With `out` the run can be
    killed and started again, and a finished run with the same inputs is returned as it is.

    Raises:
        DataError: no query has both a positive and a negative.
        UsageError: a setting out of range; `out` holds another training.
    """
    scorer = (
        init if isinstance(init, CrossScorer) else CrossScorer(init, max_length=config.max_length, seed=config.seed)
    )
    judged = [query for query in collection.queries.ids if collection.positives(query)]
    training, held = hold_out(judged, config.held_out, config.seed)
    first_stage = candidates or bm25_candidates(collection.with_queries(judged), config.negative_depth)
    lists = _labelled(collection.with_queries(training), first_stage, config)
    if not len(lists):
        raise DataError(f"{collection.name}: no query has a judged document and a negative. Teach on another split.")
    valid = labelled_candidates(collection, first_stage, held, config.valid_depth)
    inputs = [plain(config), lists.fingerprint(), valid.fingerprint(), weights_sha256(scorer)]
    identity = fingerprint_json(inputs)
    if out is not None and (done := _finished(Path(out), identity)) is not None:
        return done
    run = None if out is None else Run.create(out, "ranking teach", config, config.seed)
    loss = LOSSES[config.loss]

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return loss(scored_grid(model, batch), batch.targets, batch.mask)

    validate = (lambda: mean_ndcg(scorer, valid)) if len(valid) else None
    result = fit(scorer, lists, loss_of, config, validate=validate, run=run)
    metrics = _metrics(result, "nDCG@10 held out")
    folder = None
    if run is not None:
        folder = run.folder / "teacher"
    if run is not None and folder is not None and main_process():
        scorer.save(folder)
        clear_checkpoint(run)
        run.write_figure("training", training_figure(result, "nDCG@10 held out"))
        finish(run, metrics)
        write_json(run.folder / "teach.json", {"identity": identity, "history": result.history})
    return TeachResult(scorer, result.history, metrics, folder)


def score_pairs(teacher: Scorer, pairs: Pairs, store: str | Path, *, unit_rows: int = 1024) -> CachedScorer:
    """Fill the cache in `store` with the teacher's scores of these pairs; what is there already is not asked again.

    Scores are committed in units, so a killed run continues with the units that are missing. The returned scorer
    says how many pairs were `asked` and `found`.

    Raises:
        TeacherMismatchError: the folder holds another teacher's scores.
    """
    cached = CachedScorer(teacher, store, unit_rows=unit_rows)
    cached.score(pairs)
    if cached.found:
        note(f"{store}: {cached.found} scores were there, {cached.asked} were asked of {teacher.spec.model}")
    return cached


def labelled_candidates(collection: Collection, candidates: RankedRun, query_ids: list[str], depth: int) -> Lists:
    """Lists of the first `depth` candidates and every positive, with grades as targets, to validate on."""
    lists, grades = [], []
    for query in query_ids:
        positives = collection.positives(query)
        listed = [*candidates.lists.get(query, ([], None))[0][:depth], *positives]
        documents = list(dict.fromkeys(listed))
        if not positives or len(documents) < 2:
            continue
        rows = collection.documents.ids.rows(documents, f"{collection.name}: candidates")
        lists.append((int(collection.queries.ids.rows([query])[0]), rows))
        judged = collection.qrels[query]
        grades.append(np.asarray([max(0, judged.get(document, 0)) for document in documents], dtype=np.float32))
    return lists_of(collection.queries, collection.documents, lists, np.concatenate(grades) if grades else None)


def mean_ndcg(scorer: Scorer, lists: Lists, cutoff: int = 10) -> float:
    """Mean nDCG@cutoff of a scorer on lists whose targets are grades (linear gain; the one tie rule)."""
    scores = scorer.score(lists.pairs()).numpy()
    return ndcg_of(scores, lists, cutoff)


def ndcg_of(scores: NDArray[np.float32], lists: Lists, cutoff: int = 10) -> float:
    """`mean_ndcg` of scores that are there already, flat in the order of the lists."""
    values = ndcg_each(scores, lists, cutoff)
    return float(np.mean(values)) if values else 0.0


def ndcg_each(scores: NDArray[np.float32], lists: Lists, cutoff: int = 10) -> list[float]:
    """nDCG@cutoff of each list; a list without a positive grade counts 0."""
    ties = tie_rank(lists.documents.ids)[lists.document_rows]
    discount = 1 / np.log2(np.arange(2, cutoff + 2))
    values = []
    for low, high in zip(lists.offsets[:-1], lists.offsets[1:], strict=True):
        grades = lists.targets[low:high]
        ranked = grades[order(scores[low:high], ties[low:high])][:cutoff]
        ideal = np.sort(grades)[::-1][:cutoff]
        best = float((ideal * discount[: len(ideal)]).sum())
        values.append(float((ranked * discount[: len(ranked)]).sum()) / best if best > 0 else 0.0)
    return values


def training_figure(result: FitResult, measure: str) -> Figure:
    """Loss and validation over steps."""
    losses = [(row["step"], row["loss"]) for row in result.history if "loss" in row]
    valid = [(row["step"], row["valid"]) for row in result.history if "valid" in row]
    series = [Series("loss", [x for x, _ in losses], [y for _, y in losses])]
    if valid:
        series.append(Series(measure, [x for x, _ in valid], [y for _, y in valid]))
    return Figure("lines", "Training", "step", "value", series)


def _labelled(collection: Collection, candidates: RankedRun, config: TeacherConfig) -> Lists:
    """The training lists."""
    most = max([len(collection.positives(query)) for query in collection.queries.ids], default=1)
    mining = MineConfig(
        per_query=config.negatives * min(most, 8),
        skip=config.negative_skip,
        depth=config.negative_depth,
        seed=config.seed,
    )
    lists, labels = labelled_lists(collection, mine(collection, candidates, mining), config.negatives)
    return lists_of(collection.queries, collection.documents, lists, labels)


def _finished(folder: Path, identity: str) -> TeachResult | None:
    """The result of a finished run with the same inputs; UsageError when the folder holds another one's."""
    what = "training with other settings, judgements or starting weights"
    if (kept := kept_result(folder / "teach.json", identity, what)) is None:
        return None
    summary = Run.open(folder).info["summary"]
    return TeachResult(CrossScorer(folder / "teacher"), kept["history"], summary, folder / "teacher")


def _metrics(result: FitResult, measure: str) -> dict[str, Any]:
    first = next((row["valid"] for row in result.history if "valid" in row), None)
    return {
        "steps": result.steps,
        "pairs_per_second": round(result.pairs_per_second, 2),
        "best_step": result.best_step,
        "before": None if first is None else {measure: first},
        "after": None if result.best_value is None else {measure: result.best_value},
    }
