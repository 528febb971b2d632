"""Students and neural teachers as Scorers with gradients, around sentence-transformers' own model objects.

A Scorer here is a torch module: `forward(pairs)` is differentiable and encodes each distinct query and document once,
however many pairs name it; `score(pairs)` is the same without gradient, in batches of a token budget; `save(folder)`
writes what SentenceTransformer or CrossEncoder loads with equal scores. Texts are tokenised once and kept as token ids.
"""

import json
import math
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import is_sentence_transformer_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from structkd.errors import DataError, UsageError
from structkd.ids import Pairs, Texts, fingerprint_arrays, fingerprint_json
from structkd.ranking.tk import TkConfig, TkModel, TkScorer
from structkd.scores.manifest import TeacherSpec

TOKEN_BUDGET = 16_384
"Tokens, padding included, that one forward pass takes when no gradient is kept; one text always fits."

_MICRO_BUDGET = 4_096  # with gradient: small enough that sorting by length saves padding, large enough to fill a core
_KEPT_VECTORS = 200_000  # vectors of a frozen encoder that are remembered, some 300 MB at 384 dimensions
_PAIR_BLOCK = 65_536  # pairs whose vectors are gathered at a time

Side = Literal["query", "document"]


class TokenCache:
    """Token ids of texts, made once; what `tokenise` returns for a list of keys is kept per key.

    Attributes:
        made: how many keys were tokenised (each once, unless the cache was full).
    """

    def __init__(self, tokenise: Callable[[list[Any]], list[NDArray[np.int32]]], capacity: int = 2_000_000) -> None:
        self._tokenise, self._capacity = tokenise, capacity
        self._kept: dict[Any, NDArray[np.int32]] = {}
        self.made = 0

    def get(self, keys: Sequence[Any]) -> list[NDArray[np.int32]]:
        """Token ids of each key."""
        new = list(dict.fromkeys(key for key in keys if key not in self._kept))
        if not new:
            return [self._kept[key] for key in keys]
        if len(self._kept) + len(new) > self._capacity:
            self._kept.clear()
            new = list(dict.fromkeys(keys))
        for start in range(0, len(new), 1024):
            chunk = new[start : start + 1024]
            self._kept.update(zip(chunk, self._tokenise(chunk), strict=True))
        self.made += len(new)
        return [self._kept[key] for key in keys]


class NeuralScorer(nn.Module, ABC):
    """A Scorer that is a torch module.

    Attributes:
        kind: the name that `student` knows it by.
        learning_rate: peak rate that suits its weights when none is asked for.
        bounded: whether scores lie in [-1, 1] (cosine, or a model that normalises its vectors).
        name: what the spec calls it.
        encoded: how many sequences went through the encoder so far.
    """

    kind: str
    learning_rate = 1e-4
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


