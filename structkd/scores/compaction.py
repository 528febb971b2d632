"""Compaction: the log's parts become one snapshot, sorted and distinct; the parts stay."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError, UsageError
from structkd.files import create_exclusive, sha256_file, write_json
from structkd.ids import fingerprint_fields
from structkd.scores.manifest import Header, ScoreManifest, now
from structkd.scores.merge import Merged, OnConflict, gather, join, merge, namer
from structkd.scores.parts import PairPart, RowPart, part_names, read_pair_part, read_row_part, uncovered
from structkd.scores.sealed import sealed_bytes, temporary
from structkd.scores.snapshot import Csr, file_entry, latest, manifest_path, write_csr, write_rows
from structkd.scores.statistics import Summary

Dtype = Literal["auto", "float16", "float32"]

FLOAT16_MAX = 65_504.0
_MAX_NOISE = 1e-3  # float16 is chosen while its rounding noise stays below this part of the scores' deviation


def compact(
    folder: str | Path,
    *,
    dtype: Dtype | None = None,
    on_conflict: OnConflict = "error",
    tol: float | None = None,
    max_rows: int = 1 << 26,
) -> ScoreManifest:
    """Write a snapshot of every committed part and return its manifest; the parts stay.

    Nothing is written when the newest snapshot holds these parts in this dtype already. Two processes may compact at
    once: the manifest's number is create-exclusive, the loser looks again.

    Args:
        folder: a score store.
        dtype: float16, float32, or auto: float16 unless a score is beyond its range or its rounding would be more
            than 0.1 % of the scores' deviation. Default: auto for pairs, float32 for node logits.
        on_conflict: one pair, two values beyond the tolerance: "error", "first" (by unit name) or "mean".
        tol: absolute tolerance; default by the teacher's compute dtype.
        max_rows: pairs sorted and written at once.

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
        if parent is not None and _covers(parent, names, dtype):
            return parent
        draft = (
            _compact_pairs(folder, header, names, dtype or "auto", on_conflict, tol, max_rows)
            if header.spec.kind == "pairs"
            else _compact_rows(folder, header, names, dtype or "float32", max_rows)
        )
        number = 0 if parent is None else parent.snapshot + 1
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


def _covers(manifest: ScoreManifest, names: Sequence[str], dtype: str | None) -> bool:
    same = {part["unit"] for part in manifest.parts} == set(names)
    return same and (dtype in (None, "auto") or manifest.dtype == dtype)


def _compact_pairs(
    folder: Path,
    header: Header,
    names: Sequence[str],
    dtype: str,
    on_conflict: OnConflict,
    tol: float | None,
    max_rows: int,
) -> dict[str, Any]:
    """The manifest's fields after writing the data files."""
    parts: list[dict[str, Any]] = []
    provenance: dict[str, Any] = {}
    counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    low, high, total, square = np.inf, -np.inf, 0.0, 0.0
    kept: list[PairPart] = []
    rows = 0
    for name in names:
        data = sealed_bytes(folder / "parts" / f"{name}.parquet")
        part = read_pair_part(folder, name, data)
        parts.append(_part_entry(part, len(part.scores), data))
        _collect(provenance, part.footer)
        if len(part.scores):
            here = np.bincount(part.query_rows)
            if len(here) > len(counts):
                counts = np.concatenate([counts, np.zeros(len(here) - len(counts), dtype=np.int64)])
            counts[: len(here)] += here
            low, high = min(low, float(part.scores.min())), max(high, float(part.scores.max()))
            total += float(part.scores.sum(dtype=np.float64))
            square += float(np.square(part.scores, dtype=np.float64).sum())
        rows += len(part.scores)
        if rows <= max_rows:
            kept.append(part)
    deviation = float(np.sqrt(max(0.0, square / rows - (total / rows) ** 2))) if rows else 0.0
    whole = rows <= max_rows
    if not whole:
        kept = []

    def pieces() -> Iterator[Merged]:
        """Distinct sorted pairs, one range of query rows after another, so that memory stays bounded."""
        for first, last in _ranges(counts, max_rows):
            inputs = kept if whole else (read_pair_part(folder, name) for name in names)
            keys, scores = join(inputs, first, last)
            show = namer(folder)
            yield merge(
                keys, scores, dtype=header.spec.dtype, on_conflict=on_conflict, tol=tol, where=str(folder), name=show
            )

    notes: list[str] = []
    chosen = _choose(dtype, low, high, deviation, pieces, folder, notes)
    return {"parts": parts, "provenance": provenance, "notes": notes, "dtype": chosen} | _write_pairs(
        folder, pieces(), chosen
    )


