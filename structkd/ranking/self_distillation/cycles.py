"""Trans-Encoder: bi- and cross-encoders that teach each other without labels (Liu et al. 2022, arXiv 2109.13059).

<out>/cycle-2/labels-bi-1/     what the first model's bi-encoder said of every pair: a score store like any teacher's
<out>/cycle-2/whitening-1.npz  what its vectors are whitened with (.json: whether they are)
<out>/cycle-2/cross-1/model/   the cross-encoder trained on it
<out>/cycle-2/labels-cross-1/  what that said, in both orders when pairs are symmetric
<out>/cycle-2/bi-1/model/      the bi-encoder trained on it
<out>/pool/                    the texts behind the ids of the stores (queries.jsonl, corpus.jsonl)
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from structkd.errors import UsageError
from structkd.files import atomic_path, read_json, write_json, write_text
from structkd.ids import Pairs, Texts, fingerprint_json
from structkd.objectives.pairwise import margin_mse
from structkd.progress import note
from structkd.ranking.data.pair_pool import GoldPairs, PairPool, overlap, swapped
from structkd.ranking.data.tokens import token_embedding
from structkd.ranking.evaluation.selection import JUDGES, PhaseRow, Select, best_row, spearman, split_pool
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.scorer import NeuralScorer, saved_as, weights_sha256
from structkd.ranking.self_distillation.isotropy import (
    ANISOTROPIC,
    LabelSpace,
    WhitenedScorer,
    Whitening,
    mean_cosine,
    sentence_vectors,
)
from structkd.ranking.self_distillation.pseudo_labels import (
    Calibration,
    FloatArray,
    SentenceScorer,
    TargetMap,
    averaged,
    blended,
    calibrated,
    fit_head,
    head_of,
    logit_targets,
    orders,
    unit_targets,
)
from structkd.ranking.training.train import Batch, FitConfig, Lists, LossOf, clear_checkpoint, fit, scored_grid
from structkd.report import finish
from structkd.runs import Figure, Run, Series, plain
from structkd.scores.cache import CachedScorer, Scorer
from structkd.scores.provenance import keep_teachers, teacher_rows

_PROBED = 1000  # pairs that a fresh head is fitted to
_CROSS_STEPS, _BI_STEPS = 600, 300  # a cross-encoder's head is new, a bi-encoder moves a little
_MOST_PASSES = 5  # of a small pool more would be learned by heart, and labels would only come back


@dataclass(frozen=True)
class SelfDistillConfig:
    """How many cycles, and how each phase trains."""

    cycles: int = 3
    "Cycles of cross-encoder and bi-encoder."

    asymmetric: bool = False
    "Query-passage pairs: one order, each side with its own prompt. Else sentence pairs: both orders, averaged."

    label_space: LabelSpace = "auto"
    """What a bi-encoder's labels are: its similarities (raw), or cosines of its softly whitened vectors. auto whitens
    the vectors of sentence pairs whose mean cosine shows a common direction."""

    target_map: TargetMap = "clamp"
    """Cosines to targets in [0, 1]: max(0, s), (s + 1) / 2, or a straight line from the first to the last percentile
    (the only one for scores without bounds)."""

    calibration: Calibration = "moments"
    "The cross-encoder's labels on the bi-encoder's own scale (mean and deviation of its scores), or as they are."

    cross_epochs: int = 0
    """Passes of the cross-encoder over the pairs (each in both orders when symmetric); 0: one to five, so that they
    make some 600 steps."""

    cross_batch: int = 32
    "Pairs in a step of the cross-encoder."

    cross_learning_rate: float = 5e-5
    "Peak learning rate of the cross-encoder."

    cross_loss: Literal["bce", "mse"] = "bce"
    "Soft binary cross-entropy of the logit (the paper's), or squared error of its sigmoid."

    cross_from: Literal["init", "last"] = "init"
    "Where a later cycle's cross-encoder starts: as the first did (--cross-init, else the current bi-encoder), or on."

    head: Literal["fit", "fresh"] = "fit"
    "A new head is fitted to the labels in closed form before training, or starts as noise."

    bi_epochs: int = 0
    "Passes of the bi-encoder over the pairs; 0: one to five, so that they make some 300 steps."

    bi_batch: int = 32
    "Pairs in a step of the bi-encoder."

    bi_learning_rate: float = 5e-5
    "Peak learning rate of the bi-encoder."

    bi_labels: Literal["both", "cross"] = "both"
    """What a bi-encoder learns: the mean of the bi-encoders' and the cross-encoders' labels, the latter weighted by
    how well they agree with the former on held-out pairs, or the cross-encoders' labels alone (the paper's)."""

    bi_loss: Literal["mse", "margin"] = "mse"
    "Squared error of the similarity (the paper's), or of its differences within a batch."

    bi_from: Literal["init", "last"] = "last"
    "Where a later cycle's bi-encoder starts: from --init again, or on."

    freeze: Literal["embeddings", "none"] = "embeddings"
    "Weights that stay: the table of word vectors, or none."

    warmup: float = 0.1
    "Share of the steps with rising learning rate; it falls linearly after."

    weight_decay: float = 0.01
    "Decoupled weight decay."

    held_out: float = 0.05
    "Share of the pairs (queries, when asymmetric) that choose models instead of being trained on."

    select: Select = "agreement"
    """Without gold labels: rank correlation with the pseudo-labels of held-out pairs, or the loss on them."""

    max_length: int | None = None
    "Tokens of a text, in training, labelling, evaluation and the saved model alike; the model's own by default."

    max_pair_length: int | None = None
    "The same for a cross-encoder's pair."

    precision: Literal["no", "fp16", "bf16"] = "no"
    "Mixed precision of the training passes."

    seed: int = 0
    "Order of the pairs, held-out pairs, new heads and dropout."


@dataclass(frozen=True)
class SelfDistillResult:
    """What the cycles gave.

    Attributes:
        rows: one per trained model, in order.
        best: folder of the chosen bi- and cross-encoder.
        start: gold rank correlation of each starting bi-encoder; empty without gold pairs.
        selection: what `dev` is.
        pool: counts of the pairs; gold_in_pool when gold pairs were given.
        asked: pairs that models scored; `found` came from the stores.
    """

    rows: list[PhaseRow]
    best: dict[str, str]
    start: list[float]
    selection: str
    pool: dict[str, int]
    asked: int
    found: int
    run: Path


def self_distill(
    pool: PairPool,
    inits: Sequence[str | Path],
    config: SelfDistillConfig = SelfDistillConfig(),
    *,
    out: str | Path,
    cross_inits: Sequence[str | Path] = (),
    gold: GoldPairs | None = None,
) -> SelfDistillResult:
    """Let bi-encoders and cross-encoders label a pool of pairs for each other, `cycles` times.

    Algorithm 1 of the paper with four changes: targets lie in [0, 1]; symmetric pairs are labelled in both orders as
    they are trained; one truncation throughout; every model has its own pooling and width. Several starting models
    teach mutually: all label, the average trains each. All labels pass through score stores below `out`; a run that
    was killed continues in the phase, and at the step, where it stopped.

    Args:
        pool: the pairs.
        inits: folder or hub id of each starting bi-encoder.
        config: settings.
        out: run folder.
        cross_inits: one body for all cross-encoders, or one per starting model; the current bi-encoder by default.
        gold: chooses the weights and models instead of held-out pseudo-labels.

    Raises:
        UsageError: a setting out of range, a start that is no bi-encoder, `out` holds another run.
        DataError: labels collapsed to one value.
    """
    _check(pool, inits, cross_inits, config)
    return _Cycles(pool, [str(init) for init in inits], config, Path(out), [str(c) for c in cross_inits], gold).run()


class _Cycles:
    """One run in progress."""

    def __init__(
        self,
        pool: PairPool,
        inits: list[str],
        config: SelfDistillConfig,
        out: Path,
        cross_inits: list[str],
        gold: GoldPairs | None,
    ) -> None:
        self.pool, self.inits, self.config, self.out, self.gold = pool, inits, config, out, gold
        self.cross_inits = cross_inits * len(inits) if len(cross_inits) == 1 else cross_inits
        self.train, self.held = split_pool(pool, config.held_out, config.seed)
        self.rows: list[PhaseRow] = []
        self.teachers: list[dict[str, Any]] = []
        self.asked = self.found = 0
        self.bis = [self._open_bi(init) for init in inits]
        for bi in self.bis:
            if config.label_space == "whitened" and not bi.bounded:
                raise UsageError(
                    f"{bi.name}: whitened labels are cosines, its scores have no bounds; use --label-space raw."
                )
        self._claim()

    def run(self) -> SelfDistillResult:
        """All cycles, then the choice."""
        folder = Run.create(self.out, "ranking self-distill", self.config, self.config.seed)
        write_texts(self.out / "pool", self.pool.pairs)
        start = (
            [] if self.gold is None else [spearman(self._own(bi, self.gold.pairs), self.gold.scores) for bi in self.bis]
        )
        first = self._bi_scores(1, self.bis)
        crosses: list[CrossScorer] = []
        for cycle in range(1, self.config.cycles + 1):
            raw = first if cycle == 1 else self._bi_scores(cycle, self.bis)
            how = self.config.target_map
            targets = averaged([unit_targets(one, how, bi.bounded) for one, bi in zip(raw, self.bis, strict=True)])
            crosses = [self._cross(cycle, member, targets) for member in range(len(self.bis))]
            heard = averaged([self._cross_labels(cycle, member, cross) for member, cross in enumerate(crosses)])
            labels = heard
            if self.config.bi_labels == "both":
                agreement = spearman(heard[self.held], targets[self.held])
                note(f"cycle {cycle}: cross-encoders' labels agree {agreement:.2f} with bi-encoders' and weigh as much")
                labels = blended(targets, heard, agreement)
            own = first if self.config.bi_from == "init" else raw
            self.bis = [self._bi(cycle, member, labels, heard, own[member]) for member in range(len(self.bis))]
        result = self._result(start)
        keep_teachers(folder, self.teachers)
        _write(folder, result)
        return result

    def _bi_scores(self, cycle: int, bis: Sequence[BiScorer]) -> list[FloatArray]:
        """Raw scores of all pairs by each bi-encoder; of sentence pairs one order says both."""
        return [
            self._cached(self._labeller(cycle, member, bi), f"cycle-{cycle}/labels-bi-{member}", False)[0]
            for member, bi in enumerate(bis, start=1)
        ]

    def _labeller(self, cycle: int, member: int, bi: BiScorer) -> Scorer:
        """The bi-encoder as it labels. What was fitted is kept: a run that goes on encodes nothing again."""
        choice = self.config.label_space
        if choice == "raw" or not isinstance(bi, SentenceScorer) or not bi.bounded:
            return bi
        path = self.out / f"cycle-{cycle}/whitening-{member}.npz"
        decided = path.with_suffix(".json")
        if not decided.is_file():
            vectors = sentence_vectors(bi, self.pool.pairs)
            common = mean_cosine(vectors)
            whitened = choice == "whitened" or common > ANISOTROPIC
            note(f"cycle {cycle}: bi {member}: mean cosine {common:.2f}, {'whitened' if whitened else 'raw'} labels")
            Whitening.fit(vectors).save(path)
            write_json(decided, {"mean_cosine": common, "whitened": whitened})
        return WhitenedScorer(bi, Whitening.load(path)) if read_json(decided)["whitened"] else bi

    def _cross_labels(self, cycle: int, member: int, cross: CrossScorer) -> FloatArray:
        name = f"cycle-{cycle}/labels-cross-{member + 1}"
        return logit_targets(self._cached(cross, name, self.pool.symmetric))

    def _cached(self, scorer: Scorer, name: str, both: bool) -> list[FloatArray]:
        cached = CachedScorer(scorer, self.out / name)
        scores = orders(cached, self.pool.pairs, both)
        self.asked, self.found = self.asked + cached.asked, self.found + cached.found
        self.teachers += teacher_rows(cached)
        return scores

    def _cross(self, cycle: int, member: int, targets: FloatArray) -> CrossScorer:
        """The cycle's cross-encoder, trained on the bi-encoders' targets."""
        config, phase = self.config, f"cycle-{cycle}/cross-{member + 1}"
        source = self._cross_source(cycle, member)
        scorer = CrossScorer(source, max_length=config.max_pair_length, seed=self._seed(cycle, member, 0))
        if config.head == "fit" and saved_as(source) != "CrossEncoder" and not self._done(phase):
            self._fit_head(scorer, self.out / phase / "head.pt", targets)
        own = self.pool.pairs.take(self.train)
        pairs = [own, swapped(own)] if self.pool.symmetric else [own]
        lists = pair_lists(pairs, targets[self.train])
        epochs = config.cross_epochs or passes(len(lists), config.cross_batch, _CROSS_STEPS)
        settings = self._fit(cycle, member, 0, epochs, config.cross_batch, config.cross_learning_rate)
        folder = self._phase(phase, cycle, member, scorer, lists, settings, cross_loss(config.cross_loss), targets)
        return CrossScorer(folder, max_length=config.max_pair_length)

    def _fit_head(self, scorer: CrossScorer, path: Path, targets: FloatArray) -> None:
        """Fit a new head. It is kept: fitted again with other threads it would differ in the last bit, and a checkpoint
        belongs to the weights that training started from."""
        if not path.is_file():
            some = self.train[:_PROBED]
            fit_head(scorer, self.pool.pairs.take(some), targets[some])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                torch.save(head_of(scorer).state_dict(), temporary)
        head_of(scorer).load_state_dict(torch.load(path, weights_only=True))

    def _cross_source(self, cycle: int, member: int) -> str:
        if cycle > 1 and self.config.cross_from == "last":
            return str(self.out / f"cycle-{cycle - 1}/cross-{member + 1}/model")
        if self.cross_inits:
            return self.cross_inits[member]
        return self.inits[member] if cycle == 1 else str(self.out / f"cycle-{cycle - 1}/bi-{member + 1}/model")

    def _bi(self, cycle: int, member: int, labels: FloatArray, heard: FloatArray, own: FloatArray) -> BiScorer:
        """The cycle's bi-encoder, trained on `labels` and judged by what the cross-encoders say (`heard`).

        Its own answers are a part of `labels`: judged by these, it would agree best where it has not moved at all.
        """
        config, phase = self.config, f"cycle-{cycle}/bi-{member + 1}"
        scorer = self._open_bi(self.inits[member]) if config.bi_from == "init" else self.bis[member]
        targets = calibrated(labels, own, config.calibration)
        lists = pair_lists([self.pool.pairs.take(self.train)], targets[self.train])
        epochs = config.bi_epochs or passes(len(lists), config.bi_batch, _BI_STEPS)
        settings = self._fit(cycle, member, 1, epochs, config.bi_batch, config.bi_learning_rate)
        judged = calibrated(heard, own, config.calibration)
        folder = self._phase(phase, cycle, member, scorer, lists, settings, bi_loss(config.bi_loss), judged)
        return self._open_bi(folder)

    def _phase(
        self,
        phase: str,
        cycle: int,
        member: int,
        scorer: NeuralScorer,
        lists: Lists,
        settings: FitConfig,
        loss_of: LossOf,
        targets: FloatArray,
    ) -> str:
        """Train one model, or find it trained; returns the folder it was saved to."""
        folder = self.out / phase
        started, kind = time.perf_counter(), phase.rpartition("/")[2].partition("-")[0]
        if self._done(phase):
            self.rows.append(PhaseRow(**{**read_json(folder / "phase.json"), "seconds": 0.0}))
            note(f"{folder}: trained already")
            return str(folder / "model")
        frozen = token_embedding(scorer) if self.config.freeze == "embeddings" else None
        if frozen is not None:
            frozen.weight.requires_grad_(False)
        run = Run.create(folder, f"ranking self-distill {kind}", settings, settings.seed)
        # a model agrees well with labels that it had a part in before it has learnt them: only gold can tell it to stay
        stays, judge = self.gold is not None, partial(self._judge, scorer, targets)
        result = fit(scorer, lists, loss_of, settings, validate=judge, run=run, start_counts=stays)
        scorer.save(folder / "model")
        clear_checkpoint(run)
        run.finish({"dev": result.best_value, "steps": result.steps})
        row = PhaseRow(
            cycle,
            kind,
            member + 1,
            float(result.best_value or 0.0),
            str(folder / "model"),
            result.steps,
            round(result.pairs_per_second, 2),
            round(time.perf_counter() - started, 1),
        )
        write_json(folder / "phase.json", plain(row))
        self.rows.append(row)
        note(f"cycle {cycle}: {kind} {member + 1}: {self._selection()} {row.dev:.4f} ({row.seconds:.0f} s)")
        return row.folder

    def _judge(self, scorer: NeuralScorer, targets: FloatArray) -> float:
        """What selection sees of a model in training, higher is better."""
        if self.gold is not None:
            return spearman(self._own(scorer, self.gold.pairs), self.gold.scores)
        return JUDGES[self.config.select](self._own(scorer, self.pool.pairs.take(self.held)), targets[self.held])

    def _own(self, scorer: NeuralScorer, pairs: Pairs) -> FloatArray:
        """A model's scores as it labels with them: similarities, or mean sigmoids over the orders."""
        cross = isinstance(scorer, CrossScorer)
        scores = orders(scorer, pairs, cross and self.pool.symmetric)
        return logit_targets(scores) if cross else scores[0]

    def _open_bi(self, source: str) -> BiScorer:
        if saved_as(source) == "CrossEncoder":
            raise UsageError(
                f"{source}: holds a cross-encoder; a cycle starts from a bi-encoder (--cross-init takes it)."
            )
        scorer = SentenceScorer(source) if self.pool.symmetric else BiScorer(source)
        if self.config.max_length is not None:
            scorer.model.max_seq_length = self.config.max_length
        return scorer

    def _fit(self, cycle: int, member: int, phase: int, epochs: int, batch: int, rate: float) -> FitConfig:
        return FitConfig(
            epochs=epochs,
            batch_lists=batch,
            learning_rate=rate,
            weight_decay=self.config.weight_decay,
            warmup=self.config.warmup,
            checkpoint_every=25,
            precision=self.config.precision,
            seed=self._seed(cycle, member, phase),
        )

    def _seed(self, cycle: int, member: int, phase: int) -> int:
        """Another order and dropout in every phase of every run."""
        return ((self.config.seed * 1000 + cycle) * 10 + member) * 2 + phase

    def _done(self, phase: str) -> bool:
        return (self.out / phase / "phase.json").is_file()

    def _selection(self) -> str:
        return "gold Spearman" if self.gold is not None else f"held-out {self.config.select}"

    def _claim(self) -> None:
        """Refuse a folder that holds another run."""
        gold = None if self.gold is None else self.gold.scores.tolist()
        sources = [weights_sha256(CrossScorer(source)) for source in dict.fromkeys(self.cross_inits)]
        texts = [self.pool.pairs.query_texts, self.pool.pairs.document_texts]
        identity = fingerprint_json([plain(self.config), [weights_sha256(bi) for bi in self.bis], sources, texts, gold])
        path = self.out / "self-distill.json"
        if path.is_file() and read_json(path)["identity"] != identity:
            raise UsageError(
                f"{self.out}: holds a run with other settings, pairs or starting weights. Give another --out, or "
                "remove that folder."
            )
        write_json(path, {"identity": identity, "init": self.inits, "cross_init": self.cross_inits})

    def _result(self, start: list[float]) -> SelfDistillResult:
        counts = {"pairs": len(self.pool), "held_out": len(self.held), **self.pool.counts}
        if self.gold is not None:
            counts["gold_in_pool"] = overlap(self.pool, self.gold)
            if counts["gold_in_pool"]:
                note(
                    f"transductive: {counts['gold_in_pool']} of {len(self.gold.pairs)} pairs of {self.gold.source} are "
                    "in the pool, trained on without their labels; --exclude keeps them out"
                )
            note(f"gold labels of {self.gold.source} chose the weights and models")
        shown = self.rows if self.gold is not None else [row for row in self.rows if row.cycle == self.config.cycles]
        best = {phase: best_row(shown, phase).folder for phase in ("bi", "cross")}
        return SelfDistillResult(self.rows, best, start, self._selection(), counts, self.asked, self.found, self.out)


