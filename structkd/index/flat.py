"""FlatIndex: exact search by blocked matrix products, on the CPU or a GPU; always there.

Each tile of documents is multiplied into one small buffer that is reused and stays in the cache; a running threshold
per query (its k-th best score so far) lets only survivors out of the buffer, so the queries x documents matrix never
exists. The few survivors are scored once more in float64 (`exact_scores`), because the float32 product of one and the
same pair depends on its place in the tile; a margin around the threshold covers that rounding: nothing is lost to it.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError, DeviceError
from structkd.index.folder.storage import Stored
from structkd.index.opened import OpenedVectors
from structkd.index.topk import TopK, ranked
from structkd.index.vectors import exact_scores, picker, resolve_device, rounding_margin

_TILE = {"cpu": 4096, "cuda": 65536}  # documents per product; on the CPU 256 x 4096 floats stay in the cache
_QUERIES = {"cpu": 256, "cuda": 4096}
_SMALLEST_TILE = 64
_GROUP = 64  # columns whose maximum is looked at first
_FLOAT32_MAX = float(np.finfo(np.float32).max)

Settle = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows [queries, list] -> the exact k best: rows, scores


class FlatIndex(OpenedVectors):
    """Exact nearest neighbours, kind "flat": also where several documents share the k-th score."""

    def __init__(self, stored: Stored, device: str | torch.device = "auto") -> None:
        super().__init__(stored)
        self.device = resolve_device(device)

    @cached_property
    def vectors(self) -> Float[Tensor, "count dim"]:
        """The stored vectors (normalised under cosine): memory-mapped, or on the GPU when they fit there."""
        host = self._stored.vectors
        if self.device.type != "cuda":
            return host
        free, _ = torch.cuda.mem_get_info(self.device)
        return (
            host.to(self.device) if host.numel() * 4 < 0.7 * free else host
        )  # else each tile is sent when it is needed

    @cached_property
    def _half_norms(self) -> Float[Tensor, " count"]:
        """|x|^2 / 2 of every vector."""
        step = _TILE["cuda"]
        parts = [self.vectors[at : at + step].square().sum(dim=1) / 2 for at in range(0, len(self), step)]
        return torch.cat(parts)

    @property
    def _largest_norm(self) -> float:
        return float(self.manifest.parameters["largest_norm"])

    def stored_rows(self, rows: Int[Tensor, " list"]) -> Float[Tensor, "list dim"]:
        """Copies of some stored vectors."""
        return self._stored.pick(rows)

    def search_prepared(self, queries: Float[Tensor, "queries dim"], k: int) -> TopK:
        """`search` for vectors as they are stored: float32, finite, normalised under cosine."""
        return self._search(queries, k)

    def _search(self, queries: Float[Tensor, "queries dim"], k: int) -> TopK:
        size, found = _QUERIES[self.device.type], []
        for start in range(0, len(queries), size):
            found.append(self._search_block(queries[start : start + size], k))
        rows = [np.concatenate(part) for part in zip(*found, strict=True)] if found else _nothing(k)
        return TopK(rows[0], rows[1], rows[2], self.ids)

    def _search_block(self, queries: Tensor, k: int) -> list[NDArray]:
        """Rows, scores and validity of one block; halved while the device has no room for its smallest tile."""
        try:
            return self._settled(queries.to(self.device), k)
        except torch.OutOfMemoryError:
            if len(queries) < 2:
                raise DeviceError(
                    f"{self.device}: out of memory at one query and {_SMALLEST_TILE} documents at a time. "
                    "Free the device or use device='cpu'."
                ) from None
        half = len(queries) // 2  # outside of except: its traceback would hold on to what the device is short of
        both = self._search_block(queries[:half], k), self._search_block(queries[half:], k)
        return [np.concatenate(part) for part in zip(*both, strict=True)]

    def _settled(self, queries: Tensor, k: int) -> list[NDArray]:
        self._check_range(queries)
        pick = picker(self.vectors) if self.vectors.device.type == "cuda" else self._stored.pick

        def settle(rows: Tensor) -> tuple[Tensor, Tensor]:
            scores = exact_scores(queries, pick, rows, self.metric)
            best_rows, best_scores, _ = ranked(rows, scores, self.ties, k)
            return torch.from_numpy(best_rows).to(rows.device), torch.from_numpy(best_scores).to(rows.device)

        rows, scores = self._scan(queries, min(k, len(self)), settle)
        return [rows.cpu().numpy(), scores.cpu().numpy(), (rows >= 0).cpu().numpy()]

    def _scan(self, queries: Tensor, k: int, settle: Settle) -> tuple[Tensor, Tensor]:
        """Exact candidates of one block of queries; the tile is halved when the device runs out of memory."""
        tile = _TILE[self.device.type]
        while True:
            try:
                return scan(
                    queries,
                    self.vectors,
                    self._half_norms if self.metric == "l2" else None,
                    k,
                    rounding_margin(queries, self.metric, self._largest_norm),
                    tile,
                    settle,
                    self._stored.forget,
                )
            except torch.OutOfMemoryError:
                tile //= 2
                if tile < _SMALLEST_TILE:
                    raise

    def _check_range(self, queries: Tensor) -> None:
        """Refuse products that float32 cannot hold."""
        if not len(queries) or self.metric == "cosine":
            return
        largest = float(queries.double().norm(dim=1).max())
        reach = (largest + self._largest_norm) ** 2 if self.metric == "l2" else largest * self._largest_norm
        if not reach < _FLOAT32_MAX:
            raise DataError(
                f"queries: norm {largest:.3g} times the largest document norm {self._largest_norm:.3g} "
                "overflows float32. Scale the vectors or use the metric 'cosine'."
            )


def scan(
    queries: Float[Tensor, "queries dim"],
    vectors: Float[Tensor, "count dim"],
    offset: Float[Tensor, " count"] | None,
    k: int,
    margin: Float[Tensor, "queries 1"],
    tile: int,
    settle: Settle,
    done: Callable[[int], None],
) -> tuple[Int[Tensor, "queries list"], Float[Tensor, "queries list"]]:
    """Rows and exact scores of the k best vectors of each query.

    Args:
        queries: on the device that computes.
        vectors: there too, or on the host, then each tile is sent when it is needed.
        offset: subtracted from each product (|x|^2 / 2 ranks by distance), or None.
        k: at most the number of vectors.
        margin: how far below the k-th product a vector may lie and still be among the k best.
        tile: vectors per product.
        settle: rows [queries, list] (-1 = none) -> exact best k (rows, scores), -1 where there are fewer.
        done: told how many vectors each tile had, when it is no longer needed.
    """
    if not len(queries) or not len(vectors):
        return settle(torch.full((len(queries), 1), -1, device=queries.device))
    square = queries.square().sum(dim=1, keepdim=True)

    def product(scores: Tensor) -> Tensor:
        """What the buffer would hold for these scores: -|q - x|^2 = 2 (<q, x> - |x|^2 / 2) - |q|^2."""
        return scores if offset is None else (scores + square) / 2

    kept = _Survivors(len(queries), k, margin, settle, product)
    buffer = torch.empty(len(queries), min(tile, len(vectors)), device=queries.device)
    with _full_precision():
        for start in range(0, len(vectors), tile):
            block = vectors[start : start + tile].to(queries.device)
            out = buffer if len(block) == buffer.shape[1] else torch.empty(len(queries), len(block)).to(queries.device)
            if offset is None:
                torch.mm(queries, block.T, out=out)
            else:
                torch.addmm(offset[start : start + tile].to(queries.device), queries, block.T, beta=-1, out=out)
            kept.take(out, start)
            done(len(block))
    return settle(kept.finish())


class _Survivors:
    """Per query: the rows whose score may still be among the k best."""

    def __init__(
        self, queries: int, k: int, margin: Tensor, settle: Settle, product: Callable[[Tensor], Tensor]
    ) -> None:
        device = margin.device
        self.k, self.margin, self.settle, self.product = k, margin, settle, product
        self.rows = torch.full((queries, 3 * k + 64), -1, device=device)
        self.scores = torch.full(self.rows.shape, -torch.inf, device=device)
        self.filled = torch.zeros(queries, dtype=torch.int64, device=device)
        self.least = torch.full((queries, 1), -torch.inf, device=device)
        self.seen = 0

    def take(self, scores: Tensor, start: int) -> None:
        """Take what survives of one tile of scores [queries, tile] whose first column is row `start`."""
        if self.seen < self.k <= scores.shape[1]:  # the threshold of the first tile comes from itself
            self.least = torch.maximum(self.least, self._threshold(scores))
        self.seen += scores.shape[1]
        owner, column, found = _at_least(scores, self.least)
        self._append(owner, column + start, found)

    def _threshold(self, scores: Tensor) -> Tensor:
        return torch.topk(scores, self.k, dim=1, sorted=False).values.amin(dim=1, keepdim=True) - self.margin

    def _append(self, owner: Tensor, rows: Tensor, scores: Tensor) -> None:
        """Add survivors given in the order of their owners; prune first when a list would overflow."""
        counts = torch.bincount(owner, minlength=len(self.rows))
        if int((self.filled + counts).max()) > self.rows.shape[1]:
            self._make_room(int(counts.max()))
        first = counts.cumsum(0) - counts
        place = torch.arange(len(owner), device=owner.device) - first[owner] + self.filled[owner]
        self.rows[owner, place] = rows
        self.scores[owner, place] = scores
        self.filled += counts

    def _make_room(self, wanted: int) -> None:
        """Raise the thresholds and drop what fell below; if ties keep the lists long, score them exactly and keep k."""
        longest = self._prune()
        if longest > 2 * self.k + 64:
            self.rows, scores = self.settle(self.rows[:, :longest])
            self.filled = (self.rows >= 0).sum(dim=1)
            self.scores = self.product(scores)
            longest = self.rows.shape[1]
        self._widen(max(longest + wanted, 3 * self.k + 64))

    def finish(self) -> Tensor:
        """Rows [queries, list] that hold the k best of each query; -1 where a list is shorter."""
        return self.rows[:, : self._prune()]

    def _prune(self) -> int:
        """Raise the thresholds, drop what fell below; the longest list that remains."""
        if int(self.filled.min()) >= self.k:
            self.least = torch.maximum(self.least, self._threshold(self.scores))
            self._keep(self.scores >= self.least)
        return int(self.filled.max())

    def _keep(self, mask: Tensor) -> None:
        """Move the marked entries of each list to its front."""
        mask &= self.rows >= 0
        owner, column = mask.nonzero(as_tuple=True)
        rows, scores = self.rows[owner, column], self.scores[owner, column]
        self.filled = mask.sum(dim=1)
        first = self.filled.cumsum(0) - self.filled
        place = torch.arange(len(owner), device=owner.device) - first[owner]
        self.rows.fill_(-1)
        self.scores.fill_(-torch.inf)
        self.rows[owner, place], self.scores[owner, place] = rows, scores

    def _widen(self, width: int) -> None:
        extra = width - self.rows.shape[1]
        if extra > 0:
            self.rows = torch.nn.functional.pad(self.rows, (0, extra), value=-1)
            self.scores = torch.nn.functional.pad(self.scores, (0, extra), value=-torch.inf)


def _at_least(
    scores: Float[Tensor, "queries tile"], least: Float[Tensor, "queries 1"]
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"], Float[Tensor, " found"]]:
    """Row, column and value of every score that reaches its row's threshold, in row-major order.

    The maximum of 64 columns at a time is four times cheaper than comparing all of them, and few groups hold a survivor
    (test: equal to nonzero).
    """
    rows, width = scores.shape
    if width % _GROUP:
        owner, column = (scores >= least).nonzero(as_tuple=True)
        return owner, column, scores[owner, column]
    groups = (scores.view(rows, width // _GROUP, _GROUP).amax(dim=2) >= least).reshape(-1).nonzero()[:, 0]
    owner = groups.div(width // _GROUP, rounding_mode="floor")
    picked = torch.index_select(scores.view(-1, _GROUP), 0, groups)
    group, inside = (picked >= least[owner]).nonzero(as_tuple=True)
    owner = owner[group]
    return owner, groups[group] * _GROUP + inside - owner * width, picked[group, inside]


class _full_precision:
    """Float32 products in float32: TensorFloat-32 would break the margin."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        if self._before:
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        if self._before:
            torch.backends.cuda.matmul.allow_tf32 = True


def _nothing(k: int) -> list[NDArray]:
    shape = (0, k)
    return [np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.bool_)]
