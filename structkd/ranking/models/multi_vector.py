"""ColBERT and every other multi-vector model: a vector per token, scored by late interaction.

Two variants of the paper's student (Khattab and Zaharia 2020; Hofstatter et al. 2020, section 3):

* "stanford": 128 numbers per vector without bias, normalised; queries and documents start with a marker token; queries
  are filled with [MASK] to 32 tokens that are scored but not attended to; punctuation of documents is not scored.
* "matchmaker": as wide as the encoder (768) with bias, not normalised, no markers; queries are filled with [MASK] to 16
  tokens that are attended to (the original appends eight masks whatever the length, which no sentence-transformers
  folder can say).
"""

import string
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.ids import Pairs
from structkd.ranking.data.tokens import Pieces, TokenCache, length_batches, padded, token_budget, tokenizer_sha256
from structkd.ranking.models.maxsim import Ragged, maxsim
from structkd.ranking.models.scorer import (
    NeuralScorer,
    Side,
    check_folder,
    evaluating,
    name_of,
    pick_device,
    quiet_loading,
    saved_as,
    weights_sha256,
    whole_folder,
)
from structkd.ranking.models.sides import Read, joined, joined_in_blocks
from structkd.scores.manifest import TeacherSpec

Variant = Literal["stanford", "matchmaker"]

_DIMENSION = 128
_QUERY_LENGTH = {"stanford": 32, "matchmaker": 16}
_DOCUMENT_LENGTH = {"stanford": 220, "matchmaker": 200}
_MARKERS = ("[unused0]", "[unused1]")  # Stanford's query and document markers in BERT's vocabulary
_DOCUMENTS_AT_ONCE = 512  # whose vectors are held while their pairs are scored


