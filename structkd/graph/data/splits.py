"""Protocols: which nodes train, validate and test. One table never mixes two of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.graph.data.task import UNKNOWN

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Rows for the loss, for selection, for the report."""

    train: IntArray
    valid: IntArray
    test: IntArray


def per_class(labels: IntArray, counts: tuple[int, ...], generator: np.random.Generator, name: str) -> list[IntArray]:
    """Disjoint draws of counts[0], counts[1], ... nodes of every class; unlabelled nodes are never drawn."""
    parts: list[list[IntArray]] = [[] for _ in counts]
    for label in np.unique(labels[labels != UNKNOWN]):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) <= sum(counts):
            raise DataError(
                f"{name}: class {label} has {len(rows)} nodes, the split draws {sum(counts)} of each class and needs "
                "one more for the test set. Use masks of your own, or --split masks when the file has them."
            )
        at = 0
        for part, count in zip(parts, counts, strict=True):
            part.append(rows[at : at + count])
            at += count
    return [np.sort(np.concatenate(part)) for part in parts]


def random_split(
    labels: IntArray, seed: int, name: str, *, each: int = 20, valid: int = 500, test: int | None = 1000
) -> Split:
    """20 nodes per class, then 500 and 1000 uniform from the rest (`test=None`: all the rest); one draw per seed."""
    generator = np.random.default_rng(seed)
    (train,) = per_class(labels, (each,), generator, name)
    rest = generator.permutation(np.setdiff1d(np.flatnonzero(labels != UNKNOWN), train))
    needed = valid + (test if test is not None else 1)
    if len(rest) < needed:
        raise DataError(
            f"{name}: {len(rest)} labelled nodes are left after training draws, the random split needs {needed}. "
            "Use --split cpf, or masks of your own."
        )
    end = len(rest) if test is None else valid + test
    return Split(train, np.sort(rest[:valid]), np.sort(rest[valid:end]))


def cpf_split(labels: IntArray, seed: int, name: str) -> Split:
    """20 per class train, 30 per class validation, all the rest test; the graph is the largest component already."""
    train, valid = per_class(labels, (20, 30), np.random.default_rng(seed), name)
    rest = np.setdiff1d(np.flatnonzero(labels != UNKNOWN), np.concatenate([train, valid]))
    return Split(train, valid, rest)


def mask_split(masks: Any, seed: int, name: str) -> Split:
    """The seed-th of the fixed masks of a file (seeds beyond the last start over)."""
    if masks is None:
        raise DataError(f"{name}: no fixed masks in this dataset; use --split random or cpf.")
    train, valid, test = (np.atleast_2d(np.asarray(mask)) for mask in masks)
    row = seed % len(train)
    return Split(*(np.flatnonzero(mask[row]) for mask in (train, valid, test)))
