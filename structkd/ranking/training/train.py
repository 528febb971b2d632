"""The one training loop of the ranking half: lists of candidates in, a trained scorer out, resumable to the bit."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from structkd.errors import DataError, UsageError
from structkd.files import atomic_path, read_json, write_text
from structkd.ids import Pairs, Texts, fingerprint_arrays, fingerprint_json
from structkd.progress import note, track
from structkd.ranking.models.encoders import NeuralScorer, weights_sha256
from structkd.ranking.models.scorer import attention_of_any_shape
from structkd.ranking.training.dropout import drops_on
from structkd.runs import Run, plain

LossOf = Callable[[nn.Module, "Batch"], Tensor]
Validate = Callable[[], float]


@runtime_checkable
class Stateful(Protocol):
    """A loss that changes from step to step: what it holds goes into checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from them."""


@dataclass(frozen=True)
class FitConfig:
    """The loop's settings."""

    epochs: int = 3
    "Passes over all pairs."

    max_steps: int = 0
    "Stop after this many steps; 0: epochs decide."

    batch_lists: int = 8
    "Lists in a step."

    batch_tokens: int = 0
    "Document tokens in a step (of the pair for cat), on average over an epoch, instead of a number of lists; 0: lists."

    list_size: int = 16
    "Longest list in a step; longer ones are cut at random, anew in each epoch, so that an epoch sees each pair once."

    learning_rate: float = 5e-5
    "Peak learning rate (Adam)."

    weight_decay: float = 0.0
    "Decoupled weight decay."

    warmup: float = 0.1
    "Share of the steps with rising learning rate; it falls linearly after."

    clip: float = 1.0
    "Largest gradient norm."

    validate_every: int = 0
    "Steps between validations; 0: once an epoch."

    patience: int = 0
    "Stop after this many validations without a new best; 0: never."

    checkpoint_every: int = 50
    "Steps between checkpoints (where a run folder is given)."

    precision: Literal["no", "fp16", "bf16"] = "no"
    "Mixed precision of the forward pass."

    dropout: bool = True
    "Dropout as the student's configuration has it, or none."

    gradient_cache: bool = False
    """Keep the outputs of a step only and run its texts again, some at a time, for their gradients (Gao et al. 2021):
    the same gradients in the memory of a few texts, for one more forward pass. For large in-batch sets."""

    seed: int = 0
    "Order of the lists, cuts and dropout."


