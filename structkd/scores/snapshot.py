"""Snapshots: what compaction makes of the log, and how it is mapped into memory.

    <root>/snapshots/00000007.json               manifest; the largest number counts
    <root>/data/csr-00000-<sha16>.arrow          pairs: one uncompressed record batch {q, doc: list, score: list}
    <root>/data/rows-00000-<sha16>.safetensors   rows: `logits` of a block of nodes, data aligned to 64 bytes

The file format stays uncompressed, else its columns would be copied instead of mapped.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from structkd.errors import ConflictingScoresError, CorruptFileError, DataError, UsageError
from structkd.files import create_exclusive, inside, sha256_file, sync_folder, write_json
from structkd.ids import fingerprint_fields
from structkd.scores.log import (
    IdTable,
    PairPart,
    RowPart,
    as_array,
    as_numpy,
    part_names,
    read_pair_part,
    read_row_part,
    sealed_bytes,
    split_keys,
    temporary,
    uncovered,
)
from structkd.scores.manifest import Header, ScoreManifest, now

OnConflict = Literal["error", "first", "mean"]
Dtype = Literal["auto", "float16", "float32"]

FLOAT16_MAX = 65_504.0
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_MAX_NOISE = 1e-3  # float16 is chosen while its rounding noise stays below this part of the scores' deviation
_SAMPLE = 1 << 22  # quantiles of larger stores come from an even sample of this size
# absolute and relative step that one more run of the same teacher may differ by
_TOLERANCE = {"float64": (1e-3, 1e-6), "float32": (1e-3, 1e-6), "bfloat16": (1e-2, 1.6e-2), "bf16": (1e-2, 1.6e-2)}
_LOW_PRECISION = (1e-2, 2e-3)


@dataclass(frozen=True)
class Csr:
    """Lists of scores by query row, documents ascending within a list.

    Attributes:
        query_rows: [lists] ascending.
        offsets: [lists + 1].
        documents: [values].
        scores: [values] float16 or float32.
    """

    query_rows: NDArray[np.uint32]
    offsets: NDArray[np.int32]
    documents: NDArray[np.uint32]
    scores: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Merged:
    """Distinct pairs in key order, and what merging them dropped."""

    keys: NDArray[np.uint64]
    scores: NDArray[np.float32]
    dropped: int

    def csr(self) -> Csr:
        """As lists."""
        queries, documents = split_keys(self.keys)
        starts = first_of_each(queries)
        offsets = np.concatenate([starts, [len(queries)]]).astype(np.int32)
        return Csr(queries[offsets[:-1]].astype(np.uint32), offsets, documents.astype(np.uint32), self.scores)


def first_of_each(ordered: NDArray[Any]) -> NDArray[np.int64]:
    """Position of the first of each run of equal values."""
    first = np.ones(len(ordered), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(first)


def tolerance(dtype: str, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far two scores of one pair may lie apart when the teacher computes in `dtype`."""
    absolute, relative = _TOLERANCE.get(dtype, _LOW_PRECISION)
    return np.asarray(absolute + relative * np.abs(values, dtype=np.float64))


def merge(
    keys: NDArray[np.uint64],
    scores: NDArray[np.float32],
    *,
    dtype: str,
    on_conflict: OnConflict = "error",
    tol: float | None = None,
    where: str,
    name: Callable[[int, int], object],
) -> Merged:
    """Sort pairs by key and make them distinct.

    Args:
        keys: uint64 [pairs], query row << 32 | document row, in the order that `first` means.
        scores: float32 [pairs].
        dtype: the teacher's compute dtype; sets the tolerance.
        on_conflict: what to do with two values of one pair that differ by more than the tolerance.
        tol: absolute tolerance instead of the dtype's.
        where: for the message.
        name: shows a pair in the message.

    Raises:
        ConflictingScoresError: on_conflict is "error" and values differ: the teacher is not deterministic.
    """
    order = np.argsort(keys)
    keys = keys[order]
    starts = first_of_each(keys)
    if len(starts) == len(keys):
        return Merged(keys, scores[order], 0)
    ordered = scores[order]
    lowest, highest = np.minimum.reduceat(ordered, starts), np.maximum.reduceat(ordered, starts)
    delta = highest.astype(np.float64) - lowest
    limit = tolerance(dtype, highest) if tol is None else np.full(len(delta), tol)
    if on_conflict == "error" and (bad := np.flatnonzero(delta > limit)).size:
        shown = [name(*(int(row[0]) for row in split_keys(keys[starts[i] : starts[i] + 1]))) for i in bad[:3]]
        raise ConflictingScoresError(
            f"{where}: {len(bad)} pairs were scored twice with different values (largest difference "
            f"{delta.max():.6g}), for example {', '.join(map(str, shown))}. The teacher is not deterministic; "
            f"compact with on_conflict='first' or 'mean' to accept that."
        )
    if on_conflict == "mean":
        counts = np.diff(np.append(starts, len(keys)))
        values = (np.add.reduceat(ordered.astype(np.float64), starts) / counts).astype(np.float32)
    else:
        values = scores[np.minimum.reduceat(order, starts)]
    return Merged(keys[starts], values, len(keys) - len(starts))


