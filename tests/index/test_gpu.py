"""faiss on a GPU, through a fake one that runs out of memory: no silent fallback, half precision, halving, k > 2048."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from structkd import index
from structkd.errors import DeviceError
from structkd.index.approximate import faiss_gpu
from structkd.index.approximate.faiss_index import FaissIndex

VECTORS = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)


class Gpu:
    """What faiss and torch say of one GPU with room for some bytes of index and some queries at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int = 1 << 40, batch: int = 1 << 20) -> None:
        self.room, self.batch = room, batch
        self.made: list[str] = []
        self.asked: list[tuple[int, int]] = []
        self.alive = 0
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
        patch.setattr(faiss, "StandardGpuResources", self.resources, raising=False)
        patch.setattr(faiss, "GpuClonerOptions", type("Options", (), {"useFloat16": False}), raising=False)
        patch.setattr(faiss, "index_cpu_to_gpu", self.copy, raising=False)
        faiss_gpu.resources.cache_clear()

    def resources(self) -> Any:
        self.alive += 1
        return object()

    def copy(self, _: Any, device: int, engine: Any, options: Any) -> "Copy":
        assert device == 0
        size = engine.ntotal * engine.d * (2 if options.useFloat16 else 4)
        self.made.append("half" if options.useFloat16 else "full")
        if size > self.room:
            raise RuntimeError(
                "Error in virtual void* StandardGpuResourcesImpl::allocMemory: cudaMalloc error out of memory"
            )
        return Copy(self, engine)


class Copy:
    def __init__(self, gpu: Gpu, engine: Any) -> None:
        self.gpu, self.engine, self.nprobe = gpu, engine, 1

    def search(self, queries: np.ndarray, k: int) -> Any:
        assert k <= 2048
        self.gpu.asked.append((len(queries), k))
        if len(queries) > self.gpu.batch:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        return self.engine.search(queries, k)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    index.build(VECTORS, kind="faiss-flat", out=tmp_path, device="cpu")
    return tmp_path


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    yield
    faiss_gpu.resources.cache_clear()


def same_as_cpu(folder: Path, found: index.TopK, k: int) -> None:
    np.testing.assert_array_equal(found.rows, index.open_vectors(folder, "cpu").search(VECTORS[: len(found)], k).rows)


def test_a_named_gpu_that_faiss_lacks_is_an_error_and_auto_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Gpu(monkeypatch)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(DeviceError, match=r"the installed faiss sees no GPU .*structkd\[gpu\]"):
        index.open(folder, device="cuda")
    assert index.open_vectors(folder, device="auto").search(VECTORS[:2], 3).valid.all()
    assert (
        "searching on the CPU: device 'cuda' was asked for and the installed faiss sees no GPU"
        in capsys.readouterr().err
    )


def test_kinds_without_a_gpu_form_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index.build(VECTORS, kind="hnsw", recall=0.5, out=tmp_path, device="cpu")
    Gpu(monkeypatch)
    with pytest.raises(DeviceError, match=r"faiss cannot search the kind 'hnsw' on a GPU\. Use faiss-flat or ivf-sq8"):
        index.open(tmp_path, device="cuda")


def test_half_precision_before_giving_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = Gpu(monkeypatch, room=3000 * 16 * 3)
    opened = index.open_vectors(folder, device="cuda")
    assert gpu.made == ["full", "half"]
    assert "in half precision on cuda:0" in capsys.readouterr().err
    same_as_cpu(folder, opened.search(VECTORS[:9], 10), 10)
    gpu.room = 10
    with pytest.raises(DeviceError, match="cuda:0: 3,000 vectors do not fit, not even in half precision"):
        index.open(folder, device="cuda")
    assert index.open_vectors(folder, device="auto").search(VECTORS[:2], 3).valid.all()
    assert "searching on the CPU: cuda:0: 3,000 vectors do not fit" in capsys.readouterr().err


def test_batches_are_halved_until_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, batch=10)
    opened = index.open_vectors(folder, device="cuda")
    same_as_cpu(folder, opened.search(VECTORS[:37], 5), 5)
    assert [size for size, _ in gpu.asked] == [37, 18, 9, 9, 19, 9, 10]
    gpu.batch = 0
    with pytest.raises(DeviceError, match="cuda:0: out of memory at one query"):
        opened.search(VECTORS[:3], 5)


def test_other_errors_are_not_taken_for_a_lack_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)

    def broken(*_: Any) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", broken)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        index.open(folder, device="cuda")


def test_long_lists_leave_the_gpu_and_are_never_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    opened = index.open_vectors(folder, device="cuda")
    same_as_cpu(folder, opened.search(VECTORS[:4], 2500), 2500)
    assert gpu.asked == []
    same_as_cpu(folder, opened.search(VECTORS[:4], 2048), 2048)
    assert gpu.asked == [(4, 2048)]


def test_one_resources_object_for_a_device_kept_alive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    first, second = (index.open_vectors(folder, device="cuda") for _ in range(2))
    assert gpu.alive == 1
    assert isinstance(first, FaissIndex)
    assert isinstance(second, FaissIndex)
    assert first._on_gpu is not None
    assert second._on_gpu is not None
    assert first._on_gpu._resources is second._on_gpu._resources is faiss_gpu.resources(0)


def test_the_copy_searches_as_thoroughly_as_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = index.build(VECTORS, kind="ivf-sq8", recall=0.9, out=tmp_path, device="cpu")
    Gpu(monkeypatch)
    opened = index.open_vectors(tmp_path, device="cuda")
    assert isinstance(opened, FaissIndex)
    assert opened._on_gpu is not None
    opened.apply(opened.manifest.parameters | {"nprobe": 7})
    assert opened._on_gpu._engine.nprobe == 7  # type: ignore[union-attr]
    assert built.kind == "ivf-sq8"
