"""Teacher scores: caches that survive a kill, refuse another teacher and find every changed byte.

The scorers are loaded when first used: files are imported, checked and published without torch.
"""

from typing import TYPE_CHECKING, Any

from structkd.scores.compaction.compact import compact
from structkd.scores.compare import describe
from structkd.scores.formats.registry import READERS, WRITERS
from structkd.scores.importing import import_file
from structkd.scores.manifest import ScoreManifest, TeacherSpec
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.scores.publish import gc, publish, verify
from structkd.scores.store import open, write_nodes, write_pairs

if TYPE_CHECKING:
    from structkd.scores.cache import CachedScorer, Scorer, StoredScorer

__all__ = [
    "READERS",
    "WRITERS",
    "CachedScorer",
    "NodeScores",
    "PairScores",
    "ScoreManifest",
    "Scorer",
    "StoredScorer",
    "TeacherSpec",
    "compact",
    "describe",
    "gc",
    "import_file",
    "open",
    "publish",
    "verify",
    "write_nodes",
    "write_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in ("CachedScorer", "Scorer", "StoredScorer"):
        raise AttributeError(f"module 'structkd.scores' has no attribute {name!r}")
    from structkd.scores import cache

    return getattr(cache, name)
