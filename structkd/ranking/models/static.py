"""The static student: the mean of learned token vectors, no attention, no pretrained weights."""

from collections import Counter

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn

from structkd.ids import Texts
from structkd.ranking.data.tokens import train_tokenizer
from structkd.ranking.models.bi_encoder import BiScorer


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
