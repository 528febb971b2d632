"""Which parts went into a snapshot: one line a part in a file beside the manifest, which names its checksum.

    <root>/snapshots/00000007-<sha16>.parts   lines of `unit rows payload_hash sha256`, sorted

The manifest itself holds only how many and the digest of their names, so that opening a store of thousands of parts
compares two digests; the lines are read when a name is new, and by compaction and `verify`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structkd.errors import CorruptFileError
from structkd.files import create_exclusive, inside, write_text
from structkd.scores.layout.sealed import temporary


@dataclass(frozen=True)
class PartList:
    """The lines of a snapshot's parts."""

    lines: tuple[str, ...] = ()

    @property
    def units(self) -> set[str]:
        """Names of the parts."""
        return {line.partition(" ")[0] for line in self.lines}

    def digests(self) -> dict[str, str]:
        """Unit -> SHA-256 of its part's file."""
        return {line.partition(" ")[0]: line.rpartition(" ")[2] for line in self.lines}

    def write(self, folder: Path, number: int) -> dict[str, Any]:
        """Write the list of snapshot `number` (before its manifest); returns the manifest's entry."""
        lines = sorted(self.lines)
        text = "".join(f"{line}\n" for line in lines)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = folder / "snapshots" / f"{number:08d}-{digest[:16]}.parts"
        draft = temporary(path.parent)
        write_text(draft, text)
        create_exclusive(draft, path)  # the name is the content's: a file that has it is this one
        return {
            "count": len(lines),
            "names": names_digest(line.partition(" ")[0] for line in lines),
            "path": path.relative_to(folder).as_posix(),
            "bytes": len(text.encode()),
            "sha256": digest,
        }

    @classmethod
    def read(cls, folder: Path, entry: dict[str, Any]) -> "PartList":
        """The list that a manifest names; CorruptFileError when its bytes are others."""
        path = inside(folder, entry["path"])
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptFileError(f"{path}: its bytes differ from the manifest's checksum. Restore it from a copy.")
        return cls(tuple(data.decode().splitlines()))


def names_digest(names: Iterable[str]) -> str:
    """Identity of a set of parts: SHA-256 over their sorted names."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
