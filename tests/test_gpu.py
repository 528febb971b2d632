"""What only a real CUDA device can show: `pytest -m gpu tests/test_gpu.py`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import index
from structkd.errors import DeviceError
from structkd.ids import Ids, Pairs, Texts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def vectors(count: int, dim: int = 384, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_exact_search_on_the_device_equals_the_host(tmp_path: Path, metric: str) -> None:
    rows = vectors(70_000)
    rows[100:130] = rows[7]  # ties go by id on both
    index.build(rows, ids=[f"d{i}" for i in range(len(rows))], kind="flat", metric=metric, out=tmp_path / "i")
    queries = np.concatenate([vectors(300, seed=1), rows[[7, 100]]])
    found = [index.open(tmp_path / "i", device=device).search(queries, k=50) for device in ("cpu", "cuda")]
    assert np.array_equal(found[0].rows, found[1].rows)
    assert np.allclose(found[0].scores, found[1].scores, atol=1e-6)


def test_tf32_of_the_caller_changes_nothing_and_comes_back(tmp_path: Path) -> None:
    rows = vectors(5000)
    index.build(rows, ids=[str(i) for i in range(5000)], kind="flat", metric="ip", out=tmp_path / "i")
    opened = index.open(tmp_path / "i", device="cuda")
    exact = opened.search(rows[:100], k=10)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = opened.search(rows[:100], k=10)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert np.array_equal(exact.rows, rounded.rows)


def test_a_full_device_means_smaller_tiles_then_a_clear_error(tmp_path: Path) -> None:
    rows = vectors(70_000, 64)
    index.build(rows, ids=[str(i) for i in range(len(rows))], kind="flat", metric="ip", out=tmp_path / "i")
    queries = vectors(4096, 64, seed=1)
    expected = index.open(tmp_path / "i", device="cpu").search(queries, k=10)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((300 << 20) / total)  # a tile of 65,536 for 4,096 queries takes 1 GB
    try:
        found = index.open(tmp_path / "i", device="cuda").search(queries, k=10)
        assert np.array_equal(found.rows, expected.rows)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((1 << 20) / total)
        with pytest.raises(DeviceError, match=r"out of memory at one query"):
            index.open(tmp_path / "i", device="cuda").search(queries, k=10)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert free > 1 << 30


def test_maxsim_on_the_device_equals_the_host(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 2000)
    tokens = vectors(int(lengths.sum()), 128)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    ids = [str(i) for i in range(len(documents))]
    index.build_multi(documents, ids=ids, metric="ip", out=tmp_path / "i")
    queries = [vectors(12, 128, seed) for seed in range(1, 20)]
    found = [index.open(tmp_path / "i", device=device).search(queries, k=10) for device in ("cpu", "cuda")]
    assert np.array_equal(found[0].rows, found[1].rows)
    assert np.allclose(found[0].scores, found[1].scores, atol=1e-4)


def test_estimates_of_coded_documents_on_the_device_equal_the_host(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 2000)
    words = vectors(50, 128)
    tokens = words[np.random.default_rng(1).integers(0, 50, int(lengths.sum()))] + 0.05 * vectors(
        int(lengths.sum()), 128
    )
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    index.build_multi(documents, metric="ip", recall=0.9, out=tmp_path / "i")
    queries = [words[seed : seed + 12] for seed in range(1, 20)]
    found = [index.open(tmp_path / "i", device=device).search(queries, k=10) for device in ("cpu", "cuda")]
    assert "scored" in index.open(tmp_path / "i").manifest.parameters
    assert np.mean(found[0].rows == found[1].rows) > 0.99  # an estimate at the edge may round to the other side
    assert np.allclose(found[0].scores, found[1].scores, atol=1e-3)


def small_collection(folder: Path) -> Path:
    """Twenty words: the documents that share a query's word are its answers."""
    words = [f"{first}{last}" for first in ("bri", "kol", "mav", "tes") for last in ("dan", "lor", "mir", "sun", "vek")]
    rng = np.random.default_rng(0)
    folder.mkdir()
    texts = [" ".join(rng.choice(words, 12)) for _ in range(120)]
    lines = [f'{{"_id": "d{i}", "title": "", "text": "{text}"}}\n' for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    asked = [" ".join(rng.choice(words, 2, replace=False)) for _ in range(24)]
    (folder / "queries.jsonl").write_text(
        "".join(f'{{"_id": "q{i}", "text": "{text}"}}\n' for i, text in enumerate(asked))
    )
    rows = ["query-id\tcorpus-id\tscore"]
    for i, query in enumerate(asked):
        wanted = set(query.split())
        rows += [f"q{i}\td{j}\t1" for j, text in enumerate(texts) if wanted <= set(text.split())]
    (folder / "qrels.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["dot", "colbert", "prett", "cat", "tk", "static"])
def test_every_student_learns_on_the_device(tmp_path: Path, minilm: str, kind: str, precision: str) -> None:
    from structkd import ranking
    from structkd.ranking.data.negatives import bm25_candidates
    from structkd.ranking.teachers.sources import Bm25Scorer

    collection = ranking.load(str(small_collection(tmp_path / "c")))
    init = None if kind in ("tk", "static") else minilm
    student = ranking.student(kind, init, documents=collection.documents, max_length=32)
    config = ranking.DistillConfig(epochs=2, depth=8, batch_lists=8, precision=precision)
    done = ranking.distill(student, Bm25Scorer(collection.documents), collection, config)
    assert next(done.student.parameters()).is_cuda
    assert torch.isfinite(done.student.score(collection.pairs_of(bm25_candidates(collection, 8)))).all()
    done.student.save(tmp_path / "saved")
    pairs = collection.pairs_of(bm25_candidates(collection, 3))
    again = ranking.load_student(tmp_path / "saved").score(pairs)
    assert torch.allclose(again.cpu(), done.student.score(pairs).cpu(), atol=1e-3)


def test_scores_on_the_device_equal_the_host(tmp_path: Path, minilm: str) -> None:
    from structkd.ranking.models.cross_encoder import CrossScorer

    words = [f"word{i}" for i in range(50)]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(1, 90))) for _ in range(64)]
    documents = Texts(Ids([f"d{i}" for i in range(64)]), texts)
    queries = Texts(Ids(["q"]), ["word1 word2"])
    pairs = Pairs(queries, documents, np.zeros(64, dtype=np.int64), np.arange(64))
    torch.manual_seed(0)
    host = CrossScorer(minilm, device="cpu")
    host.model.save_pretrained(str(tmp_path / "model"))
    expected = host.score(pairs)
    assert torch.allclose(CrossScorer(str(tmp_path / "model"), device="cuda").score(pairs).cpu(), expected, atol=1e-4)
    rounded = CrossScorer(str(tmp_path / "model"), device="cuda", dtype="bfloat16").score(pairs).cpu()
    assert torch.allclose(rounded.float(), expected, atol=0.05)
