"""A score file becomes a store: block by block, whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import ConflictingScoresError, DataError
from structkd.files import sha256_file, sync_folder
from structkd.progress import track
from structkd.scores.compaction.compact import Dtype, compact
from structkd.scores.compaction.merge import tolerance
from structkd.scores.formats import registry
from structkd.scores.formats.base import Blocks, NodeTable, ScoreTable
from structkd.scores.layout.log import PairLog
from structkd.scores.layout.sealed import temporary
from structkd.scores.manifest import HEADER, TeacherSpec
from structkd.scores.store import commit_pairs, write_nodes

UNIT_ROWS = 1 << 17  # no teacher is asked, so a unit may be large
Texts = Callable[[ScoreTable], ScoreTable]


def import_file(
    path: str | Path,
    to: str | Path,
    *,
    format: str = "auto",
    teacher_name: str | None = None,
    dtype: Dtype | None = None,
    texts: Texts | None = None,
    opened: Callable[[], tuple[str, Blocks | NodeTable]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Read a score file into a store in constant memory; returns the format.

    A new store appears whole or not at all. Into a store that is there (of the same teacher) the file's pairs are
    added; when the file turns out to be broken, what was added is taken back.

    Args:
        path: the file.
        to: folder of the store.
        format: a name of `READERS`; auto tells it from the content.
        teacher_name: who made the scores; default: the file's name.
        dtype: of the snapshot; see `compact`.
        texts: adds texts to a block whose file has ids alone.
        opened: gives the format and its blocks, for a file that no reader of `READERS` understands alone.
        say: is told what the user should know about the file.

    Raises:
        DataError: with file and line.
        ConflictingScoresError: a pair has two values; names both lines.
        TeacherMismatchError: the folder holds another teacher's scores.
    """
    path, to = Path(path), Path(to)
    opened = opened or (lambda: registry.stream(path, format))
    chosen, found = opened()
    name = teacher_name or path.name
    provenance: dict[str, Any] = {"source": path.name, "format": chosen}
    if path.is_file():
        provenance["source_sha256"] = sha256_file(path)
    if isinstance(found, NodeTable):
        for note in found.notes:
            say(note)
        provenance |= {"notes": list(found.notes)} if found.notes else {}
        spec = TeacherSpec(name, kind="rows")
        write_nodes(to, spec, found.logits, found.graph_fingerprint, provenance=provenance, dtype=dtype or "float32")
        return chosen
    first = next(found)
    spec = TeacherSpec(name, extra={} if first.kind == "score" else {"score_kind": first.kind})
    fill = _Fill(path, spec, provenance, texts, say)
    try:
        if (to / HEADER).is_file() or (to.is_dir() and any(to.iterdir())):
            fill.add(to, first, found, dtype)
        else:
            _anew(fill, to, first, found, dtype)
    except ConflictingScoresError as error:
        raise _located(error, path, opened, spec, to) from None
    return chosen


class _Fill:
    """Puts blocks into a store."""

    def __init__(
        self, path: Path, spec: TeacherSpec, provenance: dict[str, Any], texts: Texts | None, say: Callable[[str], None]
    ) -> None:
        self._path, self._spec, self._provenance, self._texts, self._say = path, spec, provenance, texts, say

    def add(self, folder: Path, first: ScoreTable, blocks: Blocks, dtype: Dtype | None) -> None:
        """Commit and compact every block; on an error the units committed here are removed."""
        log = PairLog.open(folder, self._spec)
        fresh: list[str] = []
        try:
            held, notes = first, list(first.notes)
            for block in track(blocks, "importing, blocks", late=True):
                notes += block.notes
                if len(block):  # the last block waits, since the notes go with it
                    fresh += self._commit(log, held, self._provenance)
                    held = block
            for note in notes:
                self._say(note)
            fresh += self._commit(log, held, self._provenance | ({"notes": notes} if notes else {}))
            compact(folder, dtype=dtype)
        except BaseException:
            log.withdraw(fresh)
            raise

    def _commit(self, log: PairLog, block: ScoreTable, provenance: dict[str, Any]) -> list[str]:
        large = np.abs(block.scores) > np.finfo(np.float32).max
        if large.any():
            at = int(large.argmax())
            raise DataError(
                f"{self._path}{block.place(at)}: score {block.scores[at]:g} is beyond the range of float32."
            )
        block = self._texts(block) if self._texts else block
        return commit_pairs(
            log,
            log.queries.intern(block.query_ids, block.query_texts),
            log.documents.intern(block.document_ids, block.document_texts),
            block.scores.astype(np.float32),
            provenance,
            UNIT_ROWS,
        )


def _anew(fill: _Fill, to: Path, first: ScoreTable, blocks: Blocks, dtype: Dtype | None) -> None:
    """A new store is filled beside its place and then moved there."""
    if to.exists() and not to.is_dir():
        raise DataError(f"{to}: is a file; expected a folder for teacher scores.")
    draft = temporary(to.absolute().parent)
    try:
        fill.add(draft, first, blocks, dtype)
        os.rename(draft, to)  # an empty folder there is replaced
        sync_folder(to.absolute().parent)
    except FileExistsError:
        raise DataError(f"{to}: another process made it meanwhile. Run the line again to add to it.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _located(
    error: ConflictingScoresError,
    path: Path,
    opened: Callable[[], tuple[str, Blocks | NodeTable]],
    spec: TeacherSpec,
    folder: Path,
) -> ConflictingScoresError:
    """The conflict with the lines of the file where the pair stands."""
    if error.pair is None:
        return error
    query, document = error.pair
    places: list[tuple[str, float]] = []
    _, blocks = opened()
    for block in () if isinstance(blocks, NodeTable) else blocks:
        for at in block.places_of(query, document):
            score = float(block.scores[at])
            if not places or abs(score - places[0][1]) > tolerance(spec.dtype, np.asarray(score)):
                places.append((f"{path}{block.place(at)}", score))
        if len(places) > 1:
            break
    if not places:
        return error
    where, score = places[-1]
    other = f"{places[0][0]} says {places[0][1]:.6g}" if len(places) > 1 else f"{folder} holds another score"
    return ConflictingScoresError(
        f"{where}: query {query!r}, document {document!r} has score {score:.6g}, but {other}. Remove the wrong one, or "
        "give another teacher its own folder.",
        error.pair,
    )
