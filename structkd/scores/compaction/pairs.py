"""Compaction of pairs: parts become sorted, distinct lists in bounded memory; few new parts get a file of their own."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.files import sha256_file
from structkd.ids import fingerprint_fields
from structkd.progress import track
from structkd.scores.compaction.merge import Merged, OnConflict, join, merge, namer, not_in
from structkd.scores.compaction.statistics import FLOAT16_MAX, Summary
from structkd.scores.layout.part_list import PartList
from structkd.scores.layout.parts import PairPart, collect_provenance, part_line, read_pair_part
from structkd.scores.layout.sealed import sealed_bytes, temporary
from structkd.scores.layout.shards import Shards
from structkd.scores.layout.snapshot import Csr, checked_path, file_entry, map_csr, write_csr
from structkd.scores.manifest import Header, ScoreManifest

FILE_ROWS = 1 << 27  # pairs in a data file: 0.8 GB of half floats, offsets far below 2^31
_MAX_NOISE = 1e-3  # float16 is chosen while its rounding noise stays below this part of the scores' deviation
_MAX_FILES = 8  # lookups search every file
_BLOCK = 1 << 24


@dataclass
class Survey:
    """What one pass over parts learned; the parts themselves are kept while they are few.

    Attributes:
        lines: of the manifest.
        provenance: distinct values.
        spans: unit -> first and last query row.
        counts: [query rows] pairs of each query.
        rows: pairs.
        kept: the parts, None when they were too many.
    """

    lines: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rows: int = 0
    largest: float = 0.0
    total: float = 0.0
    square: float = 0.0
    noise_square: float = 0.0
    kept: list[PairPart] | None = field(default_factory=list)

    def add(self, part: PairPart, data: bytes, max_rows: int) -> None:
        """Count one part."""
        self.lines.append(part_line(part, len(part.scores), data))
        collect_provenance(self.provenance, part.footer)
        self.rows += len(part.scores)
        if self.kept is not None:
            self.kept.append(part)
            if self.rows > 2 * max_rows:  # 12 bytes a pair, less than what sorting takes
                self.kept = None
        if not len(part.scores):
            return
        self.spans[part.name] = int(part.query_rows[0]), int(part.query_rows[-1])
        first, last = self.spans[part.name]
        if last >= len(self.counts):
            self.counts = np.concatenate([self.counts, np.zeros(2 * last + 1 - len(self.counts), dtype=np.int64)])
        self.counts[first : last + 1] += np.bincount(part.query_rows - np.uint32(first))
        scores = part.scores.astype(np.float64)
        self.largest = max(self.largest, float(np.abs(scores).max()))
        self.total += float(scores.sum())
        self.square += float(np.square(scores).sum())
        if self.largest <= FLOAT16_MAX:
            self.noise_square += float(np.square(scores - part.scores.astype(np.float16)).sum())

    @property
    def deviation(self) -> float:
        """Standard deviation of the scores."""
        return float(np.sqrt(max(0.0, self.square / self.rows - (self.total / self.rows) ** 2))) if self.rows else 0.0

    @property
    def noise(self) -> float:
        """Root-mean-square error that float16 would add."""
        return float(np.sqrt(self.noise_square / self.rows)) if self.rows else 0.0


def survey(folder: Path, names: Sequence[str], max_rows: int) -> Survey:
    """Read and check every part once."""
    found = Survey()
    for name in track(names, "reading parts", late=True):
        data = sealed_bytes(folder / "parts" / f"{name}.parquet")
        found.add(read_pair_part(folder, name, data), data, max_rows)
    return found


def compact_pairs(
    folder: Path,
    header: Header,
    names: Sequence[str],
    dtype: str,
    on_conflict: OnConflict,
    tol: float | None,
    max_rows: int,
) -> dict[str, Any]:
    """The manifest's fields after writing the data files of all parts."""
    found = survey(folder, names, max_rows)
    notes: list[str] = []
    chosen = _choose(dtype, found, folder, notes)
    pieces = _pieces(folder, header, found, on_conflict, tol, max_rows)
    return {
        "parts": PartList(tuple(found.lines)),
        "provenance": found.provenance,
        "notes": notes,
        "dtype": chosen,
        **_write(folder, pieces, chosen),
    }


