"""`structkd ranking self-distill`: bi- and cross-encoders that teach each other without labels."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from structkd.cli.output import Common, Output, Table
from structkd.errors import UsageError
from structkd.index.kinds import open as open_index
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.data.pair_pool import PairPool, gold_of_file, pool_of_collection, pool_of_file, read_pair_file
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.self_distillation.cycles import SelfDistillConfig, SelfDistillResult, self_distill
from structkd.trec import Run, read_run


def self_distill_command(
    *,
    init: tuple[str, ...],
    out: Path,
    pairs: Path | None = None,
    collection: str | None = None,
    index: Path | None = None,
    candidates: Path | None = None,
    split: str | None = None,
    depth: int = 20,
    cross_init: tuple[str, ...] = (),
    dev: Path | None = None,
    exclude: tuple[Path, ...] = (),
    common: Common = Common(),
    config: Annotated[SelfDistillConfig, Parameter(name="*")] = SelfDistillConfig(),
) -> Output:
    """Bi-encoders label unlabelled pairs for cross-encoders, and these for bi-encoders, in cycles (Trans-Encoder).

    Give --pairs (sentence pairs; with --asymmetric query-passage pairs) or --collection (query-passage pairs from a
    first stage). No label is used; with --dev gold scores choose the kept weights, and the output says so.

    Args:
        init: Starting bi-encoder: folder or hub id; several teach each other with averaged labels.
        out: Run folder; an interrupted run continues.
        pairs: Two or three tab-separated columns, a score first when three (it is not used).
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs; its queries and passages make the pairs.
        index: Index folder whose first DEPTH passages of each query make the pairs; BM25 by default.
        candidates: Run whose pairs are taken instead.
        split: Split of the collection whose queries are taken; by default train when there is one, else every query.
        depth: Passages of each query.
        cross_init: Body of the cross-encoder: folder or hub id, once or as often as --init; else the bi-encoder's.
        dev: Three columns, gold score first, on any scale; chooses weights and models.
        exclude: Pairs files whose pairs are kept out of the pool, in either order.
    """
    if (pairs is None) == (collection is None):
        raise UsageError("give either --pairs FILE or --collection DIR.")
    kept_out = [pair for path in exclude for pair in read_pair_file(path).pairs]
    if pairs is not None:
        pool = pool_of_file(pairs, symmetric=not config.asymmetric, exclude=kept_out)
    else:
        config = replace(config, asymmetric=True)
        loaded = _queries(str(collection), split)
        pool = pool_of_collection(loaded, _first_stage(loaded, index, candidates, depth, init), exclude=kept_out)
    gold = None if dev is None else gold_of_file(dev, symmetric=pool.symmetric)
    config = replace(config, seed=common.seed)
    return _output(self_distill(pool, init, config, out=out, cross_inits=cross_init, gold=gold), pool)


def _queries(name: str, split: str | None) -> Collection:
    """The collection with the queries of one split, else of every one: judgements are not looked at."""
    has_splits = Path(name).is_dir() or name in datasets.DATASETS
    if split is None and has_splits:
        split = "train" if "train" in datasets.splits(name) else "all"
    return datasets.load(name, split)


def _first_stage(
    collection: Collection, index: Path | None, candidates: Path | None, depth: int, init: tuple[str, ...]
) -> Run:
    if candidates is not None:
        return read_run(candidates).cut(depth)
    if index is None:
        return bm25_candidates(collection, depth)
    opened: Any = open_index(index)
    texts = list(collection.queries.texts)
    if opened.kind in ("bm25", "lucene"):
        return Run(opened.search(texts, depth).run(list(collection.queries.ids)).lists)
    vectors = BiScorer(init[0]).encode(texts, "query")
    return Run(opened.search(vectors, depth).run(list(collection.queries.ids)).lists)


def _output(result: SelfDistillResult, pool: PairPool) -> Output:
    rows = [asdict(row) for row in result.rows]
    found = {
        "run": str(result.run),
        "selection": result.selection,
        "symmetric": pool.symmetric,
        "pool": result.pool,
        "start": result.start,
        "cycles": rows,
        "best": result.best,
        "asked": result.asked,
        "found": result.found,
    }
    shown = [{key: row[key] for key in ("cycle", "phase", "model", "dev", "seconds")} for row in rows]
    lines = [f"best {kind}-encoder: {folder}" for kind, folder in result.best.items()]
    if result.selection.startswith("gold"):
        lines.append("gold labels chose the kept weights and models: a run without labels would not have these figures")
    return Output(found, tables=[Table(f"Cycles ({result.selection})", shown)], lines=lines)
