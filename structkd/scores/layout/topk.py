"""Node logits as their k largest, for graphs of many classes: 34 bytes a node at k = 8 whatever the classes.

    topk_idx uint16 [nodes, k]   classes, largest logit first
    topk_val float16 [nodes, k]  their logits
    rest     float32 [nodes]     log-sum-exp of the other logits

Read back, the other classes share `rest` equally: the soft-max at temperature 1 of the k classes, and the mass of the
others together, are the teacher's up to the rounding of half floats.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from structkd.errors import CorruptFileError, UsageError

FloatArray = NDArray[np.float32]


def write_topk(path: Path, logits: FloatArray, top: int) -> None:
    """Write the `top` largest logits of each node.

    Raises:
        UsageError: as many as there are classes, or more classes than 16 bits number, or logits beyond half floats.
    """
    classes = logits.shape[1]
    if not 0 < top < classes or classes > 1 << 16:
        raise UsageError(f"top {top} of {classes} classes: expected 1 to {classes - 1}, and at most 65536 classes.")
    if float(np.abs(logits).max(initial=0)) > np.finfo(np.float16).max:
        raise UsageError(f"top {top}: logits beyond 65504 do not fit half floats. Publish all classes.")
    order = np.argsort(-logits, axis=1, kind="stable")
    kept = np.take_along_axis(logits, order[:, :top], 1)
    others = np.take_along_axis(logits, order[:, top:], 1).astype(np.float64)
    largest = others.max(axis=1)
    rest = largest + np.log(np.exp(others - largest[:, None]).sum(axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "topk_idx": order[:, :top].astype(np.uint16),
        "topk_val": kept.astype(np.float16),
        "rest": rest.astype(np.float32),
    }
    save_file(tensors, path, metadata={"classes": str(classes)})


def read_topk(path: Path, classes: int) -> FloatArray:
    """[nodes, classes] logits.

    Raises:
        CorruptFileError: the tensors are absent or do not fit each other.
    """
    try:
        tensors = load_file(path)
        rows, values, rest = (tensors[name] for name in ("topk_idx", "topk_val", "rest"))
        top = rows.shape[1]
        if values.shape != rows.shape or rest.shape != rows.shape[:1] or int(rows.max(initial=0)) >= classes:
            raise ValueError(f"tensors of shapes {rows.shape}, {values.shape}, {rest.shape} for {classes} classes")
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a file of the largest logits ({error}). Restore it from a copy.") from None
    out = np.repeat((rest - np.log(classes - top)).astype(np.float32)[:, None], classes, axis=1)
    np.put_along_axis(out, rows.astype(np.int64), values.astype(np.float32), axis=1)
    return out
