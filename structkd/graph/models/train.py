"""The one training loop of this half: Adam, early stop on validation, weights of the best epoch."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from structkd.errors import DataError, UsageError
from structkd.progress import track

Selection = Literal["metric", "loss"]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class FitConfig:
    """How to optimise; UsageError on a value that no optimiser takes."""

    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    epochs: int = 500
    patience: int = 50
    select: Selection = "metric"

    def __post_init__(self) -> None:
        at_least_one(epochs=self.epochs, patience=self.patience)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning rate {self.learning_rate}: expected a number above 0, as 0.01.")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight decay {self.weight_decay}: expected 0 or a number above it, as 0.0005.")


def at_least_one(**counts: int) -> None:
    """UsageError for the first count that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name.replace('_', ' ')} {count}: expected 1 or more.")


@dataclass(frozen=True)
class Fit:
    """What the loop found; the model holds the weights of `best_epoch`. `cpu_seconds` leaves out what was watched."""

    best_epoch: int
    valid: float
    epochs: int
    history: tuple[Mapping[str, float], ...]
    cpu_seconds: float


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    validate: Callable[[], tuple[float, float]],
    config: FitConfig,
    seed: int,
    watch: Callable[[int], Mapping[str, float]] | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
    steps: int = 1,
) -> Fit:
    """Train in place until validation has not reached its best for `patience` epochs; load the best weights.

    An epoch that equals the best counts as best and resets patience (Wu et al., AAAI 2023, released loop). One
    evaluation per epoch; nothing here sees a test label. Dropout draws come from `seed`, and the caller's random
    state is left as it was.

    Args:
        loss_of: epoch -> scalar loss, called in train mode.
        validate: validation metric and cross-entropy, called in eval mode without gradient; config.select says which
            of the two decides the best epoch.
        watch: epoch -> further curve values, called in eval mode without gradient.
        groups: parameter groups with settings of their own; None: all parameters alike.
        steps: optimiser steps per epoch; each calls loss_of, and the curve shows their mean.

    Raises:
        DataError: the loss is not a finite number.
    """
    parameters = model.parameters() if groups is None else [dict(group) for group in groups]
    optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    best_epoch, best, reported = 0, float("-inf"), 0.0
    weights, history = copy.deepcopy(model.state_dict()), []
    started, watching = time.process_time(), 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in track(range(1, config.epochs + 1), "epochs, at most"):
            loss = sum(_step(model, optimiser, loss_of, epoch) for _ in range(steps)) / steps
            valid, valid_loss = _look(model, validate)
            watched_from = time.process_time()
            seen = _look(model, partial(watch, epoch)) if watch is not None else {}
            watching += time.process_time() - watched_from
            history.append({"step": epoch, "loss": loss, "valid": valid, **seen})
            score = valid if config.select == "metric" else -valid_loss
            if score >= best:
                best_epoch, best, reported = epoch, score, valid
                weights = copy.deepcopy(model.state_dict())
            if epoch - best_epoch >= config.patience:
                break
    model.load_state_dict(weights)
    model.eval()
    return Fit(best_epoch, reported, len(history), tuple(history), time.process_time() - started - watching)


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, loss_of: Callable[[int], Tensor], epoch: int) -> float:
    model.train()
    optimiser.zero_grad(set_to_none=True)
    loss = loss_of(epoch)
    value = float(loss.detach())
    if not torch.isfinite(loss):
        raise DataError(f"epoch {epoch}: the loss is {value}; lower the learning rate or look at the features.")
    torch.autograd.backward([loss])
    optimiser.step()
    return value


@torch.no_grad()
def _look(model: nn.Module, ask: Callable[[], Answer]) -> Answer:
    """The answer in eval mode and without gradient."""
    model.eval()
    return ask()
