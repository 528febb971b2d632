"""What the tests of several processes and of a killed process run as programs of their own.

python processes.py kill FOLDER TINY     train into FOLDER and die by SIGKILL inside the fifth step
torchrun processes.py average OUT TINY   one step; each rank writes what it saw, rank 0 the averaged gradients
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from structkd.ids import Ids, Texts
from structkd.objectives import margin_mse
from structkd.ranking.models.encoders import BiScorer
from structkd.ranking.training.train import Batch, FitConfig, FitResult, Lists, fit, lists_of, scored_grid
from structkd.runs import Run

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
KILL = FitConfig(epochs=3, batch_lists=2, list_size=4, learning_rate=1e-3, checkpoint_every=2, seed=5)
AVERAGE = FitConfig(epochs=1, batch_lists=5, list_size=4, learning_rate=1e-3, max_steps=1, seed=5)
"Five lists over two processes: three and two."


def lists() -> Lists:
    generator = np.random.default_rng(0)
    queries = [" ".join(generator.choice(WORDS, 3)) for _ in range(10)]
    documents = [" ".join(generator.choice(WORDS, generator.integers(2, 20))) for _ in range(40)]
    rows = [(query, generator.permutation(40)[:4].astype(np.int64)) for query in range(10)]
    targets = generator.normal(size=40).astype(np.float32)
    tables = [Texts(Ids(f"{name}{i}" for i in range(len(t))), t) for name, t in (("q", queries), ("d", documents))]
    return lists_of(tables[0], tables[1], rows, targets)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return margin_mse(scored_grid(model, batch), batch.targets, mask=batch.mask, pairs="all")


def train_until(folder: Path, tiny: str, kill_in: int = 0) -> tuple[FitResult, BiScorer]:
    """Train with dropout, validation and checkpoints; in step `kill_in` the process ends without a word."""
    student, calls = BiScorer(tiny), 0

    def deadly(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_of(model, batch)

    def validate() -> float:
        return -float(student.score(lists().pairs()).var())

    return fit(student, lists(), deadly, KILL, validate=validate, run=Run.create(folder, "test")), student


def step(tiny: str) -> tuple[list[int], dict[str, Tensor]]:
    """One step without dropout: the queries that this process saw, and the gradients."""
    student, seen = BiScorer(tiny), []
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    student.model[0].auto_model.config.attention_probs_dropout_prob = 0.0

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        seen.extend(batch.pairs.query_rows.tolist())
        return loss_of(model, batch)

    fit(student, lists(), watched, AVERAGE)
    return sorted(set(seen)), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def main() -> None:
    what, out, tiny = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if what == "kill":
        train_until(out, tiny, kill_in=5)
    seen, gradients = step(tiny)
    rank = os.environ.get("RANK", "0")
    (out / f"seen-{rank}.json").write_text(json.dumps(seen))
    if rank == "0":
        torch.save(gradients, out / "gradients.pt")


if __name__ == "__main__":
    main()