class MultiVectorScorer(NeuralScorer):
    """A vector per token; the score is the sum over query vectors of the best match in the document.

    Attributes:
        model: the MultiVectorEncoder.
    """

    kind = "colbert"

    def __init__(
        self,
        model: str | Path | MultiVectorEncoder,
        *,
        name: str | None = None,
        variant: Variant = "stanford",
        document_length: int | None = None,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, MultiVectorEncoder):
            source = str(model)
            check_folder(source)
            with quiet_loading(source):
                known = saved_as(source) == "MultiVectorEncoder"
                loaded = MultiVectorEncoder(source, device="cpu") if known else _fresh(source, variant, seed)
        else:
            loaded = model
        self.model = loaded
        if document_length is not None:
            self._body.document_length = document_length
        if self.model.similarity_fn_name != "maxsim":
            raise UsageError(
                f"{model}: similarity {self.model.similarity_fn_name!r} is not supported; expected maxsim."
            )
        self.name = name or name_of(model, self.model)
        self.encoded = 0
        prompts = self.model.prompts or {}
        self._prompts: dict[str, str | None] = {side: prompts.get(side) or None for side in ("query", "document")}
        self._queries = TokenCache(lambda texts: self._tokenise(texts, "query"))
        self._documents = TokenCache(lambda texts: self._tokenise(texts, "document"))
        self.to(pick_device(device))

    @property
    def bounded(self) -> bool:
        """Scores are sums over query vectors."""
        return False

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    @property
    def spec(self) -> TeacherSpec:
        """Identity of the scores: weights, tokenizer, lengths, masks."""
        mask = next((module for module in self.model if isinstance(module, MultiVectorMask)), None)
        return TeacherSpec(
            model=self.name,
            weights_sha256=weights_sha256(self.model),
            tokenizer_sha256=tokenizer_sha256(self.model.tokenizer),
            max_length=self._body.document_length,
            prompt=self._prompts["query"],
            head="maxsim",
            extra={
                "architecture": "multi-vector",
                "document_prompt": self._prompts["document"],
                "query_expansion": self._body.query_expansion,
                "skipped": [] if mask is None else sorted(mask.skiplist_words),
                "modules": [type(module).__name__ for module in self.model],
            },
        )

    @property
    def token_caches(self) -> Mapping[str, TokenCache]:
        """Queries and documents."""
        return {"query": self._queries, "document": self._documents}

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient; each distinct query and document is encoded once."""
        return joined(pairs, *self._sides, maxsim)

    @torch.no_grad()
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores without gradient, float32 on the CPU; the vectors of some hundred documents are held at a time."""
        with evaluating(self):
            return joined_in_blocks(pairs, _DOCUMENTS_AT_ONCE, *self._sides, maxsim)

    @property
    def _sides(self) -> tuple[Read, Read]:
        return partial(self._vectors, side="query"), partial(self._vectors, side="document")

    @torch.no_grad()
    def encode_multi(self, texts: Sequence[str], side: Side) -> list[NDArray[np.float32]]:
        """[vectors, dimension] of each text, for a multi-vector index."""
        out: list[NDArray[np.float32]] = []
        with evaluating(self):
            for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
                ragged = self._vectors(list(texts[first : first + _DOCUMENTS_AT_ONCE]), side)
                flat = ragged.vectors.cpu().numpy()
                spans = zip(ragged.starts, ragged.lengths, strict=True)
                out += [flat[start : start + length].copy() for start, length in spans]
        return out

    def vectors(self, texts: list[str], side: Side) -> Ragged:
        """Vectors of the texts, with gradient in training; what in-batch terms score every query against every text."""
        return self._vectors(texts, side)

    def save(self, folder: str | Path) -> None:
        """Write a MultiVectorEncoder folder, whole or not at all; its MaxSim gives the same scores."""
        with whole_folder(folder) as temporary, quiet_loading():
            self.model.save(str(temporary), create_model_card=False)

    @property
    def _body(self) -> Any:
        return self.model[0]

    def _tokenise(self, texts: list[str], side: Side) -> list[NDArray[np.int32]]:
        """Two rows per text: token ids, and whether the encoder attends to them (not to a query's filling)."""
        features = self.model.preprocess(texts, prompt=self._prompts[side], task=side)
        ids = features["input_ids"].numpy().astype(np.int32)
        attended = features["attention_mask"].numpy().astype(bool)
        filled = features.get("query_expansion_positions")
        kept = attended if filled is None else attended | filled.numpy().astype(bool)
        return [np.stack([i[k], a[k]]).astype(np.int32) for i, a, k in zip(ids, attended, kept, strict=True)]

    def _vectors(self, texts: list[str], side: Side) -> Ragged:
        tokens = (self._queries if side == "query" else self._documents).get(texts)
        self.encoded += len(texts)
        lengths = np.asarray([pair.shape[1] for pair in tokens], dtype=np.int64)
        parts, counts, order = [torch.empty(0, self.dimension, device=self.model.device)], [], []
        pieces, encode = Pieces(tokens, self.model, self.recompute, self.encoding), partial(self._encode, side=side)
        for batch in length_batches(lengths, np.argsort(lengths, kind="stable"), token_budget(self.model.device)):
            vectors, mask = pieces.run(encode, [tokens[i] for i in batch])
            parts.append(vectors[mask])
            counts.append(mask.sum(1).cpu().numpy())
            order.append(batch)
        sizes = np.concatenate(counts) if counts else lengths
        starts, own = np.empty_like(lengths), np.empty_like(lengths)
        placed = np.concatenate(order) if order else lengths
        starts[placed], own[placed] = np.cumsum(sizes) - sizes, sizes
        return Ragged(torch.cat(parts), starts, own)

    def _encode(self, tokens: list[NDArray[np.int32]], side: Side) -> tuple[Tensor, Tensor]:
        """([texts, length, dimension], [texts, length] what is scored)."""
        features = padded([pair[0] for pair in tokens], self.model.tokenizer)
        held = features["attention_mask"].bool()
        attended = torch.zeros_like(held)
        for row, pair in enumerate(tokens):
            attended[row, : pair.shape[1]] = torch.from_numpy(pair[1].astype(bool))
        features["attention_mask"] = attended.long()
        if side == "query" and self._body.query_expansion is not None:
            features["query_expansion_positions"] = held & ~attended
        features = {
            key: value.to(self.model.device) if torch.is_tensor(value) else value for key, value in features.items()
        }
        out = self.model(features, task=side)
        return out["token_embeddings"].float(), out["attention_mask"].bool()


def _fresh(path: str, variant: Variant, seed: int) -> MultiVectorEncoder:
    """An encoder with a projection that is drawn anew."""
    body = Transformer(path)
    tokenizer = body.tokenizer
    known = tokenizer.get_vocab()
    markers = _MARKERS if all(marker in known for marker in _MARKERS) else ("[Q]", "[D]")
    filler = tokenizer.mask_token or "[MASK]"
    tokenizer.add_special_tokens({"additional_special_tokens": [*markers, filler]})
    if len(tokenizer) > body.auto_model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body.auto_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    limit = int(min(body.max_seq_length or 512, 512))
    body.document_length = min(_DOCUMENT_LENGTH[variant], limit)
    body.query_expansion = {
        "strategy": "fixed" if variant == "stanford" else "min",
        "attend": variant == "matchmaker",
        "token": filler,
        "length": min(_QUERY_LENGTH[variant], limit),
    }
    width = int(body.get_embedding_dimension())
    size, bias = (_DIMENSION, False) if variant == "stanford" else (width, True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Dense(width, size, bias=bias, activation_function=nn.Identity(), module_input_name="token_embeddings")
    if variant == "matchmaker":
        return MultiVectorEncoder(modules=[body, head, MultiVectorMask()], device="cpu")
    skipped = [mark for mark in string.punctuation if mark in known]
    modules = [body, head, MultiVectorMask(skipped), Normalize(module_input_name="token_embeddings")]
    prompts = {"query": f"{markers[0]} ", "document": f"{markers[1]} "}
    return MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")
