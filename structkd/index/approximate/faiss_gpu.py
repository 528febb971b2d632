"""A faiss index on a GPU: whether to use one, the copy that fits there, and searches that halve when memory runs out.

Scores of what is found are computed from the stored float32 vectors anyway, so a copy in half precision changes at most
which candidates are proposed. Nothing is ever truncated, and a GPU that was named never becomes a CPU silently.
"""

from functools import cache
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from structkd.errors import DeviceError
from structkd.index.vectors import resolve_device
from structkd.progress import note

LARGEST_K = 2048  # of the classic faiss GPU indexes
_KINDS = ("faiss-flat", "ivf-sq8")  # faiss has no GPU form of 4-bit fast-scan codes and of HNSW


def copy_for(kind: str, engine: Any, device: str | torch.device) -> "GpuCopy | None":
    """The engine's copy on the GPU that `device` asks for; None on the CPU. "auto" says why a GPU is not used.

    Raises:
        DeviceError: a GPU was named, and faiss has none, has no GPU form of the kind, or it does not fit.
    """
    target = resolve_device(device)
    if target.type != "cuda":
        return None
    number = target.index or 0
    try:
        _check(kind, target)
        return GpuCopy(engine, number)
    except DeviceError as error:
        if str(device) != "auto":
            raise
        note(f"index: searching on the CPU: {error}")
        return None


class GpuCopy:
    """An engine on one GPU, in full precision where it fits, else in half."""

    def __init__(self, engine: Any, device: int) -> None:
        self._device = device
        self._engine: Any = None
        self._resources = resources(device)  # kept: it must outlive the copy
        for half in (False, True):
            options = faiss.GpuClonerOptions()
            options.useFloat16 = half
            try:
                self._engine = faiss.index_cpu_to_gpu(self._resources, device, engine, options)
            except RuntimeError as error:
                _check_memory(error)
                continue
            if half:
                note(f"index: in half precision on cuda:{device}, since full precision does not fit")
            return
        raise DeviceError(
            f"cuda:{device}: {engine.ntotal:,} vectors do not fit, not even in half precision. "
            "Use a kind with smaller codes, another GPU or device='cpu'."
        )

    def set_nprobe(self, nprobe: int) -> None:
        """How many inverted lists a search looks at."""
        self._engine.nprobe = nprobe

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and rows [queries, k]; the batch is halved while the GPU runs out of memory.

        Raises:
            DeviceError: not even one query fits.
        """
        try:
            scores, rows = self._engine.search(queries, k)
            return scores, rows
        except RuntimeError as error:
            _check_memory(error)
        if len(queries) < 2:
            raise DeviceError(f"cuda:{self._device}: out of memory at one query. Free the device or use device='cpu'.")
        middle = len(queries) // 2
        halves = [self.search(part, k) for part in (queries[:middle], queries[middle:])]
        return np.concatenate([scores for scores, _ in halves]), np.concatenate([rows for _, rows in halves])


@cache
def resources(device: int) -> Any:
    """The one resources object of a device in this process: each takes 1.5 GB of the GPU for itself."""
    return faiss.StandardGpuResources()


def _check(kind: str, target: torch.device) -> None:
    """DeviceError when the installed faiss cannot search this kind on the GPU."""
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if gpus <= (target.index or 0):
        raise DeviceError(
            f"device {str(target)!r} was asked for and the installed faiss sees no GPU of that number. "
            "Run: pip install 'structkd[gpu]', or use device='cpu'."
        )
    if kind not in _KINDS:
        raise DeviceError(
            f"faiss cannot search the kind {kind!r} on a GPU. Use {' or '.join(_KINDS)}, 'flat', or device='cpu'."
        )


def _check_memory(error: RuntimeError) -> None:
    """Raise again what is not a lack of memory."""
    said = str(error).lower()
    if "out of memory" not in said and "cudamalloc" not in said and "outofmemory" not in said:
        raise error
