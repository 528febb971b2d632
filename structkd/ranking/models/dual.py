"""A bi-encoder of two heads (DHO): one learns the judgements, one the teacher; together they are one vector a text."""

import math

import numpy as np
import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.ids import Pairs
from structkd.ranking.models.bi_encoder import BiScorer


class DualBiScorer(BiScorer):
    """Two linear heads h_1, h_2 on a bi-encoder's vector; the score is share <q_1, d_1> + (1 - share) <q_2, d_2>.

    Both heads start as the identity, so every mix starts as the bi-encoder itself. The square roots of the shares
    stand in the heads' weights: a text's vector is [sqrt(share) h_1; sqrt(1 - share) h_2], the same for queries and
    documents, and one index of plain inner products serves (`objectives.dual_head.joined_queries` puts the whole
    share on the query instead). What is saved is an ordinary SentenceTransformer of twice the width, similarity dot.
    """

    def __init__(self, start: BiScorer, *, share: float = 0.5) -> None:
        width = int(start.model.get_embedding_dimension() or 0)
        head = Dense(width, 2 * width, bias=False, activation_function=nn.Identity())
        with torch.no_grad():
            head.linear.weight.copy_(torch.cat([torch.eye(width), torch.eye(width)]))
        modules = [*start.model, *([Normalize()] if start.similarity == "cosine" else []), head]
        joined = SentenceTransformer(modules=modules, similarity_fn_name="dot", device=str(start.model.device))
        joined.prompts = start.model.prompts
        super().__init__(
            joined, name=f"{start.name}, dual head", query_length=start.query_length,
            document_length=start.document_length, device=str(start.model.device),
        )  # fmt: skip
        self.learning_rate = start.learning_rate
        self.width, self.share = width, 0.5
        self._bounded = start.bounded
        self._scale(math.sqrt(0.5), math.sqrt(0.5))
        self.set_share(share)

    @property
    def bounded(self) -> bool:
        """As what it started from: the heads are near the identity, and their weights sum to 1."""
        return self._bounded

    def set_share(self, share: float) -> None:
        """Another share of the label head; only the scale of the heads' weights changes.

        Raises:
            UsageError: not strictly between 0 and 1: a head of weight 0 could not come back.
        """
        if not 0 < share < 1:
            raise UsageError(f"share {share}: expected a number strictly between 0 and 1.")
        self._scale(math.sqrt(share / self.share), math.sqrt((1 - share) / (1 - self.share)))
        self.share = share

    def both(self, pairs: Pairs) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Scores of the label head and of the teacher head, with gradient; each distinct text is encoded once."""
        queries, query_of = np.unique(pairs.query_rows, return_inverse=True)
        documents, document_of = np.unique(pairs.document_rows, return_inverse=True)
        left = self.encode_rows(pairs.queries, queries, "query")[torch.as_tensor(query_of)]
        right = self.encode_rows(pairs.documents, documents, "document")[torch.as_tensor(document_of)]
        products = left * right
        return products[:, : self.width].sum(-1) / self.share, products[:, self.width :].sum(-1) / (1 - self.share)

    @torch.no_grad()
    def _scale(self, label: float, teacher: float) -> None:
        weight = self.model[-1].linear.weight
        weight[: self.width] *= label
        weight[self.width :] *= teacher
