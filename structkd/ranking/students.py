"""The students by name: a fresh one to train, or the one that a folder holds."""

import json
from collections.abc import Callable
from pathlib import Path

from structkd.errors import DataError, UsageError
from structkd.ids import Texts
from structkd.ranking.bi_encoder import BiScorer
from structkd.ranking.cross_encoder import CrossScorer
from structkd.ranking.scorer import NeuralScorer
from structkd.ranking.static import StaticScorer
from structkd.ranking.tk import TkConfig, TkModel, TkScorer


def student(
    kind: str,
    init: str | Path | None = None,
    *,
    documents: Texts | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> NeuralScorer:
    """A student of one of the kinds that `STUDENTS` names.

    Args:
        kind: `dot`, `cat`, `static`, `tk`.
        init: starting weights, a folder or hub id; `static` and `tk` need none.
        documents: what an untrained `static` or `tk` learns its vocabulary from.
        max_length: longest text (pair for `cat`) in tokens; the model's own by default.
        seed: of fresh weights.

    Raises:
        UsageError: an unknown kind, or starting weights (documents) missing where they are needed.
    """
    if kind not in STUDENTS:
        raise UsageError(f"student {kind!r} is unknown; expected one of {', '.join(STUDENTS)}.")
    return STUDENTS[kind](init, documents, max_length, seed)


def _student_dot(init: str | Path | None, documents: Texts | None, max_length: int | None, seed: int) -> NeuralScorer:
    return BiScorer(_needed(init, "dot"), query_length=max_length, document_length=max_length)


def _student_cat(init: str | Path | None, documents: Texts | None, max_length: int | None, seed: int) -> NeuralScorer:
    return CrossScorer(_needed(init, "cat"), max_length=max_length, seed=seed)


def _student_static(
    init: str | Path | None, documents: Texts | None, max_length: int | None, seed: int
) -> NeuralScorer:
    if init is not None:
        return StaticScorer(init, query_length=max_length, document_length=max_length)
    if documents is None:
        raise UsageError("student 'static' without starting weights needs documents to learn its tokenizer from.")
    return StaticScorer.fresh(documents, seed=seed)


def _student_tk(init: str | Path | None, documents: Texts | None, max_length: int | None, seed: int) -> NeuralScorer:
    if init is not None:
        return TkScorer(TkModel.load(init), name=Path(init).name)
    if documents is None:
        raise UsageError("student 'tk' without starting weights needs documents to count its vocabulary in.")
    config = TkConfig() if max_length is None else TkConfig(document_length=max_length)
    return TkScorer(TkModel.fresh(documents, config, seed=seed))


STUDENTS: dict[str, Callable[[str | Path | None, Texts | None, int | None, int], NeuralScorer]] = {
    "dot": _student_dot,
    "cat": _student_cat,
    "static": _student_static,
    "tk": _student_tk,
}


def open_scorer(folder: str | Path) -> NeuralScorer:
    """The scorer that a folder (or hub id) holds: a CrossEncoder or a SentenceTransformer.

    Raises:
        DataError: a local folder that holds neither.
    """
    path = Path(folder)
    if path.is_dir():
        if (path / "student" / "modules.json").is_file():  # the run folder of `ranking distill`
            return open_scorer(path / "student")
        if not any((path / name).is_file() for name in ("modules.json", "config.json", "structkd.json")):
            raise DataError(f"{path}: holds no model; expected modules.json or config.json there.")
        if (path / "structkd.json").is_file():
            return TkScorer(TkModel.load(path), name=path.name)
        if _is_cross(path):
            return CrossScorer(path)
    elif path.is_absolute() or str(folder).startswith("."):
        raise DataError(f"{path}: no such folder; expected a saved model.")
    return BiScorer(folder)


def _is_cross(path: Path) -> bool:
    """Whether a folder was saved by CrossEncoder (its modules or its architecture say so)."""
    described = path / "config_sentence_transformers.json"
    if described.is_file():
        kind = json.loads(described.read_text(encoding="utf-8")).get("model_type")
        if kind is not None:
            return bool(kind == "CrossEncoder")
    if (path / "modules.json").is_file():
        return False
    architectures = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    return str(architectures[0]).endswith("ForSequenceClassification")


def _needed(init: str | Path | None, kind: str) -> str:
    if init is None:
        raise UsageError(f"student {kind!r} needs starting weights: give --init with a folder or hub id.")
    return str(init)