@dataclass(frozen=True)
class Lists:
    """Training lists of different lengths over two text tables.

    Attributes:
        query_rows: int64 [lists].
        offsets: int64 [lists + 1]; list i holds the pairs offsets[i]:offsets[i + 1].
        document_rows: int64 [pairs].
        targets: float32 [pairs], teacher scores or labels.
    """

    queries: Texts
    documents: Texts
    query_rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    document_rows: NDArray[np.int64]
    targets: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not np.isfinite(self.targets).all():
            bad = int(np.flatnonzero(~np.isfinite(self.targets))[0])
            pairs = self.pairs().take([bad])
            raise DataError(
                f"{int((~np.isfinite(self.targets)).sum())} targets are not finite, for example query "
                f"{pairs.query_ids[0]!r}, document {pairs.document_ids[0]!r}. Score these pairs again."
            )

    def __len__(self) -> int:
        return len(self.query_rows)

    def pairs(self) -> Pairs:
        """All pairs, list by list."""
        repeated = np.repeat(self.query_rows, np.diff(self.offsets))
        return Pairs(self.queries, self.documents, repeated, self.document_rows)

    def take(self, positions: Sequence[int]) -> "Lists":
        """These lists, over the same tables."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in positions]
        items = np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)
        offsets = np.cumsum([0, *(len(span) for span in spans)])
        rows = self.query_rows[np.asarray(positions, dtype=np.int64)]
        return Lists(self.queries, self.documents, rows, offsets, self.document_rows[items], self.targets[items])

    def fingerprint(self) -> str:
        """Identity of ids, pairs and targets."""
        arrays = fingerprint_arrays(
            query_rows=self.query_rows, offsets=self.offsets, documents=self.document_rows, targets=self.targets
        )
        return fingerprint_json([self.queries.ids.fingerprint(), self.documents.ids.fingerprint(), arrays])


def lists_of(
    queries: Texts,
    documents: Texts,
    lists: Sequence[tuple[int, NDArray[np.int64]]],
    targets: NDArray[np.float32] | None = None,
) -> Lists:
    """Lists from (query row, document rows); targets flat in the same order, 0 when they come later."""
    offsets = np.cumsum([0, *(len(rows) for _, rows in lists)]).astype(np.int64)
    rows = np.concatenate([rows for _, rows in lists]) if lists else np.empty(0, dtype=np.int64)
    values = np.zeros(len(rows), dtype=np.float32) if targets is None else np.asarray(targets, dtype=np.float32)
    query_rows = np.asarray([query for query, _ in lists], dtype=np.int64)
    return Lists(queries, documents, query_rows, offsets, rows.astype(np.int64), values)


@dataclass(frozen=True)
class Batch:
    """Some lists, padded to [lists, items]; `pairs` holds the valid entries only, row by row.

    Attributes:
        pairs: what the student scores.
        targets: 0 where padded.
        mask: True where valid.
    """

    pairs: Pairs
    targets: Float[Tensor, "lists items"]
    mask: Bool[Tensor, "lists items"]

    def grid(self, scores: Float[Tensor, " pairs"]) -> Float[Tensor, "lists items"]:
        """Flat scores in their places, 0 elsewhere; gradients flow to the scores."""
        mask = self.mask.to(scores.device)
        return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_scatter(mask, scores)

    def to(self, device: torch.device) -> "Batch":
        """Targets and mask on a device."""
        return Batch(self.pairs, self.targets.to(device), self.mask.to(device))


def batch_of(lists: Lists, items: Sequence[NDArray[np.int64]], owners: Sequence[int]) -> Batch:
    """The batch of these item positions (into the flat pairs), one sequence per list."""
    width = max(len(positions) for positions in items)
    targets = torch.zeros(len(items), width)
    mask = torch.zeros(len(items), width, dtype=torch.bool)
    for row, positions in enumerate(items):
        targets[row, : len(positions)] = torch.from_numpy(lists.targets[positions])
        mask[row, : len(positions)] = True
    flat = np.concatenate(items)
    query_rows = np.repeat(lists.query_rows[np.asarray(owners)], [len(positions) for positions in items])
    return Batch(Pairs(lists.queries, lists.documents, query_rows, lists.document_rows[flat]), targets, mask)


@dataclass(frozen=True)
class Plan:
    """The batches of every epoch as a function of (seed, epoch): nothing is replayed to resume in the middle."""

    lists: Lists
    batch_lists: int
    list_size: int
    seed: int
    batch_tokens: int = field(default=0, kw_only=True)
    sizes: NDArray[np.int64] | None = field(default=None, kw_only=True, repr=False)

    def identity(self) -> list[str]:
        """What tells other batches of the same lists apart; a checkpoint belongs to one identity."""
        return []

    def epoch(self, number: int) -> list[list[tuple[int, NDArray[np.int64]]]]:
        """Batches of (list, item positions)."""
        generator = np.random.default_rng([self.seed, number])
        pieces: list[tuple[int, NDArray[np.int64]]] = []
        for row in range(len(self.lists)):
            low, high = int(self.lists.offsets[row]), int(self.lists.offsets[row + 1])
            if high - low <= self.list_size:
                pieces.append((row, np.arange(low, high)))
            else:
                shuffled = low + generator.permutation(high - low)
                count = math.ceil((high - low) / self.list_size)
                pieces += [(row, np.sort(part)) for part in np.array_split(shuffled, count)]
        shuffled_pieces = [pieces[i] for i in generator.permutation(len(pieces))]
        cuts = [0, *self._cuts(shuffled_pieces), len(pieces)]
        return [shuffled_pieces[low:high] for low, high in pairwise(cuts)]

    def _cuts(self, pieces: Sequence[tuple[int, NDArray[np.int64]]]) -> list[int]:
        """Where a new batch begins. The number of batches is the same in every epoch, so a step names its epoch."""
        if not self.batch_tokens or self.sizes is None:
            return list(range(self.batch_lists, len(pieces), self.batch_lists))
        reached = np.cumsum([self.sizes[items].sum() for _, items in pieces])
        steps = min(len(pieces), max(1, round(float(self.sizes.sum()) / self.batch_tokens)))
        wanted = np.searchsorted(reached, reached[-1] * np.arange(1, steps) / steps) + 1
        index = np.arange(len(wanted))
        later = np.maximum.accumulate(wanted - index) + index  # each batch has a list or more
        return [int(cut) for cut in np.minimum(later, len(pieces) - steps + 1 + index)]


@dataclass(frozen=True)
class FitResult:
    """What the loop did.

    Attributes:
        steps: optimizer steps.
        history: one row per logged step or validation.
        best_step: step of the kept weights.
        best_value: its validation value, None without validation.
        pairs_per_second: pairs trained per second of training time (validation and saving excluded).
    """

    steps: int
    history: list[dict[str, Any]] = field(repr=False)
    best_step: int
    best_value: float | None
    pairs_per_second: float


@dataclass
class _State:
    """What a checkpoint holds besides weights and optimizer."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    stale: int = 0
    pairs: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    student: nn.Module,
    lists: Lists,
    loss_of: LossOf,
    config: FitConfig,
    *,
    validate: Validate | None = None,
    run: Run | None = None,
    plan: Plan | None = None,
    start_counts: bool = True,
) -> FitResult:
    """Train `student` in place; afterwards it holds the weights of the best validation (the last without one).

    Every batch, cut and dropout mask is a function of (seed, step), so a run that was killed and continues from its
    checkpoint ends with the same weights, bit for bit on the same machine. With several processes (accelerate,
    torchrun) each trains on its own lists of every batch.

    Args:
        student: a scorer of `structkd.ranking.models.encoders`.
        lists: training lists.
        loss_of: (student, batch) -> scalar; one that is `Stateful` is saved and resumed with the rest.
        config: settings.
        validate: measures the student, higher is better; called before the first step and as configured.
        run: where checkpoints and metrics go; without it nothing is written.
        plan: batches of `lists` in another order or composition than shuffled lists.
        start_counts: whether the weights before the first step, measured in any case, can be the best ones.

    Raises:
        UsageError: nothing to train on, a setting out of range, or a checkpoint of another run in the folder.
        DataError: the loss is not finite.
    """
    _check(config, lists)
    chosen = plan or plan_of(lists, config, student)
    return _Loop(student, chosen, loss_of, config, validate, run).train(start_counts)