def pair_lists(parts: Sequence[Pairs], targets: FloatArray) -> Lists:
    """Every pair a list of one document, the parts one after the other, each with these targets."""
    pairs = parts[0]
    query_rows = np.concatenate([part.query_rows for part in parts])
    document_rows = np.concatenate([part.document_rows for part in parts])
    tiled = np.tile(targets, len(parts)).astype(np.float32)
    return Lists(pairs.queries, pairs.documents, query_rows, np.arange(len(tiled) + 1), document_rows, tiled)


def passes(lists: int, batch: int, steps: int) -> int:
    """Epochs that come nearest to this many steps, one to five."""
    return min(_MOST_PASSES, max(1, round(steps * batch / lists)))


def cross_loss(name: str) -> LossOf:
    """Mean over the batch of BCE(sigmoid(logit), target), or of (sigmoid(logit) - target)^2."""

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = scored_grid(model, batch)[:, 0], batch.targets[:, 0]
        if name == "mse":
            return mse_loss(logits.sigmoid(), targets)
        return binary_cross_entropy_with_logits(logits, targets)

    return loss_of


def bi_loss(name: str) -> LossOf:
    """Mean over the batch of (s - t)^2, or of the same with both centred over the batch (all margins of it)."""

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        scores, targets = scored_grid(model, batch)[:, 0], batch.targets[:, 0]
        if name == "mse":
            return mse_loss(scores, targets)
        value: Tensor = margin_mse(scores[None], targets[None], pairs="centred")
        return value

    return loss_of


