"""What several benchmarks start from: some layers of an encoder, settings, a collection with all its judgements."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from structkd.ranking.data.collection import Collection, read_qrels
from structkd.ranking.data.datasets import load
from structkd.ranking.self_distillation.cycles import SelfDistillConfig

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


def start(init: str, work: Path, layers: str) -> str:
    """The folder of the model with these layers (`1,3,5`), or of the whole model (`all`)."""
    if layers == "all":
        return init
    return saved(init, work / f"start-{layers.replace(',', '')}", [int(layer) for layer in layers.split(",")])


def with_settings(config: SelfDistillConfig, settings: Iterable[str]) -> SelfDistillConfig:
    """The config with `name=value` settings, each of the type that its own value has."""
    values = dict(setting.split("=", 1) for setting in settings)
    return replace(config, **{name: type(getattr(config, name))(value) for name, value in values.items()})


def dl19(data: Path) -> Collection:
    """msmarco-dl19 with TREC's full judgements, of which the pool's own are a part."""
    pooled = load(data / "msmarco-dl19")
    return replace(pooled, qrels=read_qrels(data / "msmarco-dl19" / "qrels.full.trec", pooled.queries.ids))
