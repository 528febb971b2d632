"""Texts as token ids: made once per text, padded in batches of similar length; a tokenizer learned from texts alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from structkd.errors import DataError
from structkd.ids import fingerprint_json

TOKEN_BUDGET = 16_384
"Tokens, padding included, that one forward pass takes when no gradient is kept; one text always fits."

_MICRO_BUDGET = 4_096  # with gradient: small enough that sorting by length saves padding, large enough to fill a core


def token_budget() -> int:
    """Tokens of one forward pass, with gradient or without."""
    return _MICRO_BUDGET if torch.is_grad_enabled() else TOKEN_BUDGET


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


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identity of a tokenizer: its own JSON without the padding and truncation that calls leave behind."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint_json({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    value = json.loads(backend.to_str())
    return fingerprint_json({key: item for key, item in value.items() if key not in ("padding", "truncation")})
