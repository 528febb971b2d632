"""Compaction of node logits: parts of node ranges become blocks of equal height."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.errors import ConflictingScoresError, DataError
from structkd.scores.compaction.merge import tolerance
from structkd.scores.compaction.statistics import FLOAT16_MAX, Summary
from structkd.scores.layout.part_list import PartList
from structkd.scores.layout.parts import collect_provenance, part_line, read_row_part, uncovered
from structkd.scores.layout.sealed import sealed_bytes
from structkd.scores.layout.snapshot import file_entry, write_rows
from structkd.scores.manifest import Header


def compact_rows(folder: Path, header: Header, names: Sequence[str], dtype: str, max_rows: int) -> dict[str, Any]:
    """The manifest's fields after writing blocks of logits."""
    nodes, classes = header.num_nodes or 0, header.num_classes or 0
    parts: list[str] = []
    provenance: dict[str, Any] = {}
    ranges: list[tuple[int, int, str]] = []
    largest = 0.0
    for name in names:
        data = sealed_bytes(folder / "parts" / f"{name}.parquet")
        part = read_row_part(folder, name, data)
        parts.append(part_line(part, len(part.values), data))
        collect_provenance(provenance, part.footer)
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
        "parts": PartList(tuple(parts)),
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