class BiScorer(NeuralScorer):
    """One shared encoder; the score is the similarity (dot or cosine) that the model declares.

    BERT_DOT (Hofstatter et al. 2020, section 3): a model without its own pooling gets the first token's vector, dot
    product, no normalisation. A SentenceTransformer keeps its own pooling and similarity.

    Attributes:
        model: the SentenceTransformer.
    """

    kind = "dot"

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        *,
        name: str | None = None,
        query_length: int | None = None,
        document_length: int | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model if isinstance(model, SentenceTransformer) else _load_bi(str(model))
        self.name = name or _name_of(model, self.model)
        self.query_length, self.document_length = query_length, document_length
        self.encoded = 0
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._kept_version: object = None
        prompts = self.model.prompts or {}
        self._query_prompt = prompts.get("query") or None
        self._document_prompt = prompts.get("document") or prompts.get("passage") or None
        self._queries = TokenCache(lambda texts: self._tokenise(texts, self._query_prompt, query_length))
        self._documents = TokenCache(lambda texts: self._tokenise(texts, self._document_prompt, document_length))
        if self.similarity not in ("dot", "cosine"):
            raise UsageError(f"{self.name}: similarity {self.similarity!r} is not supported; expected dot or cosine.")
        self.to(pick_device(device))

    @property
    def similarity(self) -> str:
        """`dot` or `cosine`."""
        return str(self.model.similarity_fn_name)

    @property
    def bounded(self) -> bool:
        """Whether scores lie in [-1, 1] (cosine, or a model that normalises its vectors)."""
        return self.similarity == "cosine" or any(type(module).__name__ == "Normalize" for module in self.model)

    @property
    def spec(self) -> TeacherSpec:
        """Identity of the scores: weights, tokenizer, lengths, similarity."""
        return TeacherSpec(
            model=self.name,
            weights_sha256=weights_sha256(self.model),
            tokenizer_sha256=tokenizer_sha256(self.model.tokenizer),
            max_length=_whole(self.model.max_seq_length),
            prompt=self._query_prompt,
            head=self.similarity,
            extra={
                "architecture": "bi-encoder",
                "query_length": self.query_length,
                "document_length": self.document_length,
                "document_prompt": self._document_prompt,
            },
        )

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient; each distinct query and document is encoded once."""
        queries, query_of = np.unique(pairs.query_rows, return_inverse=True)
        documents, document_of = np.unique(pairs.document_rows, return_inverse=True)
        query_vectors = self.encode_rows(pairs.queries, queries, "query")
        document_vectors = self.encode_rows(pairs.documents, documents, "document")
        left = torch.as_tensor(query_of, device=query_vectors.device)
        right = torch.as_tensor(document_of, device=query_vectors.device)
        parts = zip(torch.split(left, _PAIR_BLOCK), torch.split(right, _PAIR_BLOCK), strict=True)
        return torch.cat([(query_vectors[q] * document_vectors[d]).sum(-1) for q, d in parts])

    @torch.no_grad()
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores without gradient, float32 on the CPU."""
        with evaluating(self):
            return self.forward(pairs).float().cpu()

    def encode_rows(self, texts: Texts, rows: NDArray[np.int64], side: Side) -> Tensor:
        """[rows, dimension] float32 vectors of these texts, normalised when the similarity is cosine."""
        return self._vectors([texts.texts[row] for row in rows], side)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], side: Side) -> NDArray[np.float32]:
        """[texts, dimension] vectors for an index."""
        with evaluating(self):
            return self._vectors(list(texts), side).cpu().numpy()

    def _vectors(self, texts: list[str], side: Side) -> Tensor:
        """Vectors with gradient in training; in evaluation those of texts met before come from memory."""
        if torch.is_grad_enabled() or self.training:
            return self._fresh_vectors(texts, side)
        if self._kept_version != (version := weights_version(self)) or len(self._kept) > _KEPT_VECTORS:
            self._kept, self._kept_version = {}, version
        new = list(dict.fromkeys(text for text in texts if (side, text) not in self._kept))
        if new:
            vectors = self._fresh_vectors(new, side)
            self._kept.update(zip(((side, text) for text in new), vectors.cpu(), strict=True))
        if not texts:
            return torch.empty(0)
        return torch.stack([self._kept[side, text] for text in texts]).to(self.model.device)

    def _fresh_vectors(self, texts: list[str], side: Side) -> Tensor:
        cache = self._queries if side == "query" else self._documents
        self.encoded += len(texts)
        tokens = cache.get(texts)
        vectors = in_batches(tokens, self._budget(tokens), self._encode)
        return nn.functional.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def save(self, folder: str | Path) -> None:
        """Write a SentenceTransformer folder, whole or not at all."""
        with whole_folder(folder) as temporary, quiet_loading():
            self.model.save(str(temporary), create_model_card=False)

    def _tokenise(self, texts: list[str], prompt: str | None, length: int | None) -> list[NDArray[np.int32]]:
        lengths = {} if length is None or self._static else {"max_length": length}
        features = self.model.preprocess(texts, prompt=prompt, **lengths)
        ids = features["input_ids"].numpy().astype(np.int32)
        if "offsets" in features:
            parts = np.split(ids, features["offsets"].numpy()[1:])
            return [part[:length] for part in parts]
        return [row[keep] for row, keep in zip(ids, features["attention_mask"].numpy().astype(bool), strict=True)]

    def _encode(self, tokens: list[NDArray[np.int32]]) -> Float[Tensor, "texts dimension"]:
        if self._static:
            lengths = [0, *(len(ids) for ids in tokens[:-1])]
            flat = torch.from_numpy(np.concatenate(tokens).astype(np.int64))
            features = {"input_ids": flat, "offsets": torch.from_numpy(np.cumsum(lengths))}
        else:
            features = padded(tokens, self.model.tokenizer)
        features = {
            key: value.to(self.model.device) if torch.is_tensor(value) else value for key, value in features.items()
        }
        vectors: Tensor = self.model(features)["sentence_embedding"]
        return vectors.float()

    def _budget(self, tokens: list[NDArray[np.int32]]) -> int:
        """Static vectors have no padding to save, and each piece would cost a gradient of the whole vocabulary."""
        if self._static:
            return len(tokens) * max((len(ids) for ids in tokens), default=1)
        return _MICRO_BUDGET if torch.is_grad_enabled() else TOKEN_BUDGET

    @property
    def _static(self) -> bool:
        return isinstance(self.model[0], StaticEmbedding)


