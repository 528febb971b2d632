"""Figures about stores: what one holds, and how two differ."""

from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import UsageError
from structkd.ordering import tie_rank
from structkd.scores.manifest import ScoreManifest
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.scores.publish import summarise
from structkd.scores.store import open as open_store


def describe(folder: str | Path) -> dict[str, Any]:
    """kind, teacher, fingerprint, rows, queries, dtype, bytes, bytes_per_row, stats, notes of a store.

    `bytes` is what a reader maps (or loads, from a published folder): snapshot files and parts newer than them.
    """
    store = open_store(folder)
    rows, queries, stats = summarise(store)
    size = data_bytes(Path(folder), store)
    return {
        "kind": store.spec.kind,
        "teacher": store.spec.fields(),
        "fingerprint": store.spec.fingerprint,
        "rows": rows,
        "queries": queries,
        "dtype": store.dtype,
        "bytes": size,
        "bytes_per_row": size / rows if rows else 0.0,
        "stats": stats,
        "quant_error": store.manifest.quant_error if store.manifest else {"max": 0.0, "rms": 0.0},
        "provenance": store.manifest.provenance if store.manifest else {},
        "notes": store.manifest.notes if store.manifest else [],
    }


def data_bytes(folder: Path, store: PairScores | NodeScores) -> int:
    """Bytes of the data files of the newest manifest and of the parts that it does not name."""
    manifest: ScoreManifest | None = store.manifest
    files = [entry for entry in manifest.files if entry["path"].startswith("data/")] if manifest else []
    named = manifest.units if manifest else set()
    newer = [path for path in (folder / "parts").glob("*.parquet") if path.stem not in named]
    return sum(int(entry["bytes"]) for entry in files) + sum(path.stat().st_size for path in newer)


def compare(first: PairScores | NodeScores, second: PairScores | NodeScores) -> dict[str, Any]:
    """How two stores differ: pairs that only one has, differences and correlation of the others, agreement of orders.

    Returns:
        only_first, only_second, common, max_difference, mean_difference, pearson, same_best (share of the common lists
        whose best document agrees) and teacher_fields (differing ones: [first, second]).
    """
    if isinstance(first, NodeScores) or isinstance(second, NodeScores):
        if not (isinstance(first, NodeScores) and isinstance(second, NodeScores)):
            raise UsageError("diff: one store holds pairs, the other nodes.")
        return _fields(first, second) | _compare_nodes(first, second)
    return _fields(first, second) | _compare_pairs(first, second)


def _fields(first: PairScores | NodeScores, second: PairScores | NodeScores) -> dict[str, Any]:
    one, other = first.spec.fields(), second.spec.fields()
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return {"teacher_fields": {name: [one.get(name), other.get(name)] for name in names}}


def _compare_nodes(first: NodeScores, second: NodeScores) -> dict[str, Any]:
    if first.logits.shape != second.logits.shape:
        raise UsageError(f"diff: logits of shape {first.logits.shape} and {second.logits.shape}.")
    out = _differences(first.logits.reshape(-1), second.logits.reshape(-1))
    same = first.logits.argmax(1) == second.logits.argmax(1)
    return (
        {"common": len(first), "same_graph": first.graph_fingerprint == second.graph_fingerprint}
        | out
        | {"same_best": float(same.mean())}
    )


def _compare_pairs(first: PairScores, second: PairScores) -> dict[str, Any]:
    queries, documents, scores = first.pairs()
    others = second.lookup(queries, documents, missing="nan")
    both = ~np.isnan(others)
    total = len(second.rows()[0])
    out = {"only_first": int((~both).sum()), "only_second": int(total - both.sum()), "common": int(both.sum())}
    if not both.any():
        return out
    names = np.asarray(queries, dtype=object)[both]
    ranks = tie_rank(sorted(set(documents)))[np.searchsorted(sorted(set(documents)), np.asarray(documents)[both])]
    best = [_best(names, values, ranks) for values in (scores[both], others[both])]
    agree = float(np.mean([best[0][query] == best[1][query] for query in best[0]]))
    return out | _differences(scores[both], others[both]) | {"same_best": agree}


def _best(queries: np.ndarray, scores: np.ndarray, ranks: np.ndarray) -> dict[str, int]:
    """Query -> rank of its best document by the tie rule."""
    found: dict[str, tuple[float, int]] = {}
    for query, score, rank in zip(queries.tolist(), scores.tolist(), ranks.tolist(), strict=True):
        if query not in found or (-score, rank) < found[query]:
            found[query] = (-score, rank)
    return {query: rank for query, (_, rank) in found.items()}


def _differences(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    delta = np.abs(one.astype(np.float64) - other)
    constant = one.std() == 0 or other.std() == 0
    return {
        "max_difference": float(delta.max()),
        "mean_difference": float(delta.mean()),
        "pearson": None if constant else float(np.corrcoef(one, other)[0, 1]),
    }
