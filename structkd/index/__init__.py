"""Exact and approximate vector search, text search, neighbour graphs: one call on CPU and GPU."""

from structkd.index.base import LexicalIndex, VectorIndex
from structkd.index.choice import IndexOptions
from structkd.index.folder.manifest import IndexManifest, verify
from structkd.index.kinds import INDEXES, build, build_multi, build_text, open, open_text, open_vectors
from structkd.index.multi_vector.late_interaction import MultiVectorIndex
from structkd.index.topk import TopK

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
