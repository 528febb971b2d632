"""Codes of document vectors for multi-vector search: two rounds of k-means with faiss, the second over what is left."""

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from structkd.index.vectors import drawn_rows
from structkd.progress import track

_FEWEST, _MOST = 16, 4096  # centroids of a round
_SAMPLE_PER_CENTROID, _ROUNDS = 64, 8
_BLOCK, _PRODUCT = 1 << 16, 1 << 13


def two_codebooks(
    vectors: Float[Tensor, "vectors dim"], seed: int
) -> tuple[Float[Tensor, "2 centroids dim"], Int[Tensor, "vectors 2"]]:
    """Centroids, the largest power of two up to twice the root of the number of vectors, 16 to 4,096 (and no more than
    vectors), and each vector's codes.

    Args:
        vectors: may be memory-mapped; read block by block, but for the training sample.
        seed: of the sample and of k-means.
    """
    count = len(vectors)
    centroids = 1 << int(np.log2(min(max(2 * count**0.5, _FEWEST), _MOST, count)))
    chosen = drawn_rows(count, _SAMPLE_PER_CENTROID * centroids, seed)
    left = vectors[torch.from_numpy(chosen)].numpy().copy()
    books: list[NDArray[np.float32]] = []
    for _ in range(2):
        clustering = faiss.Kmeans(left.shape[1], centroids, niter=_ROUNDS, seed=seed + 1, min_points_per_centroid=1)
        clustering.train(left)
        books.append(np.asarray(clustering.centroids, dtype=np.float32))
        left -= books[-1][_nearest(books[-1], left)]
    codes = np.empty((count, 2), dtype=np.int16)
    for start in track(range(0, count, _BLOCK), "coding", late=True):
        left = vectors[start : start + _BLOCK].numpy().copy()
        for place, book in enumerate(books):
            codes[start : start + _BLOCK, place] = nearest = _nearest(book, left)
            left -= book[nearest]
    return torch.from_numpy(np.stack(books)), torch.from_numpy(codes)


def _nearest(book: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Row of the nearest centroid of each vector, by matrix products."""
    half = (book**2).sum(axis=1) / 2
    parts = np.array_split(vectors, max(1, len(vectors) // _PRODUCT))
    return np.concatenate([(part @ book.T - half).argmax(axis=1) for part in parts])
