"""The students by name: a fresh one to train, or the one that a folder holds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from structkd.errors import DataError, UsageError, did_you_mean
from structkd.files import read_json
from structkd.ids import Texts
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.multi_vector import MultiVectorScorer, Variant
from structkd.ranking.models.prett import PrettScorer
from structkd.ranking.models.prett_model import PrettConfig
from structkd.ranking.models.scorer import NeuralScorer, position_limit, saved_as
from structkd.ranking.models.static import StaticScorer
from structkd.ranking.models.tk import TkConfig, TkModel, TkScorer

_SHORTEST = 3


@dataclass(frozen=True)
class _Wish:
    """What `student` was asked for."""

    init: str | Path | None
    documents: Texts | None
    max_length: int | None
    variant: Variant
    seed: int


def student(
    kind: str,
    init: str | Path | None = None,
    *,
    documents: Texts | None = None,
    max_length: int | None = None,
    variant: Variant = "stanford",
    seed: int = 0,
) -> NeuralScorer:
    """A student of one of the kinds that `STUDENTS` names.

    Args:
        kind: `dot`, `colbert`, `prett`, `tk`, `cat`, `static`.
        init: starting weights, a folder or hub id; `static` and `tk` need none.
        documents: what an untrained `static` or `tk` learns its vocabulary from.
        max_length: longest text (pair for `cat`, document for the others) in tokens; the model's own by default.
        variant: of `colbert`: stanford (128 numbers, normalised) or matchmaker (768, not normalised).
        seed: of fresh weights.

    Raises:
        UsageError: an unknown kind, a length without room for a word or beyond the encoder's positions, or starting
            weights (documents) missing where they are needed.
    """
    if kind not in STUDENTS:
        raise UsageError(
            f"student {kind!r} is unknown; expected one of {', '.join(STUDENTS)}.{did_you_mean(kind, STUDENTS)}"
        )
    if max_length is not None and max_length < _SHORTEST:
        raise UsageError(f"max_length {max_length}: expected {_SHORTEST} tokens or more, two of them are markers.")
    made = STUDENTS[kind](_Wish(init, documents, max_length, variant, seed))
    limit = position_limit(made)
    if max_length is not None and limit is not None and max_length > limit:
        raise UsageError(f"max_length {max_length}: {init} knows {limit} positions; give {limit} or less.")
    return made


def _dot(wish: _Wish) -> NeuralScorer:
    return BiScorer(_needed(wish.init, "dot"), query_length=wish.max_length, document_length=wish.max_length)


def _colbert(wish: _Wish) -> NeuralScorer:
    init = _needed(wish.init, "colbert")
    return MultiVectorScorer(init, variant=wish.variant, document_length=wish.max_length, seed=wish.seed)


def _prett(wish: _Wish) -> NeuralScorer:
    init = Path(_needed(wish.init, "prett"))
    if (init / "structkd.json").is_file():
        return PrettScorer.open(init)
    config = PrettConfig() if wish.max_length is None else PrettConfig(document_length=wish.max_length)
    return PrettScorer.fresh(str(wish.init), config, seed=wish.seed)


def _cat(wish: _Wish) -> NeuralScorer:
    return CrossScorer(_needed(wish.init, "cat"), max_length=wish.max_length, seed=wish.seed)


def _static(wish: _Wish) -> NeuralScorer:
    if wish.init is not None:
        found = StaticScorer(wish.init, query_length=wish.max_length, document_length=wish.max_length)
        if not found.static:
            raise UsageError(
                f"student 'static' is token vectors without attention, {wish.init} is a transformer. Leave out its "
                "starting weights, give a folder of a static model, or take the student 'dot'."
            )
        return found
    if wish.documents is None:
        raise UsageError("student 'static' without starting weights needs documents to learn its tokenizer from.")
    return StaticScorer.fresh(wish.documents, seed=wish.seed)


def _tk(wish: _Wish) -> NeuralScorer:
    if wish.init is not None:
        return TkScorer.open(wish.init)
    if wish.documents is None:
        raise UsageError("student 'tk' without starting weights needs documents to count its vocabulary in.")
    config = TkConfig() if wish.max_length is None else TkConfig(document_length=wish.max_length)
    return TkScorer(TkModel.fresh(wish.documents, config, seed=wish.seed))


STUDENTS: dict[str, Callable[[_Wish], NeuralScorer]] = {
    "dot": _dot,
    "colbert": _colbert,
    "prett": _prett,
    "tk": _tk,
    "cat": _cat,
    "static": _static,
}


def load_student(folder: str | Path) -> NeuralScorer:
    """The scorer that a folder (or hub id) holds, of whatever architecture; a run folder stands for its student.

    Raises:
        DataError: a local folder that holds no model.
    """
    path = Path(folder)
    if path.is_dir():
        for inner in ("student", "teacher"):  # the run folder of `ranking distill` or `ranking teach`
            if any((path / inner / name).is_file() for name in ("modules.json", "structkd.json", "config.json")):
                return load_student(path / inner)
        if not any((path / name).is_file() for name in ("modules.json", "config.json", "structkd.json")):
            raise DataError(f"{path}: holds no model; expected modules.json, config.json or structkd.json there.")
        if (path / "structkd.json").is_file():
            return _own(path)
        kind = saved_as(path)
        if kind == "CrossEncoder":
            return CrossScorer(path)
        if kind == "MultiVectorEncoder":
            return MultiVectorScorer(path)
    elif path.is_absolute() or str(folder).startswith("."):
        raise DataError(f"{path}: no such folder; expected a saved model.")
    scorer = BiScorer(folder)
    return StaticScorer(scorer.model, name=scorer.name) if scorer.static else scorer


def _own(path: Path) -> NeuralScorer:
    """A model in our own format."""
    described = read_json(path / "structkd.json")
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind not in OWN_FORMATS:
        raise DataError(f"{path / 'structkd.json'}: kind {kind!r}; expected one of {', '.join(OWN_FORMATS)}.")
    return OWN_FORMATS[kind](path)


OWN_FORMATS: dict[str, Callable[[Path], NeuralScorer]] = {"prett": PrettScorer.open, "tk": TkScorer.open}
"Kind that a folder's structkd.json names -> opener."


def _needed(init: str | Path | None, kind: str) -> str:
    if init is None:
        raise UsageError(f"student {kind!r} needs starting weights: give --init with a folder or hub id.")
    return str(init)
