"""BERT_DOT and every other bi-encoder: one shared encoder, a vector per text (Hofstatter et al. 2020, section 3)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import is_sentence_transformer_model
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.ids import Pairs, Texts
from structkd.ranking.data.tokens import TokenCache, in_batches, padded, token_budget, tokenizer_sha256
from structkd.ranking.models.scorer import (
    NeuralScorer,
    Side,
    check_folder,
    evaluating,
    name_of,
    pick_device,
    quiet_loading,
    weights_sha256,
    weights_version,
    whole_folder,
    whole_length,
)
from structkd.scores.manifest import TeacherSpec

_KEPT_VECTORS = 200_000  # vectors of a frozen encoder that are remembered, some 300 MB at 384 dimensions
_PAIR_BLOCK = 65_536  # pairs whose vectors are gathered at a time


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
        self.name = name or name_of(model, self.model)
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
            max_length=whole_length(self.model.max_seq_length),
            prompt=self._query_prompt,
            head=self.similarity,
            extra={
                "architecture": "bi-encoder",
                "query_length": self.query_length,
                "document_length": self.document_length,
                "document_prompt": self._document_prompt,
            },
        )

    @property
    def token_caches(self) -> Mapping[str, TokenCache]:
        """Queries and documents."""
        return {"query": self._queries, "document": self._documents}

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient; each distinct query and document is encoded once."""
        queries, query_of = np.unique(pairs.query_rows, return_inverse=True)
        documents, document_of = np.unique(pairs.document_rows, return_inverse=True)
        query_vectors = self.encode_rows(pairs.queries, queries, "query")
        document_vectors = self.encode_rows(pairs.documents, documents, "document")
        left = torch.as_tensor(query_of, device=query_vectors.device)
        right = torch.as_tensor(document_of, device=query_vectors.device)
        if 2 * len(pairs) > len(queries) * len(documents):  # most of the grid: one product instead of gathered vectors
            return (query_vectors @ document_vectors.T)[left, right]
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
        budget = self._budget(tokens)
        vectors = in_batches(
            tokens, budget, self._encode, model=self.model, recompute=self.recompute, encoding=self.encoding
        )
        return nn.functional.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def save(self, folder: str | Path) -> None:
        """Write a SentenceTransformer folder, whole or not at all; it reads no more of a text than this scorer does."""
        with whole_folder(folder) as temporary, quiet_loading(), self._own_length():
            self.model.save(str(temporary), create_model_card=False)

    @contextmanager
    def _own_length(self) -> Iterator[None]:
        """The model reads the longer of the two lengths meanwhile: a folder has one for queries and documents."""
        before = None if self.static else self.model.max_seq_length
        if before is not None and self.query_length is not None and self.document_length is not None:
            self.model.max_seq_length = min(before, max(self.query_length, self.document_length))
        try:
            yield
        finally:
            if before is not None:
                self.model.max_seq_length = before

    def _tokenise(self, texts: list[str], prompt: str | None, length: int | None) -> list[NDArray[np.int32]]:
        lengths = {} if length is None or self.static else {"max_length": length}
        features = self.model.preprocess(texts, prompt=prompt, **lengths)
        ids = features["input_ids"].numpy().astype(np.int32)
        if "offsets" in features:
            parts = np.split(ids, features["offsets"].numpy()[1:])
            return [part[:length] for part in parts]
        return [row[keep] for row, keep in zip(ids, features["attention_mask"].numpy().astype(bool), strict=True)]

    def _encode(self, tokens: list[NDArray[np.int32]]) -> Float[Tensor, "texts dimension"]:
        if self.static:
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
        if self.static:
            return len(tokens) * max((len(ids) for ids in tokens), default=1)
        return token_budget(self.model.device)

    @property
    def static(self) -> bool:
        """Whether texts are means of token vectors, without attention."""
        return isinstance(self.model[0], StaticEmbedding)


def _load_bi(path: str) -> SentenceTransformer:
    check_folder(path)
    with quiet_loading(path):
        if is_sentence_transformer_model(path):
            return SentenceTransformer(path, device="cpu")
        body = Transformer(path)
        pooling = Pooling(body.get_embedding_dimension(), pooling_mode="cls")
        return SentenceTransformer(modules=[body, pooling], similarity_fn_name="dot", device="cpu")
