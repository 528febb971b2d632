"""`structkd ranking bench`: tables over collections, students, objectives and seeds."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from structkd.cli.output import Common, Output, Table
from structkd.ranking.bench import BenchConfig, bench
from structkd.ranking.distillation import DistillConfig
from structkd.ranking.teachers.sources import Combine
from structkd.ranking.training.policies import NO_POLICIES, Policies

_LOOP = DistillConfig(epochs=2, held_out=0.0, validate_on="none")


def bench_command(
    *,
    collection: tuple[str, ...],
    teacher: tuple[str, ...],
    out: Path,
    student_kind: Annotated[tuple[str, ...], Parameter(name="--student")] = ("dot",),
    objective: tuple[str, ...] = ("margin-mse", "kl", "plackett-luce"),
    seeds: tuple[int, ...] = (0,),
    init: str | None = None,
    depth: int = 16,
    train_queries: int = 64,
    test_queries: int = 100,
    max_length: int | None = 128,
    measure: str = "nDCG@10",
    retrieve: bool = False,
    combine: Combine = "z-mean",
    epochs: int = _LOOP.epochs,
    batch_lists: int = _LOOP.batch_lists,
    learning_rate: float = _LOOP.learning_rate,
    common: Common = Common(),
    policies: Annotated[Policies, Parameter(name="*")] = NO_POLICIES,
) -> Output:
    """Compare students and objectives; finished cells are read back, teachers are asked once.

    Args:
        collection: TEST or TEST,TRAIN (repeat the flag): folders in BEIR layout, ir_datasets:ID or pydocs. Without
            TRAIN the train split trains, or half of the queries where there is none.
        teacher: cross-encoder:MODEL, bi-encoder:MODEL or bm25; several joined by + are one ensemble.
        out: Run folder; scores, cells, tables and figures go there.
        student_kind: dot, colbert, prett, tk, cat, static.
        objective: Objectives; the others are tested against the first.
        seeds: Seeds of students, batches and dropout.
        init: Starting weights of students that need some.
        depth: BM25 candidates of each query, trained on and re-ranked.
        train_queries: Most training queries.
        test_queries: Most test queries with a relevant document.
        max_length: Tokens of a text.
        measure: What is measured.
        retrieve: Search all documents as well, with students that have vectors.
        combine: How several teachers become one.
        epochs: Passes over all pairs.
        batch_lists: Lists in a step.
        learning_rate: Peak learning rate; 0: what suits the student.
    """
    loop = DistillConfig(
        epochs=epochs, batch_lists=batch_lists, learning_rate=learning_rate, held_out=0.0, validate_on="none"
    )
    config = BenchConfig(
        collections=collection,
        teachers=teacher,
        students=student_kind,
        objectives=objective,
        seeds=seeds,
        init=init,
        depth=depth,
        train_queries=train_queries,
        test_queries=test_queries,
        max_length=max_length,
        measure=measure,
        retrieve=retrieve,
        combine=combine,
        distill=loop,
        policies=policies,
    )
    found = bench(config, out)
    tables = [Table(f"{measure}, re-ranking BM25's first {depth}", found["rows"])]
    return Output(found, [*tables, Table("Cost of serving", found["frontier"])])
