"""The graph as a filter: normalised adjacency, low and high band, agreement of student and teacher per band.

L = I - D^-1/2 A D^-1/2 has eigenvalues in [0, 2]; low ones are smooth signals over edges, high ones change along them
(Wu et al., "Extracting Low-/High-Frequency Knowledge from Graph Neural Networks", AAAI 2023, section 4). The bands
here use S = D~^-1/2 (A + I) D~^-1/2 with D~ = D + I: low = S, high = I - S. No eigendecomposition.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from structkd.errors import UsageError
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask, chunks
from structkd.graph.kernels import _sample

Normalisation = Literal["symmetric", "row"]
Signal = Float[Tensor, "nodes classes"]

_LARGE = 1 << 24
"Directed edges above which the matrix is not built."

_BLOCK = 1 << 16
"Rows that are summed at once."


def propagation(task: GraphTask, self_loops: float = 1.0, normalisation: Normalisation = "symmetric") -> SparseMatrix:
    """(A + self_loops I), scaled by degrees: D~^-1/2 . D~^-1/2 (symmetric) or D~^-1 . (row), D~ its row sums.

    An isolated node without self-loop keeps an empty row.
    """
    weighted = _with_loops(task, self_loops)
    sums = task.degrees.to(torch.float64) + self_loops
    entries = torch.repeat_interleave(torch.arange(task.num_nodes), weighted.starts.diff())
    safe = torch.where(sums > 0, sums, torch.ones_like(sums))
    row, column = safe[entries], safe[weighted.columns]
    scale = 1.0 / row if normalisation == "row" else 1.0 / torch.sqrt(row * column)
    return weighted.with_values((weighted.values.to(torch.float64) * scale).to(torch.float32))


def propagated(
    task: GraphTask,
    signal: Float[Tensor, "nodes width"],
    self_loops: float = 1.0,
    normalisation: Normalisation | Literal["none"] = "symmetric",
    out: Float[Tensor, "nodes width"] | None = None,
) -> Float[Tensor, "nodes width"]:
    """`propagation(task, ...)` times a signal without the matrix; "none" is the plain sum A + self_loops I.

    Needs the signal, the result and nothing else of either's size; both may be memory-mapped.
    """
    starts, columns = task.adjacency.starts.numpy(), task.adjacency.columns.numpy()
    out = torch.empty_like(signal) if out is None else out
    sums = np.diff(starts) + self_loops
    safe = np.where(sums > 0, sums, 1.0)
    ones = np.ones(len(safe), dtype=signal.numpy().dtype)
    scales = {
        "none": (ones, ones),
        "row": (ones, (1 / safe).astype(ones.dtype)),
        "symmetric": ((1 / np.sqrt(safe)).astype(ones.dtype),) * 2,
    }
    column_scale, row_scale = scales[normalisation]
    loop = ones.dtype.type(self_loops)
    source = signal.detach().contiguous().numpy()
    for rows in chunks(len(source), _BLOCK):
        block = out[rows].numpy()
        _sample.neighbour_sums(starts, columns, source, column_scale, row_scale, loop, rows.start, block)
    return out


def low_pass(task: GraphTask, signal: Signal) -> Signal:
    """S signal: node plus neighbours, normalised. On large graphs S is only built where a gradient asks for it."""
    if task.edge_index.shape[1] > _LARGE and not signal.requires_grad:
        return propagated(task, signal)
    return _smoother(task, signal).product(signal)


def high_pass(task: GraphTask, signal: Signal) -> Signal:
    """(I - S) signal: node minus that."""
    return signal - low_pass(task, signal)


def band_agreement(task: GraphTask, student: Signal, teacher: Signal) -> dict[str, float]:
    """Agreement of student with teacher probabilities per band.

    Returns:
        cos_low, cos_high: mean over nodes of cos(B s_i, B t_i), B = S and I - S; 1 is perfect.
        error_low, error_high: ||B (s - t)||_F / ||B t||_F; 0 is perfect.
    """
    out = {}
    for band, apply in (("low", low_pass), ("high", high_pass)):
        mine, wanted = apply(task, student), apply(task, teacher)
        # a node without neighbours has no high band on either side: nothing there to agree on
        present = (mine.norm(dim=1) > 0) | (wanted.norm(dim=1) > 0)
        cosines = torch.nn.functional.cosine_similarity(mine[present], wanted[present], dim=1)
        out[f"cos_{band}"] = float(cosines.mean()) if len(cosines) else 1.0
        norm = float(wanted.norm())
        out[f"error_{band}"] = float((mine - wanted).norm()) / norm if norm > 0 else 0.0
    return out


def band_energy(task: GraphTask, signal: Signal) -> dict[str, float]:
    """Share of the signal's energy in each band: ||S x||^2 and ||(I - S) x||^2 over their sum."""
    low, high = float(low_pass(task, signal).square().sum()), float(high_pass(task, signal).square().sum())
    total = low + high
    return {"low": low / total, "high": high / total} if total > 0 else {"low": 0.0, "high": 0.0}


