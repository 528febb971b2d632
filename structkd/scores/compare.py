"""Figures about stores: what one holds, and how two differ."""

from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import UsageError
from structkd.ordering import tie_rank
from structkd.progress import track
from structkd.scores.layout.snapshot import newer_parts
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
    size = data_bytes(store.folder, store)
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
    newer = [folder / "parts" / f"{name}.parquet" for name in newer_parts(folder, manifest)]
    return sum(int(entry["bytes"]) for entry in files) + sum(path.stat().st_size for path in newer)


def compare(first: PairScores | NodeScores, second: PairScores | NodeScores) -> dict[str, Any]:
    """How two stores differ: pairs that only one has, differences and correlation of the others, agreement of orders.

    Returns:
        only_first, only_second, common, max_difference, mean_difference, pearson, same_best (share of the common lists
        whose best document agrees), kendall_tau (tau-b, mean over the lists that both order), overlap_at_10 (shared
        share of the ten best, mean over lists), margins (mean and deviation of best minus other score in each store,
        their correlation and mean absolute difference) and teacher_fields (differing ones: [first, second]).
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
    found = out | _differences(scores[both], others[both]) | {"same_best": agree}
    return found | _orders(names, scores[both].astype(np.float64), others[both].astype(np.float64), ranks)


def _orders(queries: np.ndarray, one: np.ndarray, other: np.ndarray, ranks: np.ndarray) -> dict[str, Any]:
    """Agreement list by list; `queries` names the list of each pair."""
    _, lists = np.unique(queries.astype(str), return_inverse=True)
    order = np.argsort(lists, kind="stable")
    taus, overlaps, margins = [], [], []
    parts = np.split(order, np.flatnonzero(np.diff(lists[order])) + 1)
    for at in track(parts, "comparing lists", late=True):
        if len(at) < 2:
            continue
        tau = kendall_tau(one[at], other[at])
        taus += [] if tau is None else [tau]
        best = [set(at[np.lexsort((ranks[at], -scores[at]))[:10]].tolist()) for scores in (one, other)]
        overlaps.append(len(best[0] & best[1]) / len(best[0]))
        top = at[np.lexsort((ranks[at], -one[at]))[0]]  # both margins against one document, or they compare nothing
        rest = at[at != top]
        margins.append(np.stack([one[top] - one[rest], other[top] - other[rest]]))
    if not overlaps:
        return {"kendall_tau": None, "overlap_at_10": None, "margins": {}}
    both = np.concatenate(margins, axis=1)
    constant = bool((both.std(axis=1) == 0).any())
    return {
        "kendall_tau": float(np.mean(taus)) if taus else None,
        "overlap_at_10": float(np.mean(overlaps)),
        "margins": {
            "first_mean": float(both[0].mean()),
            "first_std": float(both[0].std()),
            "second_mean": float(both[1].mean()),
            "second_std": float(both[1].std()),
            "pearson": None if constant else float(np.corrcoef(both)[0, 1]),
            "mean_difference": float(np.abs(both[0] - both[1]).mean()),
        },
    }


def kendall_tau(one: np.ndarray, other: np.ndarray) -> float | None:
    """tau-b of two score vectors: (concordant - discordant) / sqrt of the pairs untied in each; None when all tie.

    Row by row, so a list of a thousand takes a thousand steps and no square of memory.
    """
    agreed, untied = 0.0, [0, 0]
    for i in range(len(one) - 1):
        first, second = np.sign(one[i + 1 :] - one[i]), np.sign(other[i + 1 :] - other[i])
        agreed += float((first * second).sum())
        untied = [untied[0] + int((first != 0).sum()), untied[1] + int((second != 0).sum())]
    return None if 0 in untied else agreed / float(np.sqrt(untied[0] * untied[1]))


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
