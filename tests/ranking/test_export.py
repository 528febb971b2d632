"""ONNX: the file gives the student's numbers for any batch and length, or is not written at all."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd.errors import DataError, UsageError
from structkd.files import read_json
from structkd.ids import Pairs
from structkd.ranking import export as module
from structkd.ranking.data.collection import Collection
from structkd.ranking.export import ExportResult, export
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.students import student
from structkd.ranking.models.tk import TkConfig, TkModel, TkScorer

runtime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")

transformer = pytest.mark.slow  # exporting one takes half a minute; tk is exported once for the whole file


@pytest.fixture(scope="module")
def kernels(small: Collection) -> TkScorer:
    config = TkConfig(dimension=16, heads=2, layers=1, feed_forward=16, buckets=8)
    return TkScorer(TkModel.fresh(small.documents, config))


@pytest.fixture(scope="module")
def exported(small: Collection, kernels: TkScorer, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export(kernels, tmp_path_factory.mktemp("tk") / "onnx", texts=small.documents.texts[:4])


def session(folder: Path) -> object:
    return runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


@transformer
def test_dot_gives_the_students_vectors_for_any_batch_and_length(tiny: str, small: Collection, tmp_path: Path) -> None:
    scorer = BiScorer(tiny)
    result = export(scorer, tmp_path / "onnx", texts=small.documents.texts[:6])
    assert result.parity <= 1e-4
    assert (result.inputs, result.output) == (["input_ids", "attention_mask", "token_type_ids"], "vectors")
    assert result.bytes == (tmp_path / "onnx" / "model.onnx").stat().st_size
    engine = session(tmp_path / "onnx")
    for texts in (small.documents.texts[:1], small.documents.texts[5:12]):
        features = scorer.model.preprocess(list(texts))
        found = engine.run(None, {name: features[name].numpy() for name in result.inputs})[0]
        np.testing.assert_allclose(found, scorer.encode(texts, "document"), rtol=1e-3, atol=1e-4)
    described = read_json(tmp_path / "onnx" / "structkd.json")
    assert described["fingerprint"] == scorer.spec.fingerprint
    assert described["similarity"] == "dot"
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()


@transformer
def test_cat_gives_the_students_logits(tiny: str, pairs: Pairs, tmp_path: Path) -> None:
    scorer = CrossScorer(tiny, max_length=24)
    export(scorer, tmp_path / "onnx", texts=pairs.document_texts[:4])
    rows = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    features = scorer.model.preprocess(rows, max_length=24)
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = session(tmp_path / "onnx").run(None, {name: features[name].numpy() for name in names})[0]
    np.testing.assert_allclose(found, scorer.score(pairs).numpy(), rtol=1e-3, atol=1e-5)


def test_tk_gives_the_students_scores(kernels: TkScorer, exported: ExportResult, pairs: Pairs) -> None:
    assert exported.inputs == ["query_tokens", "document_tokens"]
    assert exported.parity <= 1e-4
    queries, _ = kernels.model.tokenise(pairs.query_texts, 30)
    documents, _ = kernels.model.tokenise(pairs.document_texts, 200)
    given = {"query_tokens": queries.numpy(), "document_tokens": documents.numpy()}
    found = session(exported.folder).run(None, given)[0]
    np.testing.assert_allclose(found, kernels.score(pairs).numpy(), rtol=1e-3, atol=1e-4)
    described = read_json(exported.folder / "structkd.json")
    assert described["vocabulary"] == list(kernels.model.words)
    assert described["fingerprint"] == kernels.spec.fingerprint


def test_a_file_that_differs_is_refused_and_leaves_nothing(
    kernels: TkScorer, exported: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter hands over a real file of weights that are one per cent away from the student's."""
    other = copy.deepcopy(kernels)
    with torch.no_grad():
        other.model.weights.mul_(1.01)
    monkeypatch.setattr(
        module, "_write", lambda network, sample, path: shutil.copy(exported.folder / "model.onnx", path)
    )
    with pytest.raises(DataError, match=r"differs from the student by 0\.0\d+ of its largest output"):
        export(other, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
    assert export(other, tmp_path / "onnx", tolerance=0.05).parity == pytest.approx(0.01, rel=0.05)


def test_students_without_an_onnx_form_say_so(tiny: str, small: Collection, tmp_path: Path) -> None:
    for kind in ("static", "colbert"):
        with pytest.raises(UsageError, match=f"student '{kind}' has no ONNX form here"):
            export(student(kind, None if kind == "static" else tiny, documents=small.documents), tmp_path / "onnx")
