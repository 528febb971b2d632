"""BERT_CAT: query and document in one sequence, the teacher of the paper and its slowest student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.ids import Pairs
from structkd.ranking.data.tokens import TokenCache, in_batches, padded, token_budget, tokenizer_sha256
from structkd.ranking.models.scorer import (
    NeuralScorer,
    check_folder,
    evaluating,
    name_of,
    pick_device,
    quiet_loading,
    weights_sha256,
    whole_folder,
    whole_length,
)
from structkd.scores.manifest import TeacherSpec

Dtype = Literal["float32", "bfloat16"]
_SCORING_BUDGET = 4_096  # tokens of a pass without gradient: the fastest of 1024 to 8192 (benchmarks/bench_scoring.py)


class CrossScorer(NeuralScorer):
    """BERT_CAT: query and document in one sequence, `[CLS] q [SEP] d [SEP]`; the score is the raw logit.

    Attributes:
        model: the CrossEncoder; a body without a head gets a fresh one of a single output.
        dtype: compute dtype; bfloat16 is faster where the hardware has units for it (a GPU, AVX-512 BF16, AMX).
        tokens_read: tokens that went through the encoder so far, padding left out.
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
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        self.model = model if isinstance(model, CrossEncoder) else _load_cross(str(model), max_length, seed)
        self.name = name or name_of(model, self.model)
        if self.model.num_labels != 1:
            raise UsageError(f"{self.name}: the model has {self.model.num_labels} outputs, expected 1 (a score).")
        self.model.activation_fn = nn.Identity()  # scores are raw logits here and in what save() writes
        self.max_length = max_length or whole_length(self.model.max_seq_length)
        self.encoded = self.tokens_read = 0
        self._tokens = TokenCache(self._tokenise, capacity=200_000)
        self.dtype = dtype
        self.to(pick_device(device))
        if dtype == "bfloat16":
            self.to(torch.bfloat16)

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
            dtype=self.dtype,
            extra={"architecture": "cross-encoder"},
        )

    @property
    def token_caches(self) -> Mapping[str, TokenCache]:
        """Query and document together."""
        return {"pair": self._tokens}

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Logits with gradient; a pair that occurs twice is encoded once."""
        keys = np.stack([pairs.query_rows, pairs.document_rows])
        distinct, position = np.unique(keys, axis=1, return_inverse=True)
        texts = [(pairs.queries.texts[q], pairs.documents.texts[d]) for q, d in distinct.T]
        tokens = self._tokens.get(texts)
        self.encoded += len(tokens)
        self.tokens_read += sum(pair.shape[1] for pair in tokens)
        budget = token_budget(self.model.device)
        if not torch.is_grad_enabled():
            budget = max(budget, _SCORING_BUDGET)
        logits = in_batches(
            tokens, budget, self._encode, model=self.model, recompute=self.recompute, encoding=self.encoding
        )
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


def _load_cross(path: str, max_length: int | None, seed: int) -> CrossEncoder:
    check_folder(path)
    with quiet_loading(path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a fresh head is drawn while loading
        return CrossEncoder(path, num_labels=1, max_length=max_length, device="cpu")
