"""`structkd ranking encode` and `export`: what a trained model is served from."""

from pathlib import Path
from typing import Literal

import numpy as np

from structkd.cli.output import Common, Output
from structkd.errors import UsageError
from structkd.files import atomic_path, write_text
from structkd.ids import Texts
from structkd.ranking.data import datasets
from structkd.ranking.export import export
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.prett import PrettScorer
from structkd.ranking.models.scorer import Side
from structkd.ranking.models.students import load_student


def encode_command(
    *,
    collection: str,
    model: str,
    out: Path,
    side: Side = "document",
    split: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    common: Common = Common(),
) -> Output:
    """Encode documents (or queries) for an index: FILE.npy and FILE.txt, as `index build --vectors` reads them.

    A multi-vector model writes the vectors of one document together and repeats its id; a prett model writes a folder
    with its documents' lower layers, as `ranking evaluate --documents` reads it.

    Args:
        collection: Folder in BEIR layout, ir_datasets:ID or pydocs.
        model: Folder or hub id of a bi-encoder, multi-vector or prett model.
        out: The .npy file; ids go beside it with the ending .txt. For prett a folder.
        side: What to encode.
        split: Split whose queries are encoded.
        dtype: Numbers of stored prett layers.
    """
    loaded = datasets.load(collection, split)
    scorer = load_student(model)
    texts = loaded.documents if side == "document" else loaded.queries
    if isinstance(scorer, PrettScorer):
        return _document_layers(scorer, texts, side, out, dtype)
    if isinstance(scorer, MultiVectorScorer):
        vectors = scorer.encode_multi(texts.texts, side)
        lengths, flat = [len(own) for own in vectors], np.concatenate(vectors)
        names = [name for name, length in zip(texts.ids, lengths, strict=True) for _ in range(length)]
    elif isinstance(scorer, BiScorer):
        flat, names = scorer.encode(texts.texts, side), list(texts.ids)
    else:
        raise UsageError(
            f"{model}: a {scorer.kind} model scores pairs and has nothing to store; give a bi-encoder, a multi-vector "
            "model or prett."
        )
    with atomic_path(out) as temporary, open(temporary, "wb") as handle:
        np.save(handle, flat)
    ids = out.with_suffix(".txt")
    write_text(ids, "".join(f"{name}\n" for name in names))
    found = {
        "vectors": str(out),
        "ids": str(ids),
        "count": len(texts),
        "dim": int(flat.shape[1]),
        "rows": len(flat),
        "bytes_per_document": round(flat.nbytes / max(len(texts), 1), 1),
    }
    return Output(found, lines=[f"{len(flat)} vectors of {found['dim']} numbers for {len(texts)} texts: {out}, {ids}"])


def _document_layers(scorer: PrettScorer, texts: Texts, side: Side, out: Path, dtype: str) -> Output:
    if side != "document":
        raise UsageError("a prett model stores document layers only; queries run at query time. Give --side document.")
    if out.suffix == ".npy" or out.is_file():
        raise UsageError(f"{out}: a prett model writes a folder of document layers; give --out FOLDER.")
    stored = scorer.store(texts, out, dtype)
    found = {
        "documents": str(out),
        "count": stored.count,
        "dim": int(scorer.model.head.in_features),
        "bytes_per_document": round(stored.bytes_per_document, 1),
    }
    return Output(
        found, lines=[f"layers of {stored.count} documents, {stored.bytes_per_document:.0f} bytes each: {out}"]
    )


def export_command(
    *, model: str, out: Path, collection: str | None = None, tolerance: float = 1e-4, common: Common = Common()
) -> Output:
    """Write a dot, cat or tk student as ONNX, checked against the student; refused when they differ.

    Args:
        model: Folder or hub id of the student; a run folder stands for its student.
        out: Folder for model.onnx, tokenizer and structkd.json.
        collection: Real texts to check the file on, besides random tokens.
        tolerance: Largest difference allowed, relative to the student's largest output.
    """
    texts = [] if collection is None else list(datasets.load(collection, None).documents.texts[:16])
    result = export(load_student(model), out, texts=texts, tolerance=tolerance)
    found = {
        "folder": str(out),
        "inputs": result.inputs,
        "output": result.output,
        "parity": result.parity,
        "bytes": result.bytes,
    }
    line = f"{out / 'model.onnx'}: {result.bytes} bytes, {', '.join(result.inputs)} -> {result.output}"
    return Output(found, lines=[f"{line}; differs from the student by {result.parity:.1e}"])
