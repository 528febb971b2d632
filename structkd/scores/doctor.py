"""The scale doctor: what a teacher's scores look like, what is wrong with them, which temperature suits them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.scores.compaction.merge import first_of_each
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores

FloatArray = NDArray[np.float64]
_SAMPLE_LISTS = 2_000
_SPREAD = 4.0  # documents over which a median list's soft-max should spread at the suggested temperature


def examine(store: PairScores | NodeScores) -> dict[str, Any]:
    """Shares of ties, saturated scores and collapsed lists, the soft-max's confidence, a temperature, warnings.

    Returns:
        lists (how many were looked at), ties (share of neighbours in ranking order with equal scores), saturated (share
        of scores within 1 % of an end of the range), collapsed (share of lists with one value only), top_probability
        (median over lists of the largest soft-max probability at temperature 1), suggested_temperature (at which the
        median list's perplexity is 4, or half its length when that is less; None when no list has an order) and
        warnings.
    """
    if isinstance(store, NodeScores):
        step = max(1, len(store) // (10 * _SAMPLE_LISTS))
        lists = list(store.take(np.arange(0, len(store), step)).astype(np.float64))
        notes: list[str] = []
    else:
        lists, notes = _lists(store), _notes(store)
    values = np.concatenate(lists) if lists else np.empty(0)
    found: dict[str, Any] = {"lists": len(lists), "ties": 0.0, "saturated": 0.0, "collapsed": 0.0}
    longer = [one for one in lists if len(one) > 1]
    collapsed = [one for one in longer if np.ptp(one) <= 1e-6 * max(1e-30, float(np.ptp(values)))]
    if longer:
        gaps = np.concatenate([np.diff(np.sort(one)) for one in longer])
        low, high = float(values.min()), float(values.max())
        edge = 0.01 * (high - low)
        found |= {
            "ties": float((gaps == 0).mean()),
            "saturated": float(((values <= low + edge) | (values >= high - edge)).mean()) if edge else 1.0,
            "collapsed": len(collapsed) / len(longer),
            "top_probability": float(np.median([_softmax(one).max() for one in longer])),
        }
    found["suggested_temperature"] = temperature(longer)
    return found | {"warnings": [*notes, *_warnings(store, found, longer)]}


def _lists(store: PairScores) -> list[FloatArray]:
    """Scores of an even sample of lists, best first."""
    queries, _, scores = store.rows()
    starts = first_of_each(queries)
    ends = np.append(starts[1:], len(queries))
    step = max(1, len(starts) // _SAMPLE_LISTS)
    every = zip(starts[::step], ends[::step], strict=True)
    return [-np.sort(-scores[start:end].astype(np.float64)) for start, end in every]


def _notes(store: PairScores) -> list[str]:
    """What the importer noticed."""
    provenance = store.manifest.provenance if store.manifest else {}
    return [note for notes in provenance.get("notes", []) for note in notes]


def _warnings(store: PairScores | NodeScores, found: dict[str, Any], lists: list[FloatArray]) -> list[str]:
    out = []
    if isinstance(store, PairScores) and (ranks_only(lists) or store.spec.extra.get("score_kind") == "rank"):
        out.append("scores fall by equal steps in every list: only the order counts; train with a list-wise loss on it")
    if store.spec.extra.get("score_kind") == "margin":
        out.append("only differences within a query mean something; use margins, not the scores themselves")
    if found["collapsed"] > 0.01:
        out.append(f"{found['collapsed']:.1%} of the lists have one value for every document: they teach nothing")
    if found["ties"] > 0.05:
        out.append(f"{found['ties']:.1%} of neighbours in the ranking are tied: rounded scores, or half floats?")
    if found["saturated"] > 0.5:
        out.append(f"{found['saturated']:.1%} of the scores lie at an end of their range: a sigmoid? keep raw logits")
    if found.get("top_probability", 0.0) > 0.99:
        what = "logits are near one-hot" if isinstance(store, NodeScores) else "the best document takes all"
        hint = f"use a temperature near {found['suggested_temperature']:.3g}" if found["suggested_temperature"] else ""
        out.append(f"{what} (median largest probability {found['top_probability']:.3f}): {hint}")
    return out


def ranks_only(lists: list[FloatArray]) -> bool:
    """Whether every list of three or more falls by one and the same step, as scores made of ranks do."""
    steps = [np.diff(one) for one in lists if len(one) > 2]
    return bool(steps) and all(np.allclose(step, steps[0][0], rtol=1e-3, atol=0) and steps[0][0] for step in steps)


def temperature(lists: list[FloatArray]) -> float | None:
    """The temperature at which the median list's soft-max has a perplexity of 4 (or half a short list's length)."""
    ordered = [one for one in lists if np.ptp(one) > 0][:_SAMPLE_LISTS]
    if not ordered:
        return None
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        spread = np.median([_perplexity(one / middle) / min(_SPREAD, len(one) / 2) for one in ordered])
        low, high = (middle, high) if spread < 1 else (low, middle)
    return float(np.sqrt(low * high))


def _softmax(scores: FloatArray) -> FloatArray:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def _perplexity(scores: FloatArray) -> float:
    shares = _softmax(scores)
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))
