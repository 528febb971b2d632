"""PreTT: the lower layers of a cross-encoder run on query and document apart, so that the document's can be stored.

MacAvaney et al. 2020 (PreTTR, arXiv 2004.14255, section 3), in the form of Hofstatter et al. 2020 (section 3): layers
below the split read `[CLS] q [SEP]` and `d [SEP]` by themselves, their outputs stand in one sequence for the layers
above it, and s = w . h_CLS without bias. Terms are not compressed.

A document's positions start at a constant, the longest query. The original starts them at the padded query length of
the batch, so that a score depends on the other queries of its batch and a stored document fits one length only;
`tests/ranking/test_prett.py` reproduces that.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.ranking.models.scorer import Side

_BODIES = ("bert", "distilbert")


@dataclass(frozen=True)
class PrettConfig:
    """Shape of a PreTT model."""

    split: int = 0
    "Layers that run apart; 0: half of them."

    query_length: int = 30
    "Tokens of a query that are read, and the position of a document's first token."

    document_length: int = 200
    "Tokens of a document that are read."


class PrettModel(nn.Module):
    """The network: a BERT or DistilBERT body cut in two, and a row of weights over the first token.

    Attributes:
        config: its shape, the split resolved.
        body: the transformers model, without pooler.
        head: w.
    """

    def __init__(self, body: Any, config: PrettConfig, *, seed: int = 0) -> None:
        super().__init__()
        kind = body.config.model_type
        if kind not in _BODIES:
            raise UsageError(f"student 'prett' needs a body of kind {' or '.join(_BODIES)}; found {kind!r}.")
        if hasattr(body, "pooler"):
            body.pooler = None
        self.body = body
        layers = len(self._layers)
        split = config.split or layers // 2
        if not 0 < split < layers:
            raise UsageError(
                f"split {split} leaves no layer on one side; the body has {layers} (prett needs two or more)."
            )
        room = int(body.config.max_position_embeddings) - config.query_length
        if config.query_length < 3 or config.document_length < 1 or config.document_length > room:
            raise UsageError(
                f"document_length {config.document_length} after {config.query_length} query positions does not fit "
                f"the body's {body.config.max_position_embeddings} positions; at most {room}."
            )
        self.config = dataclasses.replace(config, split=split)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(int(body.config.hidden_size), 1, bias=False)

    @property
    def _layers(self) -> Any:
        return self.body.encoder.layer if self.body.config.model_type == "bert" else self.body.transformer.layer

    def lower(
        self, ids: Int[Tensor, "texts length"], mask: Bool[Tensor, "texts length"], side: Side
    ) -> Float[Tensor, "texts length dimension"]:
        """States below the split; a document's positions start at the constant offset."""
        first = self.config.query_length if side == "document" else 0
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        if self.body.config.model_type == "bert":
            segments = torch.full_like(ids, int(side == "document" and self.body.config.type_vocab_size > 1))
            states = self.body.embeddings(input_ids=ids, position_ids=positions, token_type_ids=segments)
        else:
            states = self.body.embeddings(ids, position_ids=positions)
        return self._run(self._layers[: self.config.split], states, mask)

    def upper(
        self, states: Float[Tensor, "pairs length dimension"], mask: Bool[Tensor, "pairs length"]
    ) -> Float[Tensor, " pairs"]:
        """Scores of joined states; the first place of each is the query's [CLS]."""
        joined = self._run(self._layers[self.config.split :], states, mask)
        scores: Tensor = self.head(joined[:, 0]).float()
        return scores[:, 0]  # not squeeze(): a batch of one stays a batch

    def _run(self, layers: Any, states: Tensor, mask: Tensor) -> Tensor:
        closed = torch.zeros(mask.shape, dtype=states.dtype, device=states.device)
        closed = closed.masked_fill(~mask, torch.finfo(states.dtype).min)[:, None, None, :]
        for layer in layers:
            out = layer(states, closed)
            states = out[0] if isinstance(out, tuple) else out
        return states
