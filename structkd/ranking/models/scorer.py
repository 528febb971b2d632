"""Students and neural teachers as Scorers with gradients: what all architectures share.

A Scorer here is a torch module: `forward(pairs)` is differentiable and encodes each distinct query and document once,
however many pairs name it; `score(pairs)` is the same without gradient, in batches of a token budget; `save(folder)`
writes a folder that the library of its architecture loads with equal scores. One file per architecture: `bi_encoder`,
`cross_encoder`, `multi_vector`, `prett`, `static`, `tk`.
"""

import dataclasses
import json
import math
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from structkd.errors import DataError
from structkd.ids import Pairs, fingerprint_arrays, fingerprint_fields
from structkd.ranking.data.tokens import TokenCache
from structkd.scores.manifest import TeacherSpec

Side = Literal["query", "document"]


class NeuralScorer(nn.Module, ABC):
    """A Scorer that is a torch module.

    Attributes:
        kind: the name that `student` knows it by.
        learning_rate: peak rate that suits its weights when none is asked for.
        bounded: whether scores lie in [-1, 1] (cosine, or a model that normalises its vectors).
        name: what the spec calls it.
        encoded: how many sequences went through the encoder so far.
        recompute: whether training keeps outputs only and runs each batch again for its gradient (`tokens.Pieces`).
        encoding: what training runs each batch in, the second time too.
    """

    kind: str
    learning_rate = 1e-4
    recompute = False
    encoding: Callable[[], AbstractContextManager[Any]] = nullcontext
    name: str
    encoded: int

    @property
    @abstractmethod
    def bounded(self) -> bool:
        """Whether scores lie in [-1, 1]."""

    @property
    @abstractmethod
    def spec(self) -> TeacherSpec:
        """Identity of the scores."""

    @abstractmethod
    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient."""

    @abstractmethod
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores without gradient, float32 on the CPU."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a folder that `open_scorer` reads, whole or not at all."""

    @property
    def token_caches(self) -> Mapping[str, TokenCache]:
        """Where token ids are kept: under "query" and "document", or "pair"; none where reading words is as fast."""
        return {}

    def keep_tokens(self, pairs: Pairs, folder: str | Path) -> None:
        """Tokenise what these pairs name into files below `folder`, once, and read it from there on.

        A file's name is the identity of tokenizer, lengths, prompts and texts, so a folder may be shared.
        """
        caches = self.token_caches
        if not caches:
            return
        reader = dataclasses.replace(self.spec, model="any", weights_sha256=None).fingerprint
        for side, cache in caches.items():
            keys = _keys(pairs, side)
            identity = fingerprint_fields([reader, side, *(part for key in keys() for part in key)])
            plain = (key if side == "pair" else key[0] for key in keys())
            cache.keep(Path(folder) / f"{side}-{identity[:20]}", plain)

    def lengths(self, pairs: Pairs) -> NDArray[np.int64]:
        """Size of each pair's document (of the pair, for cat) in tokens; in words for a scorer without tokens."""
        cache = self.token_caches.get("document") or self.token_caches.get("pair")
        if cache is None:
            return np.asarray([len(text.split()) for text in pairs.document_texts], dtype=np.int64)
        both = "pair" in self.token_caches
        sizes = np.empty(len(pairs), dtype=np.int64)
        for start in range(0, len(pairs), 4096):
            part = pairs.take(slice(start, start + 4096))
            keys = list(zip(part.query_texts, part.document_texts, strict=True)) if both else part.document_texts
            sizes[start : start + 4096] = [ids.shape[-1] for ids in cache.get(keys)]
        return sizes


def _keys(pairs: Pairs, side: str) -> Callable[[], Iterator[tuple[str, ...]]]:
    """The distinct texts (pairs of texts) of one side, row by row, as often as they are asked for."""
    if side == "pair":
        distinct = np.unique(np.stack([pairs.query_rows, pairs.document_rows]), axis=1).T
        return lambda: ((pairs.queries.texts[q], pairs.documents.texts[d]) for q, d in distinct)
    table = pairs.queries if side == "query" else pairs.documents
    rows = np.unique(pairs.query_rows if side == "query" else pairs.document_rows)
    return lambda: ((table.texts[row],) for row in rows)


