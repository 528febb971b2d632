"""NodeScores: teacher logits of every node of a graph, mapped from a snapshot or gathered from the parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError, MissingScoreError, TeacherMismatchError
from structkd.scores.compaction.rows import gather
from structkd.scores.layout._lookup import gather_rows
from structkd.scores.layout.parts import part_names, read_row_range, uncovered
from structkd.scores.layout.snapshot import checked_path, latest, map_rows
from structkd.scores.layout.topk import read_topk
from structkd.scores.manifest import PUBLISHED, Header, ScoreManifest, TeacherSpec

FloatArray = NDArray[np.float32]


class NodeScores:
    """An open store of node logits; read-only, safe to share between threads and processes."""

    def __init__(
        self, folder: Path, header: Header, manifest: ScoreManifest | None, blocks: Sequence[NDArray[np.floating]]
    ) -> None:
        self.folder, self.header, self.manifest = folder, header, manifest
        self._blocks = list(blocks)
        self._starts = np.cumsum([0, *(len(block) for block in blocks)])
        self._dense: FloatArray | None = None

    @classmethod
    def open(cls, folder: Path, *, verify: str = "size") -> "NodeScores":
        """Open the store in `folder`; see `structkd.scores.open`."""
        if (folder / PUBLISHED).is_file():
            return cls._open_published(folder, verify)
        header = Header.read(folder)
        for _ in range(10):  # gc may remove an old snapshot between reading its manifest and mapping its files
            manifest = latest(folder)
            try:
                blocks = [map_rows(checked_path(folder, entry, verify)) for entry in manifest.files] if manifest else []
                break
            except FileNotFoundError as error:
                lost = error
        else:
            raise DataError(f"{lost.filename}: {lost.strerror}. Restore it, or delete the manifest and compact again.")
        if manifest is None:
            blocks = [_from_parts(folder, header)]
        return cls(folder, header, manifest, blocks)

    @classmethod
    def _open_published(cls, folder: Path, verify: str) -> "NodeScores":
        manifest = ScoreManifest.read(folder / PUBLISHED)
        data = [entry for entry in manifest.files if entry["path"].startswith("data/")]
        paths = [checked_path(folder, entry, verify) for entry in data]
        blocks: list[NDArray[np.floating]] = (
            [read_topk(path, int(manifest.inputs["classes"])) for path in paths]
            if "top" in manifest.inputs
            else [map_rows(path) for path in paths]
        )
        header = Header(manifest.spec, manifest.inputs["graph_fp"], manifest.counts["rows"], blocks[0].shape[1])
        return cls(folder, header, manifest, blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers that get the store by pickle map the files themselves."""
        return _reopen, (type(self), self.folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"NodeScores({str(self.folder)!r}: {len(self)} nodes of {self.spec.model!r})"

    @property
    def spec(self) -> TeacherSpec:
        """The teacher."""
        return self.header.spec

    @property
    def dtype(self) -> str:
        """Dtype on disk: float16 or float32."""
        return str(self._blocks[0].dtype) if self._blocks else "float32"

    @property
    def graph_fingerprint(self) -> str:
        """Identity of the graph: edges, features and node order."""
        return str(self.header.graph_fingerprint)

    def require_graph(self, fingerprint: str) -> None:
        """TeacherMismatchError unless the logits belong to this graph."""
        if fingerprint != self.graph_fingerprint:
            raise TeacherMismatchError(str(self.folder), {"graph_fingerprint": (self.graph_fingerprint, fingerprint)})

    @property
    def logits(self) -> FloatArray:
        """float32 [nodes, classes]; a read-only view of the file when it is one float32 block."""
        if self._dense is None:
            whole = self._blocks[0] if len(self._blocks) == 1 else np.concatenate(self._blocks)
            self._dense = whole.astype(np.float32, copy=False)
            self._dense.flags.writeable = False
        return self._dense

    def take(self, rows: NDArray[np.integer] | Sequence[int], out: FloatArray | None = None) -> FloatArray:
        """float32 [rows, classes]; MissingScoreError for rows outside the graph (they are never clipped or wrapped).

        Args:
            rows: node rows.
            out: [rows, classes] array to write into: a training step that keeps one saves its allocation.
        """
        at: NDArray[np.int64] = np.asarray(rows, dtype=np.int64)
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            outside = (at < 0) | (at >= len(self))
            raise MissingScoreError(
                int(outside.sum()),
                at[outside][:3].tolist(),
                f"{self.folder}: node rows (0 .. {len(self) - 1} exist)",
                "Is it another graph?",
            )
        shape = (len(at), self._blocks[0].shape[1] if self._blocks else 0)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise DataError(f"take: out has shape {out.shape} and dtype {out.dtype}; expected float32 {shape}.")
        if len(self._blocks) == 1:
            gather_rows(self._blocks[0], at, out)
            return out
        block = np.searchsorted(self._starts, at, side="right") - 1
        for number in np.unique(block):
            here = np.flatnonzero(block == number)
            own = np.empty((len(here), shape[1]), dtype=np.float32)
            gather_rows(self._blocks[number], at[here] - self._starts[number], own)
            out[here] = own
        return out


def _from_parts(folder: Path, header: Header) -> FloatArray:
    """Gather an uncompacted store; MissingScoreError names the nodes without logits."""
    nodes, classes = header.num_nodes or 0, header.num_classes or 0
    ranges = [(*read_row_range(folder, name), name) for name in part_names(folder)]
    if missing := uncovered([(low, high) for low, high, _ in ranges], nodes):
        raise MissingScoreError(
            sum(high - low for low, high in missing),
            [f"{low}-{high - 1}" for low, high in missing],
            f"{folder}: of {nodes} nodes",
            "Score them with this teacher first.",
        )
    return gather(folder, ranges, 0, nodes, classes, header.spec.dtype)


def _reopen(kind: type[NodeScores], folder: Path) -> NodeScores:
    return kind.open(folder)
