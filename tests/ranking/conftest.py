"""A tiny random BERT with a real WordPiece tokenizer, a small collection: what the ranking tests train on."""

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.collection import Collection
from structkd.ranking.models.encoders import quiet_loading, train_tokenizer

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]


def text(generator: np.random.Generator, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS, size=generator.integers(low, high)))


@pytest.fixture(scope="session")
def small() -> Collection:
    """12 queries, 40 documents of very different lengths; the relevant document of query i is i."""
    generator = np.random.default_rng(0)
    documents = [text(generator, 2, 30) for _ in range(40)]
    queries = [" ".join(documents[i].split()[:3]) + " " + WORDS[i] for i in range(12)]
    return Collection(
        "small",
        Texts(Ids(f"q{i:02d}" for i in range(12)), queries),
        Texts(Ids(f"d{i:02d}" for i in range(40)), documents),
        {f"q{i:02d}": {f"d{i:02d}": 1} for i in range(12)},
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a plain two-layer BERT body, width 32, without any pooling or head of its own."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    core = train_tokenizer([" ".join(WORDS)] * 3, 200)
    core.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet_loading():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pairs(small: Collection) -> Pairs:
    """30 pairs with many repeats of queries and documents, two pairs twice."""
    generator = np.random.default_rng(1)
    query_rows, document_rows = generator.integers(0, 5, 30), generator.integers(0, 12, 30)
    for copy, source in ((-1, 0), (-2, -5)):
        query_rows[copy], document_rows[copy] = query_rows[source], document_rows[source]
    return Pairs(small.queries, small.documents, query_rows, document_rows)