# manifests


def latest(folder: Path) -> ScoreManifest | None:
    """The newest snapshot's manifest, None when there is none."""
    number = latest_number(folder)
    return None if number is None else ScoreManifest.read(manifest_path(folder, number))


def latest_number(folder: Path) -> int | None:
    """The largest snapshot number."""
    return max(snapshot_numbers(folder), default=None)


def snapshot_numbers(folder: Path) -> list[int]:
    """Numbers of all snapshots, ascending."""
    with suppress(FileNotFoundError):
        stems = [name.removesuffix(".json") for name in os.listdir(folder / "snapshots") if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdigit())
    return []


def manifest_path(folder: Path, number: int) -> Path:
    """Where snapshot `number`'s manifest lies."""
    return folder / "snapshots" / f"{number:08d}.json"


# compaction


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
            keys, scores = _join(inputs, first, last)
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


def _join(parts: Iterable[PairPart], first: int, last: int) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Keys and scores of the parts whose query row lies in first .. last-1, in unit order."""
    keys, scores = [np.empty(0, np.uint64)], [np.empty(0, np.float32)]
    for part in parts:
        inside_range = (part.query_rows >= first) & (part.query_rows < last)
        pick = slice(None) if inside_range.all() else inside_range
        queries = part.query_rows[pick].astype(np.uint64)
        keys.append((queries << np.uint64(32)) | part.document_rows[pick])
        scores.append(part.scores[pick])
    return np.concatenate(keys), np.concatenate(scores)


def namer(folder: Path) -> Callable[[int, int], object]:
    """Shows a pair of rows by its ids (the tables are read when a message needs them)."""

    def name(query: int, document: int) -> object:
        return IdTable(folder / "ids", "queries").ids[query], IdTable(folder / "ids", "docs").ids[document]

    return name


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


class Summary:
    """Statistics of a stream of scores."""

    def __init__(self) -> None:
        self.count = 0
        self._low, self._high, self._sum, self._square = np.inf, -np.inf, 0.0, 0.0
        self._sample: list[NDArray[np.float32]] = []
        self._error_max, self._error_square = 0.0, 0.0
        self._margins = self._margin_sum = self._margin_square = 0.0
        self._ties = 0

    def add(self, scores: NDArray[np.floating], rounded: NDArray[np.floating]) -> None:
        """Count a block of scores and what rounding did to them."""
        if not scores.size:
            return
        values = scores.reshape(-1)
        self.count += len(values)
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._sum += float(values.sum(dtype=np.float64))
        self._square += float(np.square(values, dtype=np.float64).sum())
        self._sample.append(values[:: max(1, len(values) // _SAMPLE)].astype(np.float32))
        error = np.abs(values.astype(np.float64) - rounded.reshape(-1))
        self._error_max = max(self._error_max, float(error.max()))
        self._error_square += float(np.square(error).sum())

    def add_margins(self, csr: Csr) -> None:
        """Count margins: the best score of each list minus every other score of it."""
        starts, sizes = csr.offsets[:-1], np.diff(csr.offsets)
        margins = np.repeat(np.maximum.reduceat(csr.scores, starts), sizes) - csr.scores
        self._margins += float((sizes - 1).sum())
        self._margin_sum += float(margins.sum(dtype=np.float64))
        self._margin_square += float(np.square(margins, dtype=np.float64).sum())
        self._ties += int((np.add.reduceat(margins == 0, starts, dtype=np.int64) > 1).sum())

    def stats(self) -> dict[str, Any]:
        """min, max, mean, std, quantiles; margins where lists were counted."""
        if not self.count:
            return {}
        mean = self._sum / self.count
        sample = np.concatenate(self._sample)
        quantiles = np.quantile(sample, QUANTILES)
        out: dict[str, Any] = {
            "min": self._low,
            "max": self._high,
            "mean": mean,
            "std": float(np.sqrt(max(0.0, self._square / self.count - mean**2))),
            "quantiles": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        }
        if self._margins:
            mean = self._margin_sum / self._margins
            variance = max(0.0, self._margin_square / self._margins - mean**2)
            out["margin"] = {"mean": mean, "std": float(np.sqrt(variance)), "lists_with_tied_best": self._ties}
        return out

    def quant_error(self) -> dict[str, float]:
        """Largest and root-mean-square difference between the parts and the snapshot."""
        rms = float(np.sqrt(self._error_square / self.count)) if self.count else 0.0
        return {"max": self._error_max, "rms": rms}


# CSR files


def write_csr(folder: Path, name: str, csr: Csr) -> Path:
    """Write `<name>-<sha16>.arrow`: one uncompressed record batch."""
    offsets = as_array(csr.offsets)
    batch = pa.record_batch(
        {
            "q": as_array(csr.query_rows),
            "doc": pa.ListArray.from_arrays(offsets, as_array(csr.documents)),
            "score": pa.ListArray.from_arrays(offsets, as_array(csr.scores)),
        }
    )
    path = temporary(folder)
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return place(path, folder, name, ".arrow")
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def place(draft: Path, folder: Path, name: str, suffix: str) -> Path:
    """Name a data file after its content; a damaged file that already has the name is replaced."""
    digest = sha256_file(draft)
    target = folder / f"{name}-{digest[:16]}{suffix}"
    if target.exists() and sha256_file(target) != digest:
        os.replace(draft, target)
        sync_folder(folder)
    else:
        create_exclusive(draft, target)
    return target


def file_entry(root: Path, path: Path, **more: int) -> dict[str, Any]:
    """A file's line in a manifest."""
    relative = path.relative_to(root).as_posix()
    return {"path": relative, "bytes": path.stat().st_size, "sha256": sha256_file(path), **more}


