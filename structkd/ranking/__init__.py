"""Ranking models: collections, encoders, teachers, distillation, evaluation.

Public names are loaded when first used, so that reading a collection imports neither torch nor transformers.
"""

import importlib
from typing import Any

_HOMES = {
    "Collection": "data.collection",
    "load": "data.datasets",
    "BiScorer": "models.bi_encoder",
    "CrossScorer": "models.cross_encoder",
    "MultiVectorScorer": "models.multi_vector",
    "PrettScorer": "models.prett",
    "StaticScorer": "models.static",
    "TkScorer": "models.tk",
    "load_student": "models.students",
    "student": "models.students",
    "evaluate_model": "evaluation.measures",
    "evaluate_run": "evaluation.measures",
    "mine": "data.negatives",
    "TeacherConfig": "teachers.teacher",
    "score_pairs": "teachers.teacher",
    "teach": "teachers.teacher",
    "DistillConfig": "distillation",
    "DistillResult": "distillation",
    "distill": "distillation",
    "SelfDistillConfig": "self_distillation.cycles",
    "SelfDistillResult": "self_distillation.cycles",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'structkd.ranking' has no attribute {name!r}")
    return getattr(importlib.import_module(f"structkd.ranking.{_HOMES[name]}"), name)
