"""Exact and approximate vector search, text search, neighbour graphs: one call on CPU and GPU."""

from structkd.index.base import LexicalIndex, TopK, VectorIndex
from structkd.index.kinds import INDEXES, IndexOptions, build, build_multi, build_text, open, open_text, open_vectors
from structkd.index.multivector import MultiVectorIndex
from structkd.index.storage import IndexManifest, verify

__all__ = [
    "INDEXES",
    "IndexManifest",
    "IndexOptions",
    "LexicalIndex",
    "MultiVectorIndex",
    "TopK",
    "VectorIndex",
    "build",
    "build_multi",
    "build_text",
    "open",
    "open_text",
    "open_vectors",
    "verify",
]