def append_pairs(
    folder: Path, header: Header, parent: ScoreManifest, names: Sequence[str], dtype: str, max_rows: int
) -> dict[str, Any] | None:
    """The manifest's fields after writing the pairs of new parts alone, beside the parent's files.

    None when all parts must be merged instead: a part is gone, the new ones are half of the store, the files many, or
    the dtype changes.
    """
    before = PartList.read(folder, parent.parts)
    fresh = sorted(set(names) - before.units)
    if not before.units <= set(names) or len(parent.files) >= _MAX_FILES or dtype not in ("auto", parent.dtype):
        return None
    sizes = sum((folder / "parts" / f"{name}.parquet").stat().st_size for name in fresh)
    if 2 * sizes > sum(entry["bytes"] for entry in parent.files):
        return None
    found = survey(folder, fresh, max_rows)
    if _choose("auto", found, folder, []) != parent.dtype and parent.dtype == "float16":
        return None
    stored = Shards([map_csr(checked_path(folder, entry, "size")) for entry in parent.files])
    pieces = (
        not_in(stored, piece, dtype=parent.dtype, teacher_dtype=header.spec.dtype, folder=folder)
        for piece in _pieces(folder, header, found, "error", None, max_rows)
    )
    written = _write(folder, pieces, parent.dtype, start=len(parent.files))
    files = [*parent.files, *written["files"]]
    shards = Shards([map_csr(checked_path(folder, entry, "off")) for entry in files])
    summary = summary_of(shards.parts)
    summary.add_error(parent.quant_error, parent.counts["rows"])
    summary.add_error(written["quant_error"], written["counts"]["rows"])
    for name, values in found.provenance.items():
        known = parent.provenance.get(name, [])
        found.provenance[name] = [*known, *(value for value in values if value not in known)]
    dropped = parent.counts["duplicates_dropped"] + written["counts"]["duplicates_dropped"]
    return {
        "parts": PartList((*before.lines, *found.lines)),
        "provenance": parent.provenance | found.provenance,
        "notes": parent.notes,
        "dtype": parent.dtype,
        "files": files,
        "counts": {"rows": summary.count, "queries": summary.lists, "duplicates_dropped": dropped, "failed": 0},
        "stats": summary.stats(),
        "quant_error": summary.quant_error(),
        "inputs": written["inputs"],
    }


def summary_of(files: Sequence[Csr]) -> Summary:
    """Statistics of stored lists, block by block."""
    summary = Summary()
    for csr in files:
        for start in range(0, len(csr), _BLOCK):
            block = csr.scores[start : start + _BLOCK].astype(np.float32)
            summary.add(block, block)
    summary.add_margins(files)
    return summary


def _pieces(
    folder: Path, header: Header, found: Survey, on_conflict: OnConflict, tol: float | None, max_rows: int
) -> Iterator[Merged]:
    """Distinct sorted pairs, one range of query rows after another, so that memory stays bounded."""
    show = namer(folder)
    for first, last in track(list(_ranges(found.counts, max_rows)), "sorting pairs, pieces", late=True):
        names = [name for name, (low, high) in found.spans.items() if low < last and high >= first]
        inputs: Iterable[PairPart] = found.kept or (read_pair_part(folder, name) for name in names)
        keys, scores = join(inputs, first, last)
        yield merge(
            keys, scores, dtype=header.spec.dtype, on_conflict=on_conflict, tol=tol, where=str(folder), name=show
        )


