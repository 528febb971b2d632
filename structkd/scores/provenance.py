"""Who taught a run, what was asked of each teacher, and what its cache saved: rows and a figure for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from structkd.runs import Figure, Run, Series
from structkd.scores.cache import CachedScorer, StoredScorer
from structkd.scores.manifest import TeacherSpec

Row = dict[str, Any]


def teacher_row(spec: TeacherSpec, asked: int = 0, found: int = 0, seconds: float = 0.0, unit: str = "pairs") -> Row:
    """Identity of a teacher and its cost.

    Args:
        asked: how often the teacher itself answered.
        found: how often the cache answered in its place.
        seconds: what the teacher took for `asked`.
        unit: what is counted: pairs, or whole graphs of nodes.
    """
    return {
        **spec.fields(), "fingerprint": spec.fingerprint, "unit": unit, "asked": asked, "from_cache": found,
        "seconds_asked": round(seconds, 3),
    }  # fmt: skip


def teacher_rows(scorer: object) -> list[Row]:
    """One row a teacher behind a scorer: a cache, a store, an ensemble of them, or the teacher itself."""
    if isinstance(scorer, CachedScorer):
        return [teacher_row(scorer.spec, scorer.asked, scorer.found, scorer.seconds)]
    if isinstance(scorer, StoredScorer):
        return [teacher_row(scorer.spec, found=scorer.found)]
    members: Sequence[object] = getattr(scorer, "members", ())
    if members:
        return [row for member in members for row in teacher_rows(member)]
    spec = getattr(scorer, "spec", None)
    return [teacher_row(spec)] if isinstance(spec, TeacherSpec) else []


def keep_teachers(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows and their figure into a run, added to what earlier calls on the same folder asked."""
    earlier = {row["fingerprint"]: row for row in run.teachers()}
    total = [_added(row, earlier.get(row["fingerprint"], {})) for row in rows]
    run.write_teachers(total)
    if any(row["asked"] or row["from_cache"] for row in total):
        run.write_figure("cache", cost_figure(total))


def cost_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What the teachers were asked, and what the cache answered in their place."""
    names = [f"{row['model'].rstrip('/').rpartition('/')[2]} ({row['fingerprint'][:6]})" for row in rows]
    saved = sum(row.get("seconds_saved", 0.0) for row in rows)
    spent = sum(row["seconds_asked"] for row in rows)
    said = f"{spent:.3g} s were spent in the teacher"
    said += f", about {saved:.3g} s saved at the same rate" if saved else ""
    series = [
        Series("asked of the teacher", names, [row["asked"] for row in rows]),
        Series("answered by the cache", names, [row["from_cache"] for row in rows]),
    ]
    return Figure("bars", "What the score cache saved", "teacher", rows[0]["unit"], series, note=said if spent else "")


def _added(row: Mapping[str, Any], earlier: Mapping[str, Any]) -> Row:
    """Counts of this call and of earlier ones; seconds saved at the rate at which the teacher answered."""
    sums = {key: row[key] + earlier.get(key, 0) for key in ("asked", "from_cache", "seconds_asked")}
    saved = {}
    if sums["asked"] and sums["seconds_asked"]:
        saved = {"seconds_saved": round(sums["from_cache"] * sums["seconds_asked"] / sums["asked"], 3)}
    return {**row, **sums, **saved}
