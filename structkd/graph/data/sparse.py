"""A constant sparse matrix that multiplies dense tensors, with gradient for the dense side."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from structkd.errors import DataError
from structkd.graph.kernels import _layers


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """Compressed sparse rows: float32 or float64 values, int64 columns, sorted within a row."""

    starts: Int[Tensor, " rows_plus_one"]
    columns: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    num_columns: int

    @classmethod
    def of(cls, matrix: Any, dtype: torch.dtype = torch.float32) -> "SparseMatrix":
        """From any scipy sparse matrix or dense array."""
        csr = sp.csr_array(matrix)
        csr.sum_duplicates()
        return cls(
            torch.from_numpy(csr.indptr.astype(np.int64)),
            torch.from_numpy(csr.indices.astype(np.int64)),
            torch.from_numpy(np.ascontiguousarray(csr.data)).to(dtype),
            int(csr.shape[1]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.starts) - 1, self.num_columns

    @property
    def density(self) -> float:
        """Share of entries that are stored."""
        rows, columns = self.shape
        return len(self.values) / max(1, rows * columns)

    @cached_property
    def scipy(self) -> sp.csr_array:
        """The same matrix as scipy's; shares memory."""
        parts = (self.values.numpy(), self.columns.numpy(), self.starts.numpy())
        return sp.csr_array(parts, shape=self.shape)

    def rows(self, rows: Int[Tensor, " some"]) -> "SparseMatrix":
        """The rows asked for, in that order."""
        return SparseMatrix.of(self.scipy[rows.numpy()], self.values.dtype)

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The same matrix with its zeros."""
        return torch.from_numpy(self.scipy.toarray())

    def with_values(self, values: Float[Tensor, " entries"]) -> "SparseMatrix":
        """The same pattern with other values; a transposed pattern that is known goes along."""
        other = SparseMatrix(self.starts, self.columns, values, self.num_columns)
        if "_flipped" in self.__dict__:
            other.__dict__["_flipped"] = self._flipped
        return other

    @cached_property
    def _flipped(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row starts and columns of the transposed pattern, and where each of its entries stands in this matrix."""
        rows, columns = self.shape
        places = sp.csr_array((np.arange(len(self.values)), self.columns.numpy(), self.starts.numpy()), (rows, columns))
        flipped = sp.csr_array(places.T.tocsr())
        return tuple(
            torch.from_numpy(part.astype(np.int64)) for part in (flipped.indptr, flipped.indices, flipped.data)
        )  # type: ignore[return-value]

    @cached_property
    def transposed(self) -> "SparseMatrix":
        """Columns as rows; kept, since every backward pass needs it."""
        starts, columns, order = self._flipped
        return SparseMatrix(starts, columns, self.values[order], self.shape[0])

    def product(self, dense: Float[Tensor, "columns width"]) -> Float[Tensor, "rows width"]:
        """(this matrix) @ dense, differentiable in `dense`.

        Raises:
            DataError: the widths do not fit.
        """
        if dense.shape[0] != self.num_columns:
            raise DataError(f"sparse matrix of shape {self.shape} times {tuple(dense.shape)}: the inner sizes differ.")
        out: Tensor = _Product.apply(dense, self)  # type: ignore[no-untyped-call]
        return out


def row_starts(counts: Int[Tensor, " rows"]) -> Int[Tensor, " rows_plus_one"]:
    """Where each row's entries begin, in 64 bits: graphs of more than 2^31 edges are ordinary here."""
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, dtype=torch.int64, out=starts[1:])
    return starts


class _Product(torch.autograd.Function):
    """Sparse times dense; the gradient is the transposed product."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        return _multiply(matrix, dense)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.transposed.product(gradients[0]), None


def _multiply(matrix: SparseMatrix, dense: Tensor) -> Tensor:
    parts = matrix.starts, matrix.columns, matrix.values.to(dense.dtype)
    if dense.is_cuda:
        starts, columns, values = (part.to(dense.device) for part in parts)
        return torch.mm(torch.sparse_csr_tensor(starts, columns, values, size=matrix.shape), dense.detach())
    # on CPU torch wheels bring no sparse BLAS, and scipy's loop is not vectorised
    out = dense.new_empty(matrix.shape[0], dense.shape[1])
    arrays = (part.contiguous().numpy() for part in (*parts, dense.detach()))
    _layers.multiply_rows(*arrays, out.numpy())
    return out
