"""The choice of "auto" and its reason; options; the public names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structkd import index
from structkd.errors import UsageError
from structkd.index import choice
from structkd.index.choice import IndexOptions, choose

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 10 GB free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000_000, 16_000_000_000))


@pytest.mark.parametrize(
    ("options", "count", "kind", "reason"),
    [
        ({}, 10, "flat", "10 vectors are at most 2,000,000; exact search on cpu"),
        ({}, 2_000_000, "flat", "2,000,000 vectors are at most 2,000,000"),
        ({}, 2_000_001, "ivf-sq8", "2,000,001 vectors exceed 2,000,000; 8-bit codes, recall measured"),
        ({"memory": 1.0}, 1_000_000, "ivf-sq8", "1.54 GB exceed the 1 GB allowed"),
        ({"memory": 0.2}, 1_000_000, "ivf-pq", "and so do 8-bit codes (0.38 GB); 4-bit product codes"),
        ({"memory": 2.0}, 1_000_000, "flat", "exact"),
        ({"recall": 0.92}, 100_000, "ivf-pq", "recall 0.92 is enough for 100,000 vectors"),
        ({"recall": 0.92}, 49_999, "flat", "exact"),
        ({"recall": 1.0}, 100_000, "flat", "exact"),
    ],
)
def test_auto_on_a_cpu(options: Any, count: int, kind: str, reason: str) -> None:
    chosen, why = choose(IndexOptions(**options), count, 384, CPU)
    assert chosen == kind
    assert reason in why


def test_auto_on_a_gpu(small_gpu: None) -> None:
    chosen, why = choose(IndexOptions(), 4_000_000, 384, GPU)
    assert (chosen, why) == ("flat", "4,000,000 vectors (6.14 GB) fit on cuda (10.0 GB free); exact")
    assert choose(IndexOptions(), 40_000_000, 384, GPU)[0] == "ivf-sq8"


def test_auto_without_faiss_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _: None)
    chosen, why = choose(IndexOptions(), 3_000_000, 384, CPU)
    assert chosen == "flat"
    assert "faiss is not installed (pip install 'structkd[cpu]'); exact and slow" in why
    assert choose(IndexOptions(recall=0.9), 100_000, 384, CPU)[0] == "flat"


def test_auto_is_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = index.build(np.eye(4), out=tmp_path)
    assert built.kind == "flat"
    assert "index: flat chosen: 4 vectors are at most 2,000,000" in capsys.readouterr().err
    assert index.open(tmp_path).manifest.reason.startswith("4 vectors")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 0.0}, "recall is 0.0; expected more than 0 and at most 1"),
        ({"recall": 1.1}, "recall is 1.1"),
        ({"memory": 0.0}, "memory is 0.0 gigabytes; expected more than 0"),
    ],
)
def test_options_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        index.build(np.eye(2), **options)


def test_public_names() -> None:
    assert index.__all__ == sorted(index.__all__)
    assert all(hasattr(index, name) for name in index.__all__)
    vector_kinds = {"flat", "faiss-flat", "ivf-sq8", "ivf-pq", "hnsw", "milvus", "multi-vector"}
    assert set(index.INDEXES) == vector_kinds | {"bm25", "lucene"}
