"""PreTT as a Scorer: lower layers once per text or from a store, upper layers per pair (see `prett_model`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from structkd.errors import DataError, UsageError
from structkd.files import read_json, write_json
from structkd.ids import Pairs, Texts, text_hash
from structkd.ranking.data.tokens import Pieces, TokenCache, length_batches, padded, token_budget, tokenizer_sha256
from structkd.ranking.models.maxsim import IntArray, Ragged
from structkd.ranking.models.prett_model import PrettConfig, PrettModel
from structkd.ranking.models.prett_store import DocumentStates
from structkd.ranking.models.scorer import (
    NeuralScorer,
    Side,
    check_folder,
    evaluating,
    name_of,
    pick_device,
    quiet_loading,
    weights_sha256,
    whole_folder,
)
from structkd.ranking.models.sides import joined, joined_in_blocks
from structkd.scores.manifest import TeacherSpec

_DOCUMENTS_AT_ONCE = 256  # whose states are held while their pairs are scored


class PrettScorer(NeuralScorer):
    """PreTT as a Scorer.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        documents: stored states that scoring reads instead of running the lower layers, None without.
    """

    kind = "prett"

    def __init__(self, model: PrettModel, tokenizer: Any, *, name: str | None = None, device: str = "auto") -> None:
        super().__init__()
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise UsageError("student 'prett' needs a tokenizer with [CLS] and [SEP]; this one lacks them.")
        self.model, self.tokenizer, self.encoded = model, tokenizer, 0
        self.documents: DocumentStates | None = None
        self.name = name or name_of(None, model)
        self._queries = TokenCache(lambda texts: self._tokenise(texts, "query"))
        self._documents = TokenCache(lambda texts: self._tokenise(texts, "document"))
        self.to(pick_device(device))

    @classmethod
    def fresh(
        cls, init: str | Path, config: PrettConfig | None = None, *, seed: int = 0, device: str = "auto"
    ) -> "PrettScorer":
        """Pretrained layers under a head that is drawn anew.

        Raises:
            DataError: the folder holds no model.
            UsageError: a body of another kind, lengths that do not fit it.
        """
        check_folder(str(init))
        with quiet_loading(str(init)):
            body, tokenizer = AutoModel.from_pretrained(str(init)), AutoTokenizer.from_pretrained(str(init))
        return cls(PrettModel(body, config or PrettConfig(), seed=seed), tokenizer, device=device)

    @classmethod
    def open(cls, folder: str | Path, *, device: str = "auto") -> "PrettScorer":
        """Read what `save` wrote.

        Raises:
            DataError: the folder holds no PreTT model, or its files do not fit together.
        """
        folder = Path(folder)
        described = read_json(folder / "structkd.json")
        if not isinstance(described, dict) or described.get("kind") != "prett":
            raise DataError(f'{folder / "structkd.json"}: describes no PreTT model; expected "kind": "prett".')
        try:
            with quiet_loading():
                body = AutoModel.from_config(AutoConfig.from_pretrained(str(folder)))
                model = PrettModel(body, PrettConfig(**described["config"]))
                model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, safetensors.SafetensorError) as error:
            raise DataError(
                f"{folder}: the PreTT model cannot be read ({error}). Copy the whole folder again."
            ) from None
        return cls(model, tokenizer, device=device)

    def save(self, folder: str | Path) -> None:
        """Write weights, shape and tokenizer, whole or not at all."""
        with whole_folder(folder) as temporary, quiet_loading():
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            safetensors.torch.save_file(state, temporary / "model.safetensors")
            self.model.body.config.save_pretrained(str(temporary))
            self.tokenizer.save_pretrained(str(temporary))
            described = {"kind": "prett", "config": dataclasses.asdict(self.model.config)}
            write_json(temporary / "structkd.json", described)

    @property
    def bounded(self) -> bool:
        """Logits are not."""
        return False

    @property
    def spec(self) -> TeacherSpec:
        """Identity of the scores: weights, tokenizer, lengths, split. Stored states belong to one such identity."""
        return TeacherSpec(
            model=self.name,
            weights_sha256=weights_sha256(self.model),
            tokenizer_sha256=tokenizer_sha256(self.tokenizer),
            max_length=self.model.config.document_length,
            head="logit",
            extra={"architecture": "prett", **dataclasses.asdict(self.model.config)},
        )

    @property
    def token_caches(self) -> Mapping[str, TokenCache]:
        """Queries and documents."""
        return {"query": self._queries, "document": self._documents}

    def forward(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores with gradient; the lower layers run once for each distinct query and document."""
        return joined(pairs, self._query_states, partial(self.states, side="document"), self._join)

    @torch.no_grad()
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores without gradient, float32 on the CPU; stored states are read where `documents` has them."""
        with evaluating(self):
            return joined_in_blocks(pairs, _DOCUMENTS_AT_ONCE, self._query_states, self._stored_or_new, self._join)

    def _query_states(self, texts: Sequence[str]) -> Ragged:
        return self.states(texts, "query")

    def states(self, texts: Sequence[str], side: Side) -> Ragged:
        """What the lower layers make of each text: one row per token."""
        tokens = (self._queries if side == "query" else self._documents).get(texts)
        self.encoded += len(texts)
        lengths = np.asarray([len(ids) for ids in tokens], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        parts = [torch.empty(0, self.model.head.in_features, device=self.model.head.weight.device)]
        pieces, run = Pieces(tokens, self.model.body, self.recompute, self.encoding), partial(self._lower, side=side)
        for batch in length_batches(lengths, order, token_budget(parts[0].device)):
            parts.append(pieces.run(run, [tokens[i] for i in batch]))
        starts = np.empty_like(lengths)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        return Ragged(torch.cat(parts), starts, lengths)

    @torch.no_grad()
    def store(self, documents: Texts, folder: str | Path, dtype: str = "float16") -> DocumentStates:
        """Write the documents' states to a folder, to be joined at query time (`use`)."""
        texts, width = documents.texts, self.model.head.in_features
        with evaluating(self):
            blocks = (
                self._arrays(self.states(texts[first : first + _DOCUMENTS_AT_ONCE], "document"))
                for first in range(0, len(texts), _DOCUMENTS_AT_ONCE)
            )
            return DocumentStates.write(folder, self.identity, documents, blocks, width, dtype)

    @property
    def identity(self) -> str:
        """What stored states must have been made by: everything of the spec but the name."""
        return dataclasses.replace(self.spec, model="prett").fingerprint

    def use(self, documents: DocumentStates) -> "PrettScorer":
        """Read stored states from now on.

        Raises:
            DataError: they were made by other weights, lengths or another tokenizer.
        """
        if documents.identity != self.identity:
            raise DataError(
                f"{documents.folder}: the stored layers were made by another model ({documents.identity[:12]}, this "
                f"one is {self.identity[:12]}). Encode the documents again with this model."
            )
        self.documents = documents
        return self

    def _stored_or_new(self, texts: Sequence[str]) -> Ragged:
        """Stored states where there are some for the very text, else fresh ones."""
        if self.documents is None:
            return self.states(texts, "document")
        rows = self.documents.find([text_hash(text) for text in texts])
        device = self.model.head.weight.device
        stored = self.documents.read(rows[rows >= 0])
        missing = [text for text, row in zip(texts, rows, strict=True) if row < 0]
        new = self.states(missing, "document")
        starts, lengths = np.empty(len(texts), dtype=np.int64), np.empty(len(texts), dtype=np.int64)
        starts[rows >= 0], lengths[rows >= 0] = stored.starts, stored.lengths
        starts[rows < 0], lengths[rows < 0] = new.starts + len(stored.vectors), new.lengths
        return Ragged(torch.cat([stored.vectors.to(device), new.vectors]), starts, lengths)

    def _join(self, left: Ragged, right: Ragged, query_of: IntArray, document_of: IntArray) -> Tensor:
        """Run the upper layers on each pair, in batches of similar length."""
        lengths = left.lengths[query_of] + right.lengths[document_of]
        order = np.argsort(lengths, kind="stable")
        both = torch.cat([left.vectors, right.vectors])
        scores = [both.new_zeros(0)]
        pieces = Pieces([], None, self.recompute, self.encoding)
        for batch in length_batches(lengths, order, token_budget(both.device)):
            width = int(lengths[batch].max())
            places = np.zeros((len(batch), width), dtype=np.int64)
            for row, pair in enumerate(batch):
                query, document = query_of[pair], document_of[pair]
                first, second = left.lengths[query], right.lengths[document]
                places[row, :first] = left.starts[query] + np.arange(first)
                places[row, first : first + second] = len(left.vectors) + right.starts[document] + np.arange(second)
            mask = torch.from_numpy(np.arange(width)[None] < lengths[batch][:, None]).to(both.device)
            run = partial(self._upper, both, torch.from_numpy(places).to(both.device), mask)
            scores.append(pieces.run(run, []))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return torch.cat(scores)[torch.from_numpy(back).to(both.device)]

    def _lower(self, tokens: list[NDArray[np.int32]], *, side: Side) -> Tensor:
        """States of a padded batch, the padding taken out again."""
        features = padded(tokens, self.tokenizer)
        device = self.model.head.weight.device
        mask = features["attention_mask"].bool().to(device)
        return self.model.lower(features["input_ids"].to(device), mask, side)[mask].float()

    def _upper(self, states: Tensor, places: Tensor, mask: Tensor, _: list[NDArray[np.int32]]) -> Tensor:
        return self.model.upper(states[places], mask)

    def _tokenise(self, texts: list[str], side: Side) -> list[NDArray[np.int32]]:
        """`[CLS] q [SEP]` or `d [SEP]`: the document's own [CLS] is dropped."""
        config = self.model.config
        room = config.query_length - 2 if side == "query" else config.document_length - 1
        rows = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max(room, 1))
        start = [self.tokenizer.cls_token_id] if side == "query" else []
        end = [self.tokenizer.sep_token_id]
        return [np.asarray([*start, *ids[:room], *end], dtype=np.int32) for ids in rows["input_ids"]]

    def _arrays(self, states: Ragged) -> list[NDArray[np.float32]]:
        flat = states.vectors.cpu().numpy()
        return [flat[start : start + length] for start, length in zip(states.starts, states.lengths, strict=True)]