def _part_entry(part: PairPart | RowPart, rows: int, data: bytes) -> dict[str, Any]:
    return {
        "unit": part.name,
        "rows": rows,
        "payload_hash": part.footer.get("payload"),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _collect(provenance: dict[str, Any], footer: dict[str, str]) -> None:
    """Gather where parts came from: every distinct value under its name."""
    found = json.loads(footer.get("provenance", "{}")) | {"versions": footer.get("versions")}
    for name, value in found.items():
        values = provenance.setdefault(name, [])
        if value not in values:
            values.append(value)


def _ranges(counts: NDArray[np.int64], max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of query rows with at most `max_rows` pairs each (one query is never cut)."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + max_rows, side="right")), first + 1)
        yield first, last
        first = last


def _choose(
    dtype: str,
    low: float,
    high: float,
    deviation: float,
    pieces: Callable[[], Iterator[Merged]],
    folder: Path,
    notes: list[str],
) -> str:
    """float16 or float32; says in `notes` why auto took float32."""
    largest = max(abs(low), abs(high)) if high >= low else 0.0
    if dtype == "float32":
        return dtype
    if largest > FLOAT16_MAX:
        if dtype == "float16":
            raise DataError(
                f"{folder}: the largest score is {largest:.6g}, float16 ends at {FLOAT16_MAX:.0f}. "
                "Compact with dtype='float32'."
            )
        notes.append(f"float32: the largest score is {largest:.6g}, float16 ends at {FLOAT16_MAX:.0f}")
        return "float32"
    if dtype == "float16":
        return dtype
    squares = [np.square(m.scores - m.scores.astype(np.float16), dtype=np.float64).sum() for m in pieces()]
    count = sum(len(m.scores) for m in pieces()) if squares else 0
    noise = float(np.sqrt(sum(squares) / count)) if count else 0.0
    if noise > _MAX_NOISE * deviation:
        notes.append(
            f"float32: rounding to float16 would add noise of {noise:.3g}, the scores deviate by {deviation:.3g}"
        )
        return "float32"
    return "float16"


def _write_pairs(folder: Path, pieces: Iterator[Merged], dtype: str) -> dict[str, Any]:
    """Write one file per piece; returns files, counts, stats, quant_error and inputs."""
    files: list[dict[str, Any]] = []
    summary = Summary()
    lists = dropped = 0
    for merged in pieces:
        if not len(merged.keys):
            continue
        csr = merged.csr()
        rounded = csr.scores.astype(dtype)
        summary.add(csr.scores, rounded)
        summary.add_margins(csr)
        name = f"csr-{len(files):05d}"
        path = write_csr(folder / "data", name, Csr(csr.query_rows, csr.offsets, csr.documents, rounded))
        low, high = int(csr.query_rows[0]), int(csr.query_rows[-1]) + 1
        files.append(file_entry(folder, path, rows=len(csr), lo=low, hi=high))
        lists += len(csr.query_rows)
        dropped += merged.dropped
    return {
        "files": files,
        "counts": {"rows": summary.count, "queries": lists, "duplicates_dropped": dropped, "failed": 0},
        "stats": summary.stats(),
        "quant_error": summary.quant_error(),
        "inputs": {
            "query_table_fp": _table_fingerprint(folder, "queries"),
            "doc_table_fp": _table_fingerprint(folder, "docs"),
        },
    }


def _table_fingerprint(folder: Path, name: str) -> str:
    return fingerprint_fields(sha256_file(path) for path in sorted((folder / "ids").glob(f"{name}-*.parquet")))


def _compact_rows(folder: Path, header: Header, names: Sequence[str], dtype: str, max_rows: int) -> dict[str, Any]:
    """The manifest's fields after writing blocks of logits."""
    nodes, classes = header.num_nodes or 0, header.num_classes or 0
    parts: list[dict[str, Any]] = []
    provenance: dict[str, Any] = {}
    ranges: list[tuple[int, int, str]] = []
    largest = 0.0
    for name in names:
        data = sealed_bytes(folder / "parts" / f"{name}.parquet")
        part = read_row_part(folder, name, data)
        parts.append(_part_entry(part, len(part.values), data))
        _collect(provenance, part.footer)
        ranges.append((part.low, part.high, name))
        largest = max(largest, float(np.abs(part.values).max()))
    if missing := uncovered([(low, high) for low, high, _ in ranges], nodes):
        total = sum(high - low for low, high in missing)
        shown = ", ".join(f"{low}-{high - 1}" for low, high in missing[:3])
        raise DataError(f"{folder}: {total} of {nodes} nodes have no logits yet (nodes {shown}). Score them first.")
    if dtype == "auto":
        dtype = "float16" if largest <= FLOAT16_MAX else "float32"
    if dtype == "float16" and largest > FLOAT16_MAX:
        raise DataError(
            f"{folder}: the largest logit is {largest:.6g}, float16 ends at {FLOAT16_MAX:.0f}. Use float32."
        )
    block = max(1, min(max_rows, (1 << 30) // (classes * np.dtype(dtype).itemsize)))
    files: list[dict[str, Any]] = []
    summary = Summary()
    for low in range(0, nodes, block):
        values = gather(folder, ranges, low, min(low + block, nodes), classes, header.spec.dtype)
        rounded = values.astype(dtype)
        summary.add(values, rounded)
        path = write_rows(folder / "data", f"rows-{len(files):05d}", rounded)
        files.append(file_entry(folder, path, rows=len(values), lo=low, hi=low + len(values)))
    return {
        "parts": parts,
        "provenance": provenance,
        "notes": [],
        "dtype": dtype,
        "files": files,
        "counts": {
            "rows": nodes,
            "queries": 0,
            "duplicates_dropped": sum(high - low for low, high, _ in ranges) - nodes,
            "failed": 0,
        },
        "stats": summary.stats(),
        "quant_error": summary.quant_error(),
        "inputs": {"graph_fp": str(header.graph_fingerprint)},
    }
