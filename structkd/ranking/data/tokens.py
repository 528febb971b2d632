"""Texts as token ids: made once per text, padded in batches of similar length; a tokenizer learned from texts alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from structkd.errors import DataError
from structkd.ids import fingerprint_json
from structkd.progress import track
from structkd.ranking.data.token_store import TokenStore

Out = TypeVar("Out")

TOKEN_BUDGET = 16_384
"Tokens, padding included, that one forward pass takes on a GPU; one text always fits."

_CPU_BUDGET = 1_024  # activations stay in the cache of a core, and sorting by length saves padding
_SHOWN = 20  # batches from which encoding shows a bar


def token_budget(device: torch.device | None = None) -> int:
    """Tokens of one forward pass on a device (None: the CPU)."""
    return _CPU_BUDGET if device is None or device.type == "cpu" else TOKEN_BUDGET


class TokenCache:
    """Token ids of texts, made once; what `tokenise` returns for a list of keys is kept per key.

    Attributes:
        made: how many keys were tokenised (each once, unless the cache was full).
        store: token ids on disk, asked first; None without.
    """

    def __init__(self, tokenise: Callable[[list[Any]], list[NDArray[np.int32]]], capacity: int = 2_000_000) -> None:
        self._tokenise, self._capacity = tokenise, capacity
        self._kept: dict[Any, NDArray[np.int32]] = {}
        self.made = 0
        self.store: TokenStore | None = None

    def keep(self, folder: str | Path, keys: Iterable[Any]) -> TokenStore:
        """Tokenise these keys into files (or open them) and read them from there on: memory does not grow with them."""
        self.store = TokenStore.build(folder, keys, self._made)
        return self.store

    def get(self, keys: Sequence[Any]) -> list[NDArray[np.int32]]:
        """Token ids of each key."""
        if self.store is None:
            return self._remembered(keys)
        found = self.store.get(keys)
        missing = iter(self._remembered([key for key, ids in zip(keys, found, strict=True) if ids is None]))
        return [next(missing) if ids is None else ids for ids in found]

    def _remembered(self, keys: Sequence[Any]) -> list[NDArray[np.int32]]:
        new = list(dict.fromkeys(key for key in keys if key not in self._kept))
        if not new:
            return [self._kept[key] for key in keys]
        if len(self._kept) + len(new) > self._capacity:
            self._kept.clear()
            new = list(dict.fromkeys(keys))
        for start in range(0, len(new), 1024):
            chunk = new[start : start + 1024]
            self._kept.update(zip(chunk, self._made(chunk), strict=True))
        return [self._kept[key] for key in keys]

    def _made(self, keys: list[Any]) -> list[NDArray[np.int32]]:
        self.made += len(keys)
        return self._tokenise(keys)


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
    tokens: Sequence[NDArray[np.int32]],
    budget: int,
    encode: Callable[[list[NDArray[np.int32]]], Tensor],
    *,
    model: nn.Module | None = None,
    recompute: bool = False,
    encoding: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Encode sequences in batches of similar length within a token budget; rows come back in input order.

    Args:
        tokens: one array per sequence, token ids along the last axis (in the first row, where there are several).
        budget: padded tokens of a batch.
        encode: a batch of sequences to one row each.
        model: where the token embedding is looked for, to gather its rows once for all batches.
        recompute: gradient caching, see `Pieces`.
        encoding: opened around each batch.
    """
    if not tokens:
        return torch.empty(0)
    lengths = np.asarray([ids.shape[-1] for ids in tokens])
    order = np.argsort(lengths, kind="stable")
    pieces = Pieces(tokens, model, recompute, encoding)
    batches = list(length_batches(lengths, order, budget))
    short = torch.is_grad_enabled() or len(batches) < _SHOWN  # a training step has a bar of its own
    shown = batches if short else track(batches, "encoding")
    parts = [pieces.run(encode, [tokens[i] for i in batch]) for batch in shown]
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    whole = torch.cat(parts)
    return whole[torch.as_tensor(back, device=whole.device)]


class Pieces:
    """How the batches of one training step run: token vectors gathered once, activations kept or made again.

    A batch of its own would write a gradient of the whole vocabulary (47 MB at 30,522 x 384); the rows that the step
    needs are gathered once instead, so that a batch adds to some thousand rows. Values and gradients are the same.

    With `recompute` a batch keeps its output only and is run again, with the same dropout, when its gradient is there:
    the gradient caching of Gao et al. 2021 (section 3), exact, in the memory of one batch for one more forward pass.
    """

    def __init__(
        self,
        tokens: Sequence[NDArray[np.int32]],
        model: nn.Module | None,
        recompute: bool,
        encoding: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._encoding = encoding if torch.is_grad_enabled() else nullcontext
        self._recompute = recompute and torch.is_grad_enabled()
        self._embedding = token_embedding(model) if model is not None and torch.is_grad_enabled() else None
        if self._embedding is not None:
            ids = [np.asarray([self._embedding.padding_idx or 0]), *(np.atleast_2d(one)[0] for one in tokens)]
            needed = torch.as_tensor(np.unique(np.concatenate(ids)).astype(np.int64)).to(self._embedding.weight.device)
            padding = self._embedding.padding_idx
            self._rows = nn.functional.embedding(needed, self._embedding.weight, padding_idx=padding)
            self._place = torch.full((self._embedding.num_embeddings,), -1, device=needed.device)
            self._place[needed] = torch.arange(len(needed), device=needed.device)

    def run(self, encode: Callable[[list[NDArray[np.int32]]], Out], batch: list[NDArray[np.int32]]) -> Out:
        """What `encode` makes of the batch."""
        if not self._recompute:
            return self._gathered(encode, batch)
        again: Out = checkpoint(self._gathered, encode, batch, use_reentrant=False)
        return again

    def _gathered(self, encode: Callable[[list[NDArray[np.int32]]], Out], batch: list[NDArray[np.int32]]) -> Out:
        """One run; the second one, in the backward pass, is all the same."""
        with self._encoding(), self._looked_up():
            return encode(batch)

    @contextmanager
    def _looked_up(self) -> Iterator[None]:
        """The embedding's look-up reads the rows that were gathered."""
        if self._embedding is None:
            yield
            return
        whole = self._embedding.forward

        def gathered(ids: Tensor) -> Tensor:
            places = self._place[ids]
            return whole(ids) if bool((places < 0).any()) else nn.functional.embedding(places, self._rows)

        self._embedding.__dict__["forward"] = gathered
        try:
            yield
        finally:
            del self._embedding.__dict__["forward"]


def token_embedding(model: nn.Module) -> nn.Embedding | None:
    """The table that a transformer looks token ids up in; None without one, or where it does more than look up."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found = module.get_input_embeddings()
            plain = type(found) is nn.Embedding and "forward" not in found.__dict__
            ordinary = plain and found.max_norm is None and not found.scale_grad_by_freq and not found.sparse
            return found if ordinary and found.weight.requires_grad else None
    return None


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
