"""structkd: graph-to-MLP and ranking distillation.

Subpackages are loaded when first used: `structkd.graph`, `structkd.ranking`, `structkd.scores`, `structkd.index`,
`structkd.objectives`. Importing the package itself loads nothing heavy.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["__version__", "graph", "index", "objectives", "ranking", "scores"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"structkd.{name}")
    raise AttributeError(f"module 'structkd' has no attribute {name!r}")
