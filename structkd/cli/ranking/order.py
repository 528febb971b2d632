"""`structkd ranking order`: raw listwise answers of a language model -> an order that teaches."""

from pathlib import Path

import numpy as np

from structkd.cli.output import Common, Output
from structkd.ranking.data.answers import read_answers, replay
from structkd.trec import Run, read_run, write_run


def order_command(
    *,
    answers: Path,
    candidates: Path,
    out: Path,
    window: int = 20,
    step: int = 10,
    depth: int = 100,
    common: Common = Common(),
) -> Output:
    """Turn a language model's listwise answers into a run; only its order counts: train on it with --teacher order:RUN.

    Args:
        answers: JSON list of answers such as "[2] > [1] > [3]": query after query, windows from the bottom up.
        candidates: Run that the model was asked about; only its order counts.
        out: Run file to write, scores minus the rank.
        window: Candidates in an answer.
        step: Candidates between the starts of two windows.
        depth: Candidates of each query.
    """
    found = replay(read_run(candidates, by_rank=True), read_answers(answers), window=window, step=step, depth=depth)
    run = Run({query: (own, -np.arange(1.0, len(own) + 1)) for query, (own, _) in found.run.lists.items()})
    write_run(out, run, tag=answers.stem)
    value = {"run": str(out), "queries": len(run.lists), "answers": found.windows, "permutations": found.exact}
    line = f"{found.exact} of {found.windows} answers are permutations; the others were completed in the old order"
    return Output(value, lines=[f"{len(run.lists)} lists: {out}", line])