def write_texts(folder: Path, pairs: Pairs) -> None:
    """The texts behind the ids, as a collection without judgements (BEIR layout)."""
    for name, table in (("queries.jsonl", pairs.queries), ("corpus.jsonl", pairs.documents)):
        write_text(folder / name, "".join(_line(table, row) for row in range(len(table))))


def _line(table: Texts, row: int) -> str:
    return json.dumps({"_id": table.ids[row], "text": table.texts[row]}, ensure_ascii=False) + "\n"


def _write(run: Run, result: SelfDistillResult) -> None:
    """Table, curve and summary of a finished run."""
    run.write_table("phases", f"Phases ({result.selection})", [asdict(row) for row in result.rows])
    series = []
    for phase in ("cross", "bi"):
        for model in sorted({row.model for row in result.rows}):
            own = [row for row in result.rows if (row.phase, row.model) == (phase, model)]
            series.append(Series(f"{phase} {model}", [row.cycle for row in own], [row.dev for row in own]))
    run.write_figure("cycles", Figure("lines", "Cycles", "cycle", result.selection, series))
    finish(run, {"best": result.best, "selection": result.selection, "pool": result.pool})


def _check(
    pool: PairPool, inits: Sequence[str | Path], cross_inits: Sequence[str | Path], config: SelfDistillConfig
) -> None:
    if not inits or len(cross_inits) not in (0, 1, len(inits)):
        raise UsageError(
            f"found {len(inits)} starting models and {len(cross_inits)} bodies of cross-encoders; give --init once or "
            "more, and --cross-init never, once, or as often as --init."
        )
    if config.cycles < 1 or not 0 < config.held_out < 1:
        raise UsageError(f"expected cycles >= 1 and 0 < held_out < 1; found {config.cycles}, {config.held_out}.")
    if config.label_space == "whitened" and config.asymmetric:
        raise UsageError("whitened labels are for sentence pairs; with query-passage pairs use --label-space raw.")
    if pool.symmetric == config.asymmetric:
        raise UsageError("the pool and --asymmetric disagree: query-passage pairs need it, sentence pairs forbid it.")