def weights_version(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes whenever a weight is changed in place or replaced."""
    return tuple((id(tensor), tensor._version) for tensor in [*module.parameters(), *module.buffers()])


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights; kept until a weight changes in place."""
    state = module.state_dict()
    version = weights_version(module)
    kept = module.__dict__.get("_structkd_sha256")
    if kept is None or kept[0] != version:
        arrays = {name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in state.items()}
        kept = (version, fingerprint_arrays(**arrays))
        module.__dict__["_structkd_sha256"] = kept
    return str(kept[1])


def attention_of_any_shape() -> AbstractContextManager[None]:
    """Attention kernels that need no plan for a shape, on a GPU.

    cuDNN's, which newer devices take first in half precision, plan for every new batch and length, and here hardly two
    batches are alike. With them a bfloat16 step took 230 ms on an H200, a float32 step, which cannot use them, 40.
    """
    if not torch.cuda.is_available():
        return nullcontext()
    found: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return found


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside, the former mode restored after."""
    training = module.training
    module.eval()
    try:
        with attention_of_any_shape():
            yield
    finally:
        module.train(training)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` on success; a crash leaves the old one."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def quiet_loading(source: str = "") -> Iterator[None]:
    """No bars and reports from the model libraries: a fresh head is expected here.

    Raises:
        DataError: `source` is given, and neither a folder nor the hub has the model.
    """
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        if not source or error.filename:
            raise
        said = " ".join(str(error).split()).split(". ")[0]
        raise DataError(
            f"{source}: no folder of that name, and the hub did not give a model of that id ({said}). Name a folder "
            "with config.json or modules.json, or download the model where there is a network."
        ) from None
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def check_folder(path: str) -> None:
    """DataError when what is meant as a folder holds no model; a hub id passes."""
    folder = Path(path)
    known = any((folder / name).is_file() for name in ("config.json", "modules.json"))
    if (folder.is_absolute() or folder.exists() or path.startswith(".")) and not known:
        raise DataError(f"{path}: holds no model; expected a folder with config.json or modules.json, or a hub id.")


def position_limit(scorer: nn.Module) -> int | None:
    """Longest sequence that the encoder has positions for; None where positions are not counted."""
    for module in scorer.modules():
        if isinstance(module, PreTrainedModel):
            count = getattr(module.config, "max_position_embeddings", None)
            # RoBERTa's first position comes after its padding token's number
            first = module.config.pad_token_id + 1 if "roberta" in module.config.model_type else 0
            return None if count is None else int(count) - first
    return None


def saved_as(path: str | Path) -> str | None:
    """The class that a folder is of: SentenceTransformer, CrossEncoder, MultiVectorEncoder; None: nothing says so."""
    folder = Path(path)
    described = folder / "config_sentence_transformers.json"
    if described.is_file():
        kind = json.loads(described.read_text(encoding="utf-8")).get("model_type")
        if kind is not None:
            return "MultiVectorEncoder" if kind == "ColBERT" else str(kind)
    if (folder / "modules.json").is_file():
        return "SentenceTransformer"
    if not (folder / "config.json").is_file():
        return None
    architecture = str(
        (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[0]
    )
    if architecture == "HF_ColBERT":
        return "MultiVectorEncoder"
    return "CrossEncoder" if architecture.endswith("ForSequenceClassification") else None


def name_of(source: object, model: nn.Module) -> str:
    """A hub id as it is; a local model by its weights, so that a moved folder keeps its identity."""
    if isinstance(source, (str, Path)) and not Path(source).exists():
        return str(source)
    return f"local-{type(model).__name__}-{weights_sha256(model)[:12]}"


def whole_length(length: Any) -> int | None:
    """A length as a number, None for unlimited."""
    return None if length is None or math.isinf(length) else int(length)
