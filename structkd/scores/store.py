"""Open a store, or write one from arrays that are already at hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import ConflictingScoresError, DataError, UsageError
from structkd.scores.compaction.compact import Dtype, compact
from structkd.scores.compaction.merge import OnConflict, tolerance
from structkd.scores.layout.log import PairLog, RowLog
from structkd.scores.layout.parts import read_row_part
from structkd.scores.manifest import PUBLISHED, Header, ScoreManifest, TeacherSpec
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.scores.remote import is_remote, mirror

UNIT_ROWS = 20_000
NODE_UNIT_ROWS = 65_536


def open(
    folder: str | Path, expect: TeacherSpec | None = None, *, verify: Literal["size", "sha256", "off"] = "size"
) -> PairScores | NodeScores:
    """Open a score store or a published folder, memory-mapped where its layout allows it.

    Args:
        folder: a cache that a teacher filled, an import, or what `publish` wrote; an address of a published folder
            (s3://, gs://, hf://, memory://) is mirrored first, see `remote.mirror`.
        expect: the teacher whose scores are wanted.
        verify: compare file sizes with the manifest, or every byte ("sha256"), or nothing.

    Raises:
        TeacherMismatchError: it is another teacher's; names the differing fields.
        DataError: no store there, or a file is absent.
        CorruptFileError: a size or checksum differs.
    """
    folder = mirror(folder) if is_remote(folder) else Path(folder)
    if verify not in ("size", "sha256", "off"):
        raise UsageError(f"verify={verify!r}; expected 'size', 'sha256' or 'off'.")
    spec = ScoreManifest.read(folder / PUBLISHED).spec if (folder / PUBLISHED).is_file() else Header.read(folder).spec
    if expect is not None:
        spec.require(expect, folder)
    if spec.kind == "rows":
        return NodeScores.open(folder, verify=verify)
    return PairScores.open(folder, verify=verify)


def write_pairs(
    folder: str | Path,
    spec: TeacherSpec,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    scores: NDArray[np.floating],
    query_texts: Sequence[str] | None = None,
    document_texts: Sequence[str] | None = None,
    *,
    provenance: dict[str, Any] | None = None,
    dtype: Dtype | None = None,
    on_conflict: OnConflict = "error",
) -> PairScores:
    """Commit scores of pairs to a store (made when absent), compact it and open it.

    Args:
        folder: where; an existing store must be of the same teacher.
        spec: the teacher.
        query_ids: [pairs].
        document_ids: [pairs].
        scores: [pairs], finite.
        query_texts: [pairs] texts behind the ids; without them the id alone is the key.
        document_texts: [pairs].
        provenance: JSON values for the manifest.
        dtype: of the snapshot; see `compact`.
        on_conflict: see `compact`.

    Raises:
        ConflictingScoresError: a pair has two values.
        DataError: lengths differ, or a score is no finite number.
    """
    values = np.asarray(scores, dtype=np.float32)
    for name, column in (
        ("document_ids", document_ids),
        ("query_texts", query_texts),
        ("document_texts", document_texts),
    ):
        if column is not None and len(column) != len(query_ids):
            raise DataError(f"write_pairs: {len(query_ids)} query ids but {len(column)} {name}.")
    if values.shape != (len(query_ids),):
        raise DataError(f"write_pairs: {len(query_ids)} query ids but scores of shape {values.shape}.")
    log = PairLog.open(folder, spec)
    commit_pairs(
        log,
        log.queries.intern(query_ids, query_texts),
        log.documents.intern(document_ids, document_texts),
        values,
        provenance,
    )
    compact(folder, dtype=dtype, on_conflict=on_conflict)
    return PairScores.open(Path(folder))


def commit_pairs(
    log: PairLog,
    query_rows: NDArray[np.int64],
    document_rows: NDArray[np.int64],
    values: NDArray[np.float32],
    provenance: dict[str, Any] | None = None,
    unit_rows: int = UNIT_ROWS,
) -> list[str]:
    """Commit scores of interned pairs in units; returns the names of those that were not there.

    Raises:
        ConflictingScoresError: a pair has two values, here or in a unit of the same pairs.
    """
    queries, documents, values = _distinct(query_rows, document_rows, values, log)
    fresh = []
    for start in range(0, len(queries), unit_rows):
        part = slice(start, start + unit_rows)
        unit = log.unit(queries[part], documents[part])  # sorted already, so its order is ours
        if log.commit(unit, values[part], provenance):
            fresh.append(unit.name)
        else:
            _same_pairs(log, unit.name, values[part])
    return fresh


def _distinct(
    queries: NDArray[np.int64], documents: NDArray[np.int64], values: NDArray[np.float32], log: PairLog
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Sort by key; a pair named twice with one value counts once, with two values it is an error."""
    order = np.argsort((queries << 32) | documents, kind="stable")
    queries, documents, values = queries[order], documents[order], values[order]
    first = np.ones(len(queries), dtype=np.bool_)
    first[1:] = (queries[1:] != queries[:-1]) | (documents[1:] != documents[:-1])
    if first.all():
        return queries, documents, values
    kept = values[first][np.cumsum(first) - 1]
    bad = np.flatnonzero(np.abs(values.astype(np.float64) - kept) > tolerance(log.spec.dtype, kept))
    if len(bad):
        i = bad[0]
        pair = (log.queries.ids[queries[i]], log.documents.ids[documents[i]])
        raise ConflictingScoresError(
            f"{log.folder}: {len(bad)} repeated pairs differ in score, for example {pair}: {kept[i]:.6g} and "
            f"{values[i]:.6g}. Remove the wrong ones.",
            pair,
        )
    return queries[first], documents[first], values[first]


def _same_pairs(log: PairLog, name: str, values: NDArray[np.float32]) -> None:
    """A unit that exists must hold these values."""
    part = log.read(name)
    bad = np.flatnonzero(np.abs(part.scores.astype(np.float64) - values) > tolerance(log.spec.dtype, values))
    if len(bad):
        i = bad[0]
        raise ConflictingScoresError(
            f"{log.folder}: {len(bad)} of {len(values)} pairs were stored before with another score, for example "
            f"{part.scores[i]:.6g}, now {values[i]:.6g}. Is it another teacher? Then give it its own folder.",
            (log.queries.ids[part.query_rows[i]], log.documents.ids[part.document_rows[i]]),
        )


def write_nodes(
    folder: str | Path,
    spec: TeacherSpec,
    logits: NDArray[np.floating],
    graph_fingerprint: str,
    *,
    provenance: dict[str, Any] | None = None,
    dtype: Dtype | None = None,
) -> NodeScores:
    """Commit the logits of every node to a store (made when absent), compact it and open it.

    Args:
        folder: where; an existing store must be of the same teacher and graph.
        spec: the teacher, of kind "rows".
        logits: [nodes, classes], finite.
        graph_fingerprint: identity of edges, features and node order.
        provenance: JSON values for the manifest.
        dtype: of the snapshot; float32 unless told.

    Raises:
        ConflictingScoresError: the store holds other logits of this teacher.
        DataError: logits of another shape, or not finite.
    """
    values = np.asarray(logits, dtype=np.float32)
    if values.ndim != 2:
        raise DataError(f"write_nodes: logits of shape {values.shape}; expected [nodes, classes].")
    log = RowLog.open(folder, spec, graph_fingerprint, *values.shape)
    for low, high in log.plan(NODE_UNIT_ROWS):
        if not log.commit(low, values[low:high], provenance):
            stored = read_row_part(log.folder, log.unit(low, high)).values
            delta = np.abs(stored.astype(np.float64) - values[low:high])
            if (delta > tolerance(spec.dtype, stored)).any():
                raise ConflictingScoresError(
                    f"{folder}: nodes {low}-{high - 1} were stored before with other logits (largest difference "
                    f"{delta.max():.6g}). Is it another teacher? Then give it its own folder."
                )
    compact(folder, dtype=dtype)
    return NodeScores.open(Path(folder))
