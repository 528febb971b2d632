"""Which kind "auto" takes for vectors, and why: by count, device, memory allowed and recall wanted."""

import importlib.util
from dataclasses import dataclass

import torch

from structkd.errors import UsageError, did_you_mean
from structkd.index.vectors import check_metric

FLAT_LIMIT = 2_000_000  # above it, exact search is no longer the default
INEXACT_FROM = 50_000  # below it, exact search is fast enough to need no approximation
FAISS_KINDS = ("faiss-flat", "ivf-sq8", "ivf-pq", "hnsw")
VECTOR_KINDS = ("auto", "flat", *FAISS_KINDS, "milvus")


@dataclass(frozen=True)
class IndexOptions:
    """How to build an index of vectors."""

    kind: str = "auto"
    "auto, flat, faiss-flat, ivf-sq8, ivf-pq or hnsw."

    metric: str = "cosine"
    "cosine (normalises inside), ip (inner product) or l2 (minus the squared distance)."

    recall: float | None = None
    "Recall@10 against exact search that an approximate kind should reach (0.95); `auto` may only be inexact with it."

    memory: float | None = None
    "Gigabytes that the index may take in memory when it is searched; only `auto` looks at it."

    seed: int = 0
    "Seed of the training sample and of the queries that recall is measured with."


def check_options(options: IndexOptions) -> None:
    """UsageError when a value is unknown or out of range."""
    check_metric(options.metric)
    if options.kind not in VECTOR_KINDS:
        known = f"expected one of {', '.join(VECTOR_KINDS)}."
        near = did_you_mean(options.kind, VECTOR_KINDS)
        raise UsageError(f"kind {options.kind!r} is unknown for vectors; {known}{near}")
    check_recall(options.recall)
    if options.memory is not None and not options.memory > 0:
        raise UsageError(f"memory is {options.memory} gigabytes; expected more than 0.")


def check_recall(recall: float | None) -> None:
    """UsageError when a recall is given that is none."""
    if recall is not None and not 0 < recall <= 1:
        raise UsageError(f"recall is {recall}; expected more than 0 and at most 1.")


def choose(options: IndexOptions, count: int, dim: int, device: torch.device) -> tuple[str, str]:
    """The kind for "auto", and why, in one line.

    Exact search up to two million vectors, or when a GPU holds them: it has recall 1 and no build. Above, ivf-sq8. When
    the caller says that a recall below 1 is enough, ivf-pq from 50,000 vectors on: it reads codes 20 times faster.
    When the vectors exceed the memory that was allowed, a compressed kind that fits: ivf-sq8 (a quarter), else ivf-pq.
    """
    size = count * dim * 4 / 1e9
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size * 1e9 < 0.7 * free:
            return "flat", f"{count:,} vectors ({size:.2f} GB) fit on {device} ({free / 1e9:.1f} GB free); exact"
    fits = options.memory is None or size <= options.memory
    inexact = options.recall is not None and options.recall < 1 and count >= INEXACT_FROM
    if inexact and importlib.util.find_spec("faiss") is not None:
        return (
            "ivf-pq",
            f"recall {options.recall} is enough for {count:,} vectors; 4-bit product codes, recall measured",
        )
    if count <= FLAT_LIMIT and fits:
        return "flat", f"{count:,} vectors are at most {FLAT_LIMIT:,}; exact search on {device}"
    why = (
        f"{count:,} vectors exceed {FLAT_LIMIT:,}"
        if fits
        else f"{size:.2f} GB exceed the {options.memory:g} GB allowed"
    )
    if importlib.util.find_spec("faiss") is None:
        return "flat", f"{why}, but faiss is not installed (pip install 'structkd[cpu]'); exact and slow"
    if options.memory is not None and size / 4 > options.memory:
        return "ivf-pq", f"{why}, and so do 8-bit codes ({size / 4:.2f} GB); 4-bit product codes"
    return "ivf-sq8", f"{why}; 8-bit codes, recall measured"