def plan_of(lists: Lists, config: FitConfig, student: nn.Module) -> Plan:
    """Shuffled lists in batches; with `batch_tokens` the student says how long each document is."""
    sizes = None
    if config.batch_tokens:
        pairs = lists.pairs()
        words = np.asarray([len(text.split()) for text in pairs.document_texts], dtype=np.int64)
        sizes = student.lengths(pairs) if isinstance(student, NeuralScorer) else words
    return Plan(lists, config.batch_lists, config.list_size, config.seed, batch_tokens=config.batch_tokens, sizes=sizes)


def planned_steps(lists: Lists, config: FitConfig, plan: Plan | None = None) -> int:
    """Optimizer steps of a training that is not stopped early."""
    chosen = plan or Plan(lists, config.batch_lists, config.list_size, config.seed)
    total = len(chosen.epoch(0)) * config.epochs
    return min(total, config.max_steps) if config.max_steps else total


def main_process() -> bool:
    """Whether this process writes what all of them agree on."""
    return bool(_processes().is_main_process)


def main_process_first() -> AbstractContextManager[None]:
    """The main process runs the block before the others do: it fills a cache, they read it."""
    first: AbstractContextManager[None] = _processes().main_process_first()
    return first


def _processes() -> PartialState:
    """Who runs beside this process; without a GPU accelerate looks for others only when told so."""
    return PartialState(cpu=not torch.cuda.is_available())


