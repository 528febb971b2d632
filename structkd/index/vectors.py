"""Vectors as they come in: checked, in float32, normalised under cosine; the device; exact scores of chosen pairs."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError, DeviceError, UsageError

Vectors = NDArray[Any] | Tensor
Metric = str  # one of METRICS, checked at the border
Pick = Callable[[Tensor], Tensor]  # rows [list] -> vectors [list, dim]
METRICS = ("cosine", "ip", "l2")
_UNIT = 2.0**-24  # unit roundoff of float32


def as_tensor(vectors: Vectors, what: str = "vectors") -> Tensor:
    """Numbers [rows, dim] as a tensor that shares memory where it can; floating point of any width, or integers.

    Raises:
        DataError: not two dimensions, or no numbers.
    """
    if isinstance(vectors, Tensor):
        tensor = vectors.detach()
    else:
        array = np.asarray(vectors)
        if array.dtype.kind not in "fiu":
            raise DataError(f"{what}: found values of type {array.dtype}, expected real numbers.")
        with warnings.catch_warnings():  # a read-only memory map: torch warns about writing, and nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise DataError(f"{what}: found values of type {tensor.dtype}, expected real numbers.")
    if tensor.ndim != 2:
        raise DataError(f"{what}: found shape {list(tensor.shape)}, expected two dimensions [rows, dim].")
    return tensor


def drawn_rows(count: int, sample: int, seed: int) -> NDArray[np.int64]:
    """At most `sample` of `count` rows, without repetition, in storage order."""
    return np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))


def check_k(k: int) -> None:
    """UsageError unless k is a positive integer."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"k is {k!r}; expected a whole number of at least 1.")


def check_metric(metric: str) -> None:
    """UsageError unless the metric is known."""
    if metric not in METRICS:
        raise UsageError(f"metric {metric!r} is unknown; expected one of {', '.join(METRICS)}.")


def check_dim(found: int, expected: int, where: str) -> None:
    """DataError with both dimensions when they differ."""
    if found != expected:
        raise DataError(
            f"{where}: found {found} dimensions, expected {expected} as in the index. Was it another encoder?"
        )


def prepare(block: Tensor, metric: Metric, names: Callable[[int], str], what: str) -> Tensor:
    """A block of vectors in float32, normalised under cosine (in float64, so that scale does not matter).

    Args:
        block: [rows, dim], any real type.
        metric: cosine divides by the Euclidean norm and refuses zero rows.
        names: row of the block -> what to call it in an error.
        what: "document" or "query".

    Raises:
        DataError: a row holds not-a-number or infinity, is zero under cosine, or overflows float32 under ip and l2.
    """

    def refuse(rows: Tensor, why: str, remedy: str) -> None:
        if bool(rows.any()):
            first = int(rows.nonzero()[0])
            raise DataError(f"{what} {names(first)}: the vector {why} ({int(rows.sum())} such rows). {remedy}")

    refuse(~torch.isfinite(block).all(dim=1), "holds a value that is not finite", "Encode it again or remove it.")
    if metric != "cosine":
        values = block.to(torch.float32).contiguous()
        refuse(
            ~torch.isfinite(values).all(dim=1),
            "holds a value beyond float32's 3.4e38",
            "Scale the vectors or use the metric 'cosine'.",
        )
        return values
    wide = block.to(torch.float64)
    if block.dtype == torch.float64:  # squares of float32 values fit in float64, those of float64 values may not
        wide = wide / wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    norms = wide.norm(dim=1, keepdim=True)
    refuse(norms[:, 0] == 0, "is zero, and cosine has no value there", "Remove it or use the metric 'ip'.")
    normalised: Tensor = (wide / norms).to(torch.float32).contiguous()
    return normalised


def prepare_queries(queries: Vectors, metric: Metric, dim: int) -> Tensor:
    """Checked float32 queries, normalised under cosine."""
    tensor = as_tensor(queries, "queries")
    check_dim(tensor.shape[1], dim, "queries")
    return prepare(tensor, metric, lambda row: f"at row {row}", "query")


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" takes a GPU when there is one.

    Raises:
        DeviceError: a GPU was named and there is none; it never falls back silently.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; expected auto, cpu, cuda or cuda:N.") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"device {str(device)!r} was asked for and {torch.cuda.device_count()} CUDA devices are there. "
            "Use device='cpu' or 'auto'."
        )
    return found


def picker(vectors: Tensor) -> Pick:
    """Copies of chosen rows of vectors that are in memory or mapped, on their device."""
    return lambda rows: torch.index_select(vectors, 0, rows.to(vectors.device))  # twice as fast as [...]


def exact_scores(queries: Tensor, pick: Pick, rows: Tensor, metric: Metric) -> Tensor:
    """Scores of chosen (query, row) pairs, computed in float64 and rounded once to float32.

    ip and cosine: <q, x>; l2: -|q - x|^2. The value of a pair depends on its two vectors alone (not on the batch, the
    block or the device), so identical documents tie exactly and the tie rule decides between them.

    Args:
        queries: float32 [queries, dim].
        pick: rows -> their vectors, float32 [list, dim], on whatever device; they are moved.
        rows: int64 [queries, list]; -1 gives minus infinity.
        metric: which of the formulas.

    Returns:
        float32 [queries, list] on the device of `queries`.
    """
    out = torch.empty(rows.shape, dtype=torch.float32, device=queries.device)
    width = max(1, rows.shape[1] * queries.shape[1])
    step = max(1, (1 << 18 if queries.device.type == "cpu" else 1 << 24) // width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        picked = rows[part].clamp(min=0)
        chosen = pick(picked.reshape(-1)).to(queries.device).double().view(*picked.shape, -1)
        query = queries[part].double().unsqueeze(1)
        if metric == "l2":
            out[part] = (0.0 - chosen.sub_(query).square_().sum(dim=-1)).float()  # 0 and not -0 at distance 0
        else:
            out[part] = chosen.mul_(query).sum(dim=-1).float()
    return out.masked_fill_(rows < 0, -torch.inf)


def rounding_margin(
    queries: Float[Tensor, "queries dim"], metric: Metric, largest_norm: float
) -> Float[Tensor, "queries 1"]:
    """Twice the rounding error that a float32 product can have (Higham 2002, eq. 3.5: |error| <= n u |q| |x|).

    For l2 it is that of <q, x> - |x|^2 / 2, by which distances are ranked.

    Args:
        queries: prepared queries.
        metric: cosine, ip or l2.
        largest_norm: of the indexed vectors.
    """
    norms, dim = queries.norm(dim=1, keepdim=True), queries.shape[1]
    if metric == "l2":  # the second term: scores that were settled are rounded at the size of |q - x|^2
        rounding: Tensor = (dim + 4) * (norms * largest_norm + largest_norm**2) + 4 * (norms + largest_norm).square()
    else:
        rounding = (dim + 2) * norms * largest_norm
    return rounding.mul(2 * _UNIT)