def checked_path(root: Path, entry: dict[str, Any], verify: str) -> Path:
    """Path of a manifest's file after the check asked for: "off", "size" or "sha256"."""
    path = inside(root, entry["path"])
    if not path.is_file():
        raise FileNotFoundError(2, "named in the manifest, but absent", str(path))
    if verify != "off" and (size := path.stat().st_size) != entry["bytes"]:
        raise CorruptFileError(f"{path}: {size} bytes, the manifest says {entry['bytes']}. Restore it from a copy.")
    if verify == "sha256" and sha256_file(path) != entry["sha256"]:
        raise CorruptFileError(f"{path}: its bytes differ from the manifest's checksum. Restore it from a copy.")
    return path


def map_csr(path: Path) -> Csr:
    """Map a CSR file; its arrays are views of the file, clean pages that all processes share."""
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = file.get_batch(0)
        documents, scores = batch["doc"], batch["score"]
        return Csr(
            as_numpy(batch["q"]), as_numpy(documents.offsets), as_numpy(documents.values), as_numpy(scores.values)
        )
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a readable Arrow file ({error}). Restore it from a copy.") from None


# row files


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


def gather(
    folder: Path, ranges: Iterable[tuple[int, int, str]], low: int, high: int, classes: int, dtype: str
) -> NDArray[np.float32]:
    """Logits of the nodes low .. high-1 from parts; ConflictingScoresError when overlapping parts disagree."""
    out = np.full((high - low, classes), np.nan, dtype=np.float32)
    for start, end, name in sorted(ranges, key=lambda item: item[2]):
        first, last = max(low, start), min(high, end)
        if first >= last:
            continue
        values = read_row_part(folder, name).values[first - start : last - start]
        target = out[first - low : last - low]
        known = ~np.isnan(target)
        delta = np.abs(target[known].astype(np.float64) - values[known])
        if (delta > tolerance(dtype, values[known])).any():
            raise ConflictingScoresError(
                f"{folder}: nodes {first}-{last - 1} were scored twice with different logits (largest difference "
                f"{delta.max():.6g}). The teacher is not deterministic; delete parts/{name}.parquet to keep the other."
            )
        target[~known] = values[~known]
    return out


def write_rows(folder: Path, name: str, logits: NDArray[np.floating]) -> Path:
    """Write `<name>-<sha16>.safetensors` with one tensor `logits`; its data starts on a multiple of 64 bytes."""
    names = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    meta = {"logits": {"dtype": names[logits.dtype], "shape": list(logits.shape), "data_offsets": [0, logits.nbytes]}}
    text = json.dumps(meta, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path = temporary(folder)
    try:
        with open(path, "wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.write(np.ascontiguousarray(logits).data)
        return place(path, folder, name, ".safetensors")
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def map_rows(path: Path) -> NDArray[np.floating]:
    """Map the tensor `logits` of a safetensors file: a plain read-only view."""
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            entry = json.loads(handle.read(length))["logits"]
            shape, dtype = tuple(entry["shape"]), np.dtype({"F16": np.float16, "F32": np.float32}[entry["dtype"]])
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > size or end - start != int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(f"{size} bytes do not hold a tensor of shape {shape}")
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise CorruptFileError(f"{path}: not a readable safetensors file ({error}). Restore it.") from None
        if start == end:
            return np.empty(shape, dtype=dtype)
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(view, dtype=dtype, count=int(np.prod(shape)), offset=start).reshape(shape)