class _Loop:
    """One training in progress."""

    def __init__(
        self,
        student: nn.Module,
        plan: Plan,
        loss_of: LossOf,
        config: FitConfig,
        validate: Validate | None,
        run: Run | None,
    ) -> None:
        self.student, self.loss_of, self.config, self.validate, self.run = student, loss_of, config, validate, run
        self.stateful: Stateful | None = loss_of if isinstance(loss_of, Stateful) else None
        self.identity = fingerprint_json(
            [plain(config), plan.lists.fingerprint(), weights_sha256(student), *plan.identity()]
        )
        AcceleratorState._reset_state(reset_partial_state=False)  # precision may differ between two trainings
        parallel = DistributedDataParallelKwargs(find_unused_parameters=True)  # bi-encoders leave their pooler idle
        self.accelerator = Accelerator(
            mixed_precision=config.precision, kwargs_handlers=[parallel], cpu=not torch.cuda.is_available()
        )
        if isinstance(student, NeuralScorer):
            student.recompute = config.gradient_cache
            student.encoding = drops_on(self.accelerator.device)
            if run is not None:
                with self.accelerator.main_process_first():  # one process tokenises, the others open its files
                    student.keep_tokens(plan.lists.pairs(), run.folder / "tokens")
        self.plan = plan
        self.epoch_steps = len(self.plan.epoch(0))
        self.total = planned_steps(plan.lists, config, plan)
        optimizer = torch.optim.AdamW(
            [p for p in student.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the weights instead of ten
        )
        self.model, self.optimizer = self.accelerator.prepare(student, optimizer)
        self.state = _State()
        self.best = _weights(student)

    def train(self, start_counts: bool) -> FitResult:
        with torch.random.fork_rng(devices=None if torch.cuda.is_available() else []), attention_of_any_shape():
            self._resume()
            if self.state.step == 0 and not self.state.history:
                self._validate(counts=start_counts)
            self.model.train(self.config.dropout)
            for step in track(range(self.state.step, self.total), "training"):
                self._step(step)
                if self._patience_over():
                    break
        self.model.eval()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # else it would go on in mixed precision
        if self.validate is not None:
            self.student.load_state_dict(self.best)
        else:
            self.state.best_step = self.state.step
        rate = self.state.pairs / max(self.state.seconds, 1e-9)
        return FitResult(self.state.step, self.state.history, self.state.best_step, self.state.best_value, rate)

    def _step(self, step: int) -> None:
        epoch, position = divmod(step, self.epoch_steps)
        if position == 0 or not hasattr(self, "_batches"):
            self._batches = self.plan.epoch(epoch)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        pieces = self._batches[position]
        own = pieces[rank::world]
        mine = own or pieces[:1]  # a process without a list in a short batch runs one at weight 0
        batch = batch_of(self.plan.lists, [items for _, items in mine], [owner for owner, _ in mine])
        started = time.perf_counter()
        torch.manual_seed(_mix(self.config.seed, step, rank))
        # processes average gradients: weighted by its number of lists, each adds up to the mean over the whole batch
        share = len(own) * world / len(pieces)
        loss, norm = self._update(batch.to(self.accelerator.device), step, share)
        self.state.seconds += time.perf_counter() - started
        self.state.pairs += sum(len(items) for _, items in pieces)
        self.state.step = step + 1
        if step % max(1, self.total // 200) == 0 or step + 1 == self.total:
            self._log(step=step + 1, loss=loss, gradient_norm=norm, learning_rate=self._rate(step))
        every = self.config.validate_every or self.epoch_steps
        if self.validate is not None and ((step + 1) % every == 0 or step + 1 == self.total):
            self._validate()
        if (step + 1) % self.config.checkpoint_every == 0:
            self._save()

    def _update(self, batch: Batch, step: int, share: float) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        with self.accelerator.autocast():
            loss = share * self.loss_of(self.model, batch)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        if not math.isfinite(value):
            raise DataError(
                f"the loss is {value} at step {step + 1}. Lower --learning-rate, or bring the teacher's scores to the "
                "student's scale with --target-transform."
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        increment_version(self.student.parameters())  # the fused step forgets to; caches of vectors look at it
        return value, float(norm)

    def _rate(self, step: int) -> float:
        """Linear warm-up, linear decay; the first step is never at rate 0."""
        rise = max(1, round(self.config.warmup * self.total))
        if step < rise:
            return self.config.learning_rate * (step + 1) / rise
        return self.config.learning_rate * (self.total - step) / max(1, self.total - rise)

    def _validate(self, counts: bool = True) -> None:
        if self.validate is None:
            return
        value = float(self.validate())
        self.model.train(self.config.dropout)
        if counts and (self.state.best_value is None or value > self.state.best_value):
            self.state.best_value, self.state.best_step, self.state.stale = value, self.state.step, 0
            self.best = _weights(self.student)
        elif counts:
            self.state.stale += 1
        self._log(step=self.state.step, valid=value)

    def _patience_over(self) -> bool:
        return 0 < self.config.patience <= self.state.stale

    def _log(self, **values: Any) -> None:
        self.state.history.append(values)
        if self.run is not None and self.accelerator.is_main_process:
            self.run.log(**values)

    @property
    def _checkpoint(self) -> Path | None:
        return None if self.run is None else self.run.folder / "checkpoint" / "state.pt"

    def _save(self) -> None:
        path = self._checkpoint
        if path is None or not self.accelerator.is_main_process:
            return
        content = {
            "identity": self.identity,
            "state": vars(self.state),
            "student": self.student.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "loss": {} if self.stateful is None else self.stateful.state_dict(),
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    def _resume(self) -> None:
        path = self._checkpoint
        if path is None or self.run is None:
            return
        if not path.is_file():  # an interrupted run may have left lines, but nothing to continue from
            if self.accelerator.is_main_process:
                (self.run.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        content = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if content["identity"] != self.identity:
            raise UsageError(
                f"{path.parent.parent}: holds the checkpoint of another training (other settings, data or starting "
                "weights). Give another --out, or remove that folder."
            )
        self.student.load_state_dict(content["student"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state, self.best = _State(**content["state"]), content["best"]
        if self.stateful is not None:
            self.stateful.load_state_dict(content["loss"])
        if self.accelerator.is_main_process:  # drop the lines after the checkpoint
            lines = "".join(_json_line(row) for row in self.state.history)
            write_text(self.run.folder / "metrics.jsonl", lines)
            note(f"continuing {self.run.folder} at step {self.state.step} of {self.total}")


def clear_checkpoint(run: Run) -> None:
    """Remove the training state and the token ids of a finished run."""
    for name in ("checkpoint", "tokens"):  # with what a run that was killed left half written in them
        shutil.rmtree(run.folder / name, ignore_errors=True)


def kept_result(path: Path, identity: str, what: str) -> dict[str, Any] | None:
    """What a finished run with the same inputs left in `path`; None when nothing is finished there.

    Raises:
        UsageError: it is of another identity; `what` says what that run was, and what may differ.
    """
    if not path.is_file():
        return None
    kept: dict[str, Any] = read_json(path)
    if kept["identity"] != identity:
        raise UsageError(f"{path.parent}: holds a finished {what}. Give another --out, or remove that folder.")
    note(f"{path.parent}: finished already with the same inputs; nothing to do")
    return kept


def scored_grid(model: nn.Module, batch: Batch) -> Float[Tensor, "lists items"]:
    """The student's scores of a batch, [lists, items], float32."""
    scores: Tensor = model(batch.pairs)
    return batch.grid(scores.float())


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(plain(row)) + "\n"


def _check(config: FitConfig, lists: Lists) -> None:
    if len(lists) == 0:
        raise UsageError("there is no list to train on: no query has both candidates and targets.")
    for name in ("epochs", "batch_lists", "list_size", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, found {getattr(config, name)}.")
    if config.list_size < 2:
        raise UsageError("list_size must be at least 2: every objective compares documents.")
    for name in ("max_steps", "batch_tokens", "validate_every", "patience", "weight_decay"):
        if getattr(config, name) < 0:
            raise UsageError(f"{name} must not be negative, found {getattr(config, name)}.")
    if not 0 <= config.warmup < 1 or config.learning_rate <= 0 or config.clip <= 0:
        raise UsageError(
            f"expected 0 <= warmup < 1, learning_rate > 0 and clip > 0; found {config.warmup}, "
            f"{config.learning_rate}, {config.clip}."
        )
