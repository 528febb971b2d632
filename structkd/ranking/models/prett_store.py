"""Stored document layers of a PreTT model: a memory-mapped table of token states, found by the document's text."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from structkd.errors import DataError, UsageError
from structkd.files import read_json, write_json, write_text
from structkd.ids import Texts, text_hash
from structkd.ranking.models.maxsim import IntArray, Ragged
from structkd.ranking.models.scorer import whole_folder

DTYPES = ("float16", "float32")


class DocumentStates:
    """States of many documents, read where they are asked for.

    The folder holds states.npy [tokens, dimension], starts.npy, hashes.npy (16 bytes of each text's SHA-256), ids.txt
    and structkd.json, which is written last.

    Attributes:
        folder: where they lie.
        identity: fingerprint of the model that made them.
        count: documents.
        bytes_per_document: mean size of a document's states.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        described = read_json(self.folder / "structkd.json")
        if not isinstance(described, dict) or described.get("kind") != "prett-documents":
            raise DataError(f'{self.folder}: holds no document layers; expected "kind": "prett-documents".')
        try:
            self._states = np.load(self.folder / "states.npy", mmap_mode="r")
            self._starts: IntArray = np.load(self.folder / "starts.npy")
            hashes = np.load(self.folder / "hashes.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder}: the stored layers cannot be read ({error}). Encode again.") from None
        if len(self._starts) != len(hashes) + 1 or self._starts[-1] != len(self._states):
            raise DataError(f"{self.folder}: the files are of different documents. Encode again.")
        self.identity, self.count = str(described["identity"]), len(hashes)
        self._row = {row.tobytes(): position for position, row in enumerate(hashes)}

    @property
    def bytes_per_document(self) -> float:
        """Mean size of a document's states."""
        return float(self._states.nbytes) / max(self.count, 1)

    def find(self, hashes: Sequence[bytes]) -> IntArray:
        """Row of each text, -1 where it is not stored."""
        return np.asarray([self._row.get(one, -1) for one in hashes], dtype=np.int64)

    def read(self, rows: IntArray) -> Ragged:
        """States of these rows in float32."""
        sizes = np.diff(self._starts)
        table = Ragged(torch.empty(0, self._states.shape[1]), self._starts[:-1], sizes)
        lengths = sizes[rows]
        states = torch.from_numpy(self._states[table.rows(rows)].astype(np.float32))
        return Ragged(states, np.cumsum(lengths) - lengths, lengths)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        identity: str,
        documents: Texts,
        blocks: Iterable[list[NDArray[np.float32]]],
        dimension: int,
        dtype: str = "float16",
    ) -> "DocumentStates":
        """Write the folder, whole or not at all; `blocks` are the documents' states in order.

        Raises:
            UsageError: another type than float16 or float32.
            DataError: a state beyond the type's range.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown; expected {' or '.join(DTYPES)}.")
        lengths: list[int] = []
        with whole_folder(folder) as temporary:
            with open(temporary / "raw", "wb") as handle:
                for block in blocks:
                    for states in block:
                        with np.errstate(over="ignore"):  # refused just below
                            values = states.astype(dtype)
                        if not np.isfinite(values).all():
                            name = documents.ids[len(lengths)]
                            raise DataError(f"document {name!r}: its states do not fit {dtype}; use float32.")
                        handle.write(values.tobytes())
                        lengths.append(len(values))
            starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            shape = (int(starts[-1]), dimension)
            with open(temporary / "states.npy", "wb") as target:  # a .npy header, then the bytes as they are
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(target, header)
                with open(temporary / "raw", "rb") as source:
                    while chunk := source.read(1 << 24):
                        target.write(chunk)
            (temporary / "raw").unlink()
            np.save(temporary / "starts.npy", starts)
            hashes = b"".join(text_hash(text) for text in documents.texts)
            np.save(temporary / "hashes.npy", np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 16))
            write_text(temporary / "ids.txt", "".join(f"{one}\n" for one in documents.ids))
            write_json(temporary / "structkd.json", {"kind": "prett-documents", "identity": identity, "dtype": dtype})
        return cls(folder)