def response(task: GraphTask, coefficients: Float[np.ndarray, " order"], signal: Signal) -> Signal:
    """Polynomial filter sum_k coefficients[k] S^k signal: one sparse product per order."""
    if not len(coefficients):
        raise UsageError("a spectral response needs one coefficient or more; found none.")
    smoother = _smoother(task, signal)
    out, power = float(coefficients[0]) * signal, signal
    for coefficient in coefficients[1:]:
        power = smoother.product(power)
        out = out + float(coefficient) * power
    return out


def chebyshev_bands(task: GraphTask, signal: Signal, bands: int = 8, order: int = 30) -> Float[Tensor, " bands"]:
    """Energy of the signal in `bands` equal intervals of the spectrum [0, 2] of L, without eigenvectors.

    Each band's indicator is expanded in Chebyshev polynomials of L - I with Jackson damping
    (Weisse et al., "The kernel polynomial method", 2006, eq. 71), so edges between bands are soft by about 2 / order.
    """
    operator = propagation(task, 0.0)  # L - I = -D^-1/2 A D^-1/2; an isolated node counts as eigenvalue 1
    terms = [signal, -operator.product(signal)]
    for _ in range(2, order + 1):
        terms.append(-2 * operator.product(terms[-1]) - terms[-2])
    energies = []
    for band in range(bands):
        high, low = np.arccos(-1 + 2 * band / bands), np.arccos(-1 + 2 * (band + 1) / bands)
        weights = _jackson(order) * _indicator(low, high, order)
        filtered = sum(float(weight) * term for weight, term in zip(weights, terms, strict=True))
        assert isinstance(filtered, Tensor)
        energies.append(float((signal * filtered).sum()))
    total = sum(energies)
    return torch.tensor([max(0.0, energy) / total if total > 0 else 0.0 for energy in energies])


def _smoother(task: GraphTask, signal: Tensor) -> SparseMatrix:
    smoother = task.__dict__.get("_smoother")
    if smoother is None:
        smoother = propagation(task)
        task.__dict__["_smoother"] = smoother  # a frozen task never changes, so neither does this
    return smoother if signal.dtype == torch.float32 else smoother.with_values(smoother.values.to(signal.dtype))


def _with_loops(task: GraphTask, weight: float) -> SparseMatrix:
    if weight == 0:
        return task.adjacency
    loops = torch.arange(task.num_nodes)
    rows = torch.cat([task.edge_index[0], loops])
    columns = torch.cat([task.edge_index[1], loops])
    values = torch.cat([torch.ones(task.edge_index.shape[1]), torch.full((task.num_nodes,), float(weight))])
    order = torch.argsort(rows * task.num_nodes + columns)
    starts = torch.zeros(task.num_nodes + 1, dtype=torch.int64)
    torch.cumsum(task.degrees + 1, 0, out=starts[1:])
    return SparseMatrix(starts, columns[order], values[order], task.num_nodes)


def _indicator(low: float, high: float, order: int) -> Float[np.ndarray, " terms"]:
    k = np.arange(1, order + 1)
    return np.concatenate([[(high - low) / np.pi], 2 * (np.sin(k * high) - np.sin(k * low)) / (np.pi * k)])


def _jackson(order: int) -> Float[np.ndarray, " terms"]:
    size, k = order + 2, np.arange(order + 1)
    damping = ((size - k) * np.cos(np.pi * k / size) + np.sin(np.pi * k / size) / np.tan(np.pi / size)) / size
    return np.asarray(damping)