class StaticScorer(BiScorer):
    """A bi-encoder of static token vectors: the mean of learned vectors, no attention, no pretrained weights."""

    kind = "static"
    learning_rate = 0.03  # no layer above the vectors, and each row is touched by few texts

    @classmethod
    def fresh(
        cls, documents: Texts, *, dimension: int = 384, vocabulary: int = 16_000, seed: int = 0
    ) -> "StaticScorer":
        """An untrained student over a tokenizer learned from the documents.

        Each token starts as a random direction of length idf = log((N + 1) / (n + 1)) + .1 for a token in n of N
        documents, so that before any training the cosine is a random projection of idf-weighted word overlap.

        Raises:
            DataError: the documents hold no word.
        """
        tokenizer = train_tokenizer(documents.texts, vocabulary)
        size = tokenizer.get_vocab_size()
        frequency = Counter[int]()
        for encoding in tokenizer.encode_batch(list(documents.texts), add_special_tokens=False):
            frequency.update(set(encoding.ids))
        counts = torch.tensor([frequency[token] for token in range(size)], dtype=torch.float32)
        idf = torch.log((len(documents) + 1) / (counts + 1)) + 0.1
        directions = torch.randn(size, dimension, generator=torch.Generator().manual_seed(seed))
        weights = nn.functional.normalize(directions, dim=-1) * idf[:, None]
        module = StaticEmbedding(tokenizer, embedding_weights=weights)
        return cls(SentenceTransformer(modules=[module], similarity_fn_name="cosine", device="cpu"), name="static")


