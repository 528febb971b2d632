"""What several benchmarks start from: some layers of an encoder, a collection with all its judgements."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from structkd.ranking.data import Collection, read_qrels
from structkd.ranking.datasets import load

TWO = (2, 5)
"The third and the last layer of six."


def with_layers(init: str, layers: Iterable[int] = TWO) -> SentenceTransformer:
    """The model with these layers only."""
    model = SentenceTransformer(init, device="cpu")
    body = model[0].auto_model
    body.encoder.layer = torch.nn.ModuleList([body.encoder.layer[layer] for layer in layers])
    body.config.num_hidden_layers = len(body.encoder.layer)
    return model


def saved(init: str, folder: Path, layers: Iterable[int] = TWO) -> str:
    """The folder that holds this model, written once."""
    if not folder.is_dir():
        with_layers(init, layers).save(str(folder))
    return str(folder)


def dl19(data: Path) -> Collection:
    """msmarco-dl19 with TREC's full judgements, of which the pool's own are a part."""
    pooled = load(data / "msmarco-dl19")
    return replace(pooled, qrels=read_qrels(data / "msmarco-dl19" / "qrels.full.trec", pooled.queries.ids))
