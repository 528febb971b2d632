"""Ranking models: collections, encoders, teachers, distillation, evaluation.

Public names are loaded when first used, so that reading a collection imports neither torch nor transformers.
"""

import importlib
from typing import Any

_HOMES = {
    "Collection": "data",
    "load": "datasets",
    "BiScorer": "bi_encoder",
    "CrossScorer": "cross_encoder",
    "MultiVectorScorer": "multi_vector",
    "PrettScorer": "prett",
    "StaticScorer": "static",
    "TkScorer": "tk",
    "load_student": "students",
    "student": "students",
    "evaluate_model": "evaluate",
    "evaluate_run": "evaluate",
    "mine": "negatives",
    "TeacherConfig": "teacher",
    "score_pairs": "teacher",
    "teach": "teacher",
    "DistillConfig": "distillation",
    "DistillResult": "distillation",
    "distill": "distillation",
    "SelfDistillConfig": "self_distill",
    "SelfDistillResult": "self_distill",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'structkd.ranking' has no attribute {name!r}")
    return getattr(importlib.import_module(f"structkd.ranking.{_HOMES[name]}"), name)