class CrossScorer(NeuralScorer):
    """BERT_CAT: query and document in one sequence, `[CLS] q [SEP] d [SEP]`; the score is the raw logit.

    Attributes:
        model: the CrossEncoder; a body without a head gets a fresh one of a single output.
    """

    kind = "cat"

    def __init__(
        self,
        model: str | Path | CrossEncoder,
        *,
        name: str | None = None,
        max_length: int | None = None,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model if isinstance(model, CrossEncoder) else _load_cross(str(model), max_length, seed)
        self.name = name or _name_of(model, self.model)
        if self.model.num_labels != 1:
            raise UsageError(f"{self.name}: the model has {self.model.num_labels} outputs, expected 1 (a score).")
        self.model.activation_fn = nn.Identity()  # scores are raw logits here and in what save() writes
        self.max_length = max_length or _whole(self.model.max_seq_length)
        self.encoded = 0
        self._tokens = TokenCache(self._tokenise, capacity=200_000)
        self.to(pick_device(device))

    @property
    def bounded(self) -> bool:
        """Logits are not."""
        return False

    @property
    def spec(self) -> TeacherSpec:
        """Identity of the scores: weights, tokenizer, length, head."""
        return TeacherSpec(
            model=self.name,
            weights_sha256=weights_sha256(self.model),
            tokenizer_sha256=tokenizer_sha256(self.model.tokenizer),
            max_length=self.max_length,
            truncation="longest_first",
            head="logit",
            extra={"architecture": "cross-encoder"},
        )

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Logits with gradient; a pair that occurs twice is encoded once."""
        keys = np.stack([pairs.query_rows, pairs.document_rows])
        distinct, position = np.unique(keys, axis=1, return_inverse=True)
        texts = [(pairs.queries.texts[q], pairs.documents.texts[d]) for q, d in distinct.T]
        tokens = self._tokens.get(texts)
        self.encoded += len(tokens)
        budget = _MICRO_BUDGET if torch.is_grad_enabled() else TOKEN_BUDGET
        logits = in_batches(tokens, budget, self._encode)
        return logits[torch.as_tensor(position.reshape(-1), device=logits.device)]

    @torch.no_grad()
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Logits without gradient, float32 on the CPU."""
        with evaluating(self):
            parts = [
                self.forward(pairs.take(slice(start, start + 4096))).float().cpu()
                for start in range(0, len(pairs), 4096)
            ]
        return torch.cat(parts) if parts else torch.empty(0)

    def save(self, folder: str | Path) -> None:
        """Write a CrossEncoder folder, whole or not at all; its `predict` gives the same logits."""
        with whole_folder(folder) as temporary, quiet_loading():
            self.model.save_pretrained(str(temporary), create_model_card=False)

    def _tokenise(self, texts: list[tuple[str, str]]) -> list[NDArray[np.int32]]:
        """Two rows per pair, token ids over segment ids, so that one array is the key's value."""
        features = self.model.preprocess(texts, max_length=self.max_length)
        ids = features["input_ids"].numpy().astype(np.int32)
        keep = features["attention_mask"].numpy().astype(bool)
        segments = features.get("token_type_ids")
        kinds = np.zeros_like(ids) if segments is None else segments.numpy().astype(np.int32)
        return [np.stack([i[k], s[k]]) for i, s, k in zip(ids, kinds, keep, strict=True)]

    def _encode(self, tokens: list[NDArray[np.int32]]) -> Float[Tensor, " pairs"]:
        features = padded([pair[0] for pair in tokens], self.model.tokenizer)
        if "token_type_ids" in features:
            segments = torch.zeros_like(features["input_ids"])
            for row, pair in enumerate(tokens):
                segments[row, : pair.shape[1]] = torch.from_numpy(pair[1].astype(np.int64))
            features["token_type_ids"] = segments
        features = {
            key: value.to(self.model.device) if torch.is_tensor(value) else value for key, value in features.items()
        }
        logits: Tensor = self.model(features)["scores"]
        return logits.float().reshape(len(tokens))


class TkStudent(TkScorer, NeuralScorer):
    """TK: kernels over the cosines of contextual word vectors; no pretrained weights (see `tk`)."""


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
        return TkStudent(TkModel.load(init), name=Path(init).name)
    if documents is None:
        raise UsageError("student 'tk' without starting weights needs documents to count its vocabulary in.")
    config = TkConfig() if max_length is None else TkConfig(document_length=max_length)
    return TkStudent(TkModel.fresh(documents, config, seed=seed))


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
            return TkStudent(TkModel.load(path), name=path.name)
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


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A WordPiece tokenizer of lower-cased words, learned from the texts alone: same texts, same tokenizer.

    Three quarters of the vocabulary are the most frequent words, the rest frequent word ends of up to four letters, and
    every single character, so that an unseen word falls into known pieces. Ties go to the alphabet: the trainers of the
    tokenizers library order them by chance.

    Raises:
        DataError: the texts hold no word.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    words = Counter[str]()
    for text in texts:
        split = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        words.update(word for word, _ in split)
    if not words:
        raise DataError(f"{len(texts)} documents hold no words to learn a tokenizer from.")
    ends = Counter[str]()
    for word, count in words.items():
        ends.update({f"##{word[-length:]}": count for length in range(1, 5) if length < len(word)})
    characters = sorted({letter for word in words for letter in word})
    pieces = ["[UNK]", *characters, *(f"##{letter}" for letter in characters)]
    pieces += _most_frequent(words, vocabulary * 3 // 4) + _most_frequent(ends, vocabulary // 4)
    rows = {piece: row for row, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer.model = models.WordPiece(vocab=rows, unk_token="[UNK]", max_input_chars_per_word=64)
    return tokenizer


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    """What occurs twice or more, the most frequent first, ties by the alphabet."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [piece for piece, count in ordered[:limit] if count > 1]


def padded(tokens: Sequence[NDArray[np.int32]], tokenizer: Any) -> dict[str, Any]:
    """A right-padded batch with its attention mask, as the model's own preprocessing makes it."""
    lengths = torch.tensor([len(ids) for ids in tokens])
    width = max(1, int(lengths.max()))
    ids = np.full((len(tokens), width), tokenizer.pad_token_id or 0, dtype=np.int64)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
    mask = (torch.arange(width)[None, :] < lengths[:, None]).long()
    features: dict[str, Any] = {"input_ids": torch.from_numpy(ids), "attention_mask": mask, "modality": "text"}
    if "token_type_ids" in tokenizer.model_input_names:
        features["token_type_ids"] = torch.zeros_like(mask)
    return features


def in_batches(
    tokens: Sequence[NDArray[np.int32]], budget: int, encode: Callable[[list[NDArray[np.int32]]], Tensor]
) -> Tensor:
    """Encode sequences in batches of similar length within a token budget; rows come back in input order."""
    if not tokens:
        return torch.empty(0)
    lengths = np.asarray([ids.shape[-1] for ids in tokens])
    order = np.argsort(lengths, kind="stable")
    parts = [encode([tokens[i] for i in batch]) for batch in length_batches(lengths, order, budget)]
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    whole = torch.cat(parts)
    return whole[torch.as_tensor(back, device=whole.device)]


def length_batches(lengths: NDArray[np.int64], order: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Cut positions, sorted by ascending length, into runs whose padded size stays within the budget."""
    start = 0
    for stop in range(1, len(order) + 1):
        over = stop < len(order) and (stop - start + 1) * max(1, int(lengths[order[stop]])) > budget
        if over or stop == len(order):
            yield order[start:stop]
            start = stop


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


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identity of a tokenizer: its own JSON without the padding and truncation that calls leave behind."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint_json({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    value = json.loads(backend.to_str())
    return fingerprint_json({key: item for key, item in value.items() if key not in ("padding", "truncation")})


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside, the former mode restored after."""
    training = module.training
    module.eval()
    try:
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
def quiet_loading() -> Iterator[None]:
    """No bars and reports from the model libraries: a fresh head is expected here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _load_bi(path: str) -> SentenceTransformer:
    _check_folder(path)
    with quiet_loading():
        if is_sentence_transformer_model(path):
            return SentenceTransformer(path, device="cpu")
        body = Transformer(path)
        pooling = Pooling(body.get_embedding_dimension(), pooling_mode="cls")
        return SentenceTransformer(modules=[body, pooling], similarity_fn_name="dot", device="cpu")


def _load_cross(path: str, max_length: int | None, seed: int) -> CrossEncoder:
    _check_folder(path)
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a fresh head is drawn while loading
        return CrossEncoder(path, num_labels=1, max_length=max_length, device="cpu")


def _check_folder(path: str) -> None:
    folder = Path(path)
    known = any((folder / name).is_file() for name in ("config.json", "modules.json"))
    if (folder.is_absolute() or folder.exists() or path.startswith(".")) and not known:
        raise DataError(f"{path}: holds no model; expected a folder with config.json or modules.json, or a hub id.")


def _needed(init: str | Path | None, kind: str) -> str:
    if init is None:
        raise UsageError(f"student {kind!r} needs starting weights: give --init with a folder or hub id.")
    return str(init)


def _name_of(source: object, model: nn.Module) -> str:
    """A hub id as it is; a local model by its weights, so that a moved folder keeps its identity."""
    if isinstance(source, (str, Path)) and not Path(source).exists():
        return str(source)
    return f"local-{type(model).__name__}-{weights_sha256(model)[:12]}"


def _whole(length: Any) -> int | None:
    """A length as a number, None for unlimited."""
    return None if length is None or math.isinf(length) else int(length)
