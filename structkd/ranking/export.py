"""ONNX files of students, checked against the student on given texts before anything is written.

dot (and every bi-encoder): input_ids, attention_mask[, token_type_ids] -> vectors, as the index wants them.
cat: the same inputs of the joined pair -> scores. tk: query_tokens, document_tokens (0 pads) -> scores.
Batch and lengths are free in all of them. The tokenizer lies beside the file.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from structkd.errors import DataError, MissingExtraError, UsageError
from structkd.files import write_json
from structkd.ranking.data.tokens import padded
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.scorer import NeuralScorer, evaluating, whole_folder
from structkd.ranking.models.tk import TkModel, TkScorer

_OPSET = 18
_SHAPES = ((2, 9), (1, 3), (5, 17))  # batches and lengths: the first is traced, the others show that none is fixed

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class ExportResult:
    """An exported student.

    Attributes:
        folder: model.onnx, the tokenizer or vocabulary, structkd.json.
        inputs: names of the inputs.
        output: name of the output.
        parity: largest difference between the file and the student, relative to the student's largest output.
        bytes: size of the file.
    """

    folder: Path
    inputs: list[str]
    output: str
    parity: float
    bytes: int


def export(
    scorer: NeuralScorer, folder: str | Path, *, texts: Sequence[str] = (), tolerance: float = 1e-4
) -> ExportResult:
    """Write the student as ONNX, whole or not at all; the file's outputs agree with the student's.

    Args:
        scorer: a dot (bi-encoder), cat or tk student.
        folder: where it goes.
        texts: real texts that the file is checked on besides random tokens.
        tolerance: largest difference allowed, relative to the largest output of the student.

    Raises:
        UsageError: a student of another kind (static vectors are a table; colbert and prett have no export).
        DataError: the file disagrees with the student; nothing is written then.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    runtime = _runtime()
    network, samples = _network(scorer, list(texts))
    with evaluating(scorer), whole_folder(folder) as temporary:
        path = temporary / "model.onnx"
        names = list(samples[0])
        _write(network, samples[0], path)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        parity = max(_difference(session, network, sample) for sample in samples)
        if not parity <= tolerance:
            raise DataError(
                f"{folder}: the ONNX file differs from the student by {parity:.2g} of its largest output, more than "
                f"{tolerance:.2g}. Nothing was written; export from float32 weights, or allow more with --tolerance."
            )
        _describe(scorer, temporary, names, network.output, parity)
        size = sum(file.stat().st_size for file in temporary.glob("model.onnx*"))
    return ExportResult(Path(folder), names, network.output, parity, size)


class _Network(nn.Module):
    """What is exported: tensors in, one tensor out."""

    output = "scores"


class _Vectors(_Network):
    output = "vectors"

    def __init__(self, scorer: BiScorer) -> None:
        super().__init__()
        self.model, self.cosine = scorer.model, scorer.similarity == "cosine"

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        vectors: Tensor = self.model(features)["sentence_embedding"]
        return nn.functional.normalize(vectors, dim=-1) if self.cosine else vectors


class _Logits(_Network):
    def __init__(self, scorer: CrossScorer) -> None:
        super().__init__()
        self.model = scorer.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        logits: Tensor = self.model(features)["scores"]
        return logits.reshape(-1)


class _Kernels(_Network):
    def __init__(self, model: TkModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, query_tokens: Tensor, document_tokens: Tensor) -> Tensor:
        scores: Tensor = self.model(query_tokens, query_tokens > 0, document_tokens, document_tokens > 0)
        return scores