def _ranges(counts: NDArray[np.int64], max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of query rows with at most `max_rows` pairs each (one query is never cut)."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts) and (before := int(ends[first - 1]) if first else 0) < ends[-1]:
        last = max(int(np.searchsorted(ends, before + max_rows, side="right")), first + 1)
        yield first, last
        first = last


def _choose(dtype: str, found: Survey, folder: Path, notes: list[str]) -> str:
    """float16 or float32; says in `notes` why auto took float32."""
    if dtype == "float32":
        return dtype
    if found.largest > FLOAT16_MAX:
        if dtype == "float16":
            raise DataError(
                f"{folder}: the largest score is {found.largest:.6g}, float16 ends at {FLOAT16_MAX:.0f}. "
                "Compact with dtype='float32'."
            )
        notes.append(f"float32: the largest score is {found.largest:.6g}, float16 ends at {FLOAT16_MAX:.0f}")
        return "float32"
    if dtype == "auto" and found.noise > _MAX_NOISE * found.deviation:
        notes.append(
            f"float32: rounding to float16 would add noise of {found.noise:.3g}, "
            f"the scores deviate by {found.deviation:.3g}"
        )
        return "float32"
    return "float16"


def _write(folder: Path, pieces: Iterator[Merged], dtype: str, start: int = 0) -> dict[str, Any]:
    """Write the pieces as data files; returns files, counts, stats, quant_error and inputs."""
    files: list[dict[str, Any]] = []
    summary = Summary()
    dropped = 0
    draft = _Draft(folder)
    try:
        for merged in pieces:
            dropped += merged.dropped
            if not len(merged.keys):
                continue
            csr = merged.csr()
            rounded = Csr(csr.query_rows, csr.offsets, csr.documents, csr.scores.astype(dtype))
            summary.add(csr.scores, rounded.scores)
            summary.add_margins([csr])
            if draft.rows and draft.rows + len(csr) > FILE_ROWS:
                files.append(draft.finish(start + len(files)))
            draft.add(rounded)
        if draft.rows:
            files.append(draft.finish(start + len(files)))
    finally:
        draft.clear()
    return {
        "files": files,
        "counts": {"rows": summary.count, "queries": summary.lists, "duplicates_dropped": dropped, "failed": 0},
        "stats": summary.stats(),
        "quant_error": summary.quant_error(),
        "inputs": {
            "query_table_fp": _table_fingerprint(folder, "queries"),
            "doc_table_fp": _table_fingerprint(folder, "docs"),
        },
    }


class _Draft:
    """A data file that grows list by list: a single piece stays in memory, more are spooled to temporary files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[Csr] = []
        self._spools: list[tuple[Path, BinaryIO]] = []
        self.rows = 0

    def add(self, csr: Csr) -> None:
        """Lists whose queries follow those before."""
        if self._held and not self._spools:
            for _ in range(2):
                path = temporary(self._folder / "data")
                self._spools.append((path, open(path, "wb")))  # noqa: SIM115 (closed by finish and clear)
            self._held = [self._spooled(self._held[0])]
        self._held.append(self._spooled(csr) if self._spools else csr)
        self.rows += int(csr.offsets[-1])

    def _spooled(self, csr: Csr) -> Csr:
        """The lists without their columns, which went to the temporary files."""
        for (_, handle), column in zip(self._spools, (csr.documents[:], csr.scores), strict=True):
            handle.write(np.ascontiguousarray(column).data)
        return Csr(csr.query_rows, csr.offsets, csr.documents[:0].copy(), csr.scores[:0].copy())

    def finish(self, number: int) -> dict[str, Any]:
        """Write the file; returns its line in the manifest."""
        whole = self._held[0]
        if self._spools:
            starts = np.cumsum([0, *(int(csr.offsets[-1]) for csr in self._held)])
            offsets = [csr.offsets[:-1] + base for csr, base in zip(self._held, starts[:-1], strict=True)]
            for _, handle in self._spools:
                handle.close()
            documents, scores = (path for path, _ in self._spools)
            queries = np.concatenate([csr.query_rows for csr in self._held])
            whole = Csr(
                queries,
                np.concatenate([*offsets, starts[-1:]]).astype(np.int32),
                np.memmap(documents, dtype=np.uint32, mode="r"),
                np.memmap(scores, dtype=whole.scores.dtype, mode="r"),
            )
        path = write_csr(self._folder / "data", f"csr-{number:05d}", whole)
        low, high = int(whole.query_rows[0]), int(whole.query_rows[-1]) + 1
        entry = file_entry(self._folder, path, rows=self.rows, lo=low, hi=high)
        self.clear()
        return entry

    def clear(self) -> None:
        """Remove what was spooled."""
        for path, handle in self._spools:
            handle.close()
            with suppress(FileNotFoundError):
                path.unlink()
        self._held, self._spools, self.rows = [], [], 0


def _table_fingerprint(folder: Path, name: str) -> str:
    return fingerprint_fields(sha256_file(path) for path in sorted((folder / "ids").glob(f"{name}-*.parquet")))
