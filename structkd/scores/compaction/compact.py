"""Compaction: the log's parts become one snapshot, sorted and distinct; the parts stay."""

from pathlib import Path
from typing import Literal

from structkd.errors import UsageError
from structkd.files import create_exclusive, write_json
from structkd.scores.compaction.merge import OnConflict
from structkd.scores.compaction.pairs import append_pairs, compact_pairs
from structkd.scores.compaction.rows import compact_rows
from structkd.scores.layout.part_list import names_digest
from structkd.scores.layout.parts import part_names
from structkd.scores.layout.sealed import temporary
from structkd.scores.layout.snapshot import latest, manifest_path
from structkd.scores.manifest import Header, ScoreManifest, now

Dtype = Literal["auto", "float16", "float32"]


def compact(
    folder: str | Path,
    *,
    dtype: Dtype | None = None,
    on_conflict: OnConflict = "error",
    tol: float | None = None,
    max_rows: int = 1 << 24,
    full: bool = False,
) -> ScoreManifest:
    """Write a snapshot of every committed part and return its manifest; the parts stay.

    Nothing is written when the newest snapshot holds these parts in this dtype already; few new parts become one more
    data file beside the old ones. Two processes may compact at once: the manifest's number is create-exclusive, the
    loser looks again.

    Args:
        folder: a score store.
        dtype: float16, float32, or auto: float16 unless a score is beyond its range or its rounding would be more
            than 0.1 % of the scores' deviation. Default: auto for pairs, float32 for node logits.
        on_conflict: one pair, two values beyond the tolerance: "error", "first" (by unit name) or "mean".
        tol: absolute tolerance; default by the teacher's compute dtype.
        max_rows: pairs sorted at once; memory is some 40 bytes for each.
        full: merge all parts into new files, however few are new.

    Raises:
        ConflictingScoresError: see `on_conflict`.
        CorruptFileError: a part differs from its checksum.
        DataError: float16 was asked for and a score does not fit.
    """
    folder = Path(folder)
    header = Header.read(folder)
    if dtype not in (None, "auto", "float16", "float32"):
        raise UsageError(f"dtype {dtype!r}; expected 'auto', 'float16' or 'float32'.")
    if on_conflict not in ("error", "first", "mean"):
        raise UsageError(f"on_conflict {on_conflict!r}; expected 'error', 'first' or 'mean'.")
    while True:
        parent, names = latest(folder), part_names(folder)
        whole = full and parent is not None and len(parent.files) > 1
        if parent is not None and not whole and _covers(parent, names, dtype):
            return parent
        draft = None
        if header.spec.kind == "rows":
            draft = compact_rows(folder, header, names, dtype or "float32", max_rows)
        elif parent is not None and not full and on_conflict == "error" and tol is None:
            draft = append_pairs(folder, header, parent, names, dtype or "auto", max_rows)
        if draft is None:
            draft = compact_pairs(folder, header, names, dtype or "auto", on_conflict, tol, max_rows)
        number = 0 if parent is None else parent.snapshot + 1
        draft["parts"] = draft["parts"].write(folder, number)
        manifest = ScoreManifest(
            kind=header.spec.kind,
            snapshot=number,
            parent=None if parent is None else parent.snapshot,
            teacher=header.spec.fields(),
            teacher_fp=header.spec.fingerprint,
            created_at=now(),
            **draft,
        )
        path = temporary(folder / "snapshots")
        write_json(path, manifest.to_json())
        if create_exclusive(path, manifest_path(folder, number)):
            return manifest


def _covers(manifest: ScoreManifest, names: list[str], dtype: str | None) -> bool:
    return bool(manifest.parts["names"] == names_digest(names)) and (dtype in (None, "auto") or manifest.dtype == dtype)