def _network(scorer: NeuralScorer, texts: list[str]) -> tuple[_Network, list[Inputs]]:
    """The network and the batches that it is traced and checked on."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(scorer, TkScorer):
        samples = [_words(scorer.model, shape, generator) for shape in _SHAPES]
        if texts:
            config = scorer.model.config
            queries, _ = scorer.model.tokenise(texts[::-1], config.query_length)
            documents, _ = scorer.model.tokenise(texts, config.document_length)
            samples.append({"query_tokens": queries, "document_tokens": documents})
        return _Kernels(scorer.model).eval(), samples
    if isinstance(scorer, CrossScorer):
        network: _Network = _Logits(scorer)
        rows = list(zip(texts, texts[::-1], strict=True))
        features = scorer.model.preprocess(rows, max_length=scorer.max_length) if rows else None
    elif isinstance(scorer, BiScorer) and not scorer.static:
        network = _Vectors(scorer)
        features = scorer.model.preprocess(texts) if texts else None
    else:
        raise UsageError(f"student {scorer.kind!r} has no ONNX form here; expected dot, cat or tk.")
    samples = [_tokens(scorer.model.tokenizer, shape, generator) for shape in _SHAPES]
    if features is not None:
        samples.append({name: features[name] for name in samples[0]})
    return network.eval(), samples


def _tokens(tokenizer: Any, shape: tuple[int, int], generator: torch.Generator) -> Inputs:
    """A padded batch of random tokens; its rows differ in length."""
    count, width = shape
    lengths = torch.randint(1, width + 1, (count,), generator=generator)
    lengths[0] = width
    size = len(tokenizer)
    rows = [torch.randint(0, size, (int(length),), generator=generator).numpy().astype(np.int32) for length in lengths]
    return {name: value for name, value in padded(rows, tokenizer).items() if torch.is_tensor(value)}


def _words(model: TkModel, shape: tuple[int, int], generator: torch.Generator) -> Inputs:
    count, width = shape
    size = model.embedding.num_embeddings
    queries = torch.randint(1, size, (count, width), generator=generator)
    documents = torch.randint(1, size, (count, 2 * width), generator=generator)
    documents[0, width:] = 0
    return {"query_tokens": queries, "document_tokens": documents}


def _write(network: nn.Module, sample: Inputs, path: Path) -> None:
    """Trace on the CPU with free batch and lengths; widths of different inputs are free of each other."""
    batch = torch.export.Dim("batch", min=1)
    shared: dict[str, Any] = {}
    for name in sample:
        side = name.split("_")[0] if name in ("query_tokens", "document_tokens") else "text"
        shared[name] = {0: batch, 1: torch.export.Dim(f"{side}_length", min=1)}
    device, logger = next(network.parameters()).device, logging.getLogger("torch.onnx")
    network.to("cpu")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names every optional package that it does not find
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts
            torch.onnx.export(
                network, args=(), kwargs=dict(sample), f=str(path), dynamo=True, dynamic_shapes=shared,
                input_names=list(sample), output_names=[str(network.output)], opset_version=_OPSET,
                external_data=False, verbose=False,
            )  # fmt: skip
    finally:
        logger.setLevel(level)
        network.to(device)


def _difference(session: Any, network: nn.Module, sample: Inputs) -> float:
    """Largest difference over the largest value of the student; infinite where a number is none."""
    found: NDArray[np.float32] = session.run(None, {name: value.numpy() for name, value in sample.items()})[0]
    device = next(network.parameters()).device
    with torch.no_grad():
        expected = network(**{name: value.to(device) for name, value in sample.items()}).float().cpu().numpy()
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-6))


def _describe(scorer: NeuralScorer, folder: Path, inputs: list[str], output: str, parity: float) -> None:
    """The tokenizer (or vocabulary) and what the file is."""
    described: dict[str, Any] = {
        "kind": "onnx",
        "student": scorer.kind,
        "fingerprint": scorer.spec.fingerprint,
        "inputs": inputs,
        "output": output,
        "parity": parity,
    }
    if isinstance(scorer, TkScorer):
        config = scorer.model.config
        described |= {"query_length": config.query_length, "document_length": config.document_length}
        described |= {"buckets": config.buckets, "vocabulary": list(scorer.model.words)}
    elif isinstance(scorer, BiScorer):
        scorer.model.tokenizer.save_pretrained(str(folder))
        described |= {"similarity": scorer.similarity, "prompts": dict(scorer.model.prompts or {})}
    elif isinstance(scorer, CrossScorer):
        scorer.model.tokenizer.save_pretrained(str(folder))
        described |= {"max_length": scorer.max_length}
    write_json(folder / "structkd.json", described)


def _runtime() -> ModuleType:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "an ONNX export")
    return importlib.import_module("onnxruntime")
