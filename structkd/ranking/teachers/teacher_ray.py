"""A production on Ray: an actor pool takes the units of the one plan, each actor commits as any worker does."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.data

from structkd.ids import Pairs
from structkd.scores.cache import Scorer
from structkd.scores.produce import UNIT_ROWS, Cost, Production


class _Worker:
    """One actor: a scorer of its own and the shared plan."""

    def __init__(self, open_scorer: Callable[[], Scorer], pairs: Any, folder: str, unit_rows: int) -> None:
        self.scorer = open_scorer()
        self.job = Production(self.scorer, ray.get(pairs), folder, unit_rows=unit_rows)
        self.units = {unit.name: unit for unit in self.job.plan}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Score and commit the units named."""
        out: dict[str, list[Any]] = {"units": [], "asked": [], "seconds": []}
        for name in batch["unit"]:
            before = self.job.cost.seconds
            committed = self.job.score(self.scorer, self.units[str(name)])
            out["units"].append(int(committed))
            out["asked"].append(len(self.units[str(name)]))
            out["seconds"].append(self.job.cost.seconds - before)
        return out


def produce_with_ray(
    open_scorer: Callable[[], Scorer],
    pairs: Pairs,
    folder: str | Path,
    *,
    workers: int = 2,
    gpus_per_worker: float = 0.0,
    unit_rows: int = UNIT_ROWS,
) -> Cost:
    """`scores.produce.produce` by a pool of Ray actors, here or on a cluster that shares the folder.

    Args:
        open_scorer: makes the teacher, once in each actor and once here for the plan.
        pairs: what to score.
        folder: of the store, seen by every machine.
        workers: actors.
        gpus_per_worker: GPUs that each actor holds.
        unit_rows: pairs of a unit.

    Returns:
        The cost of all actors together.
    """
    job = Production(open_scorer(), pairs, folder, unit_rows=unit_rows)
    pending = job.pending()
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if pending:
            shared = ray.put(pairs)
            data = ray.data.from_items([{"unit": unit.name} for unit in pending], override_num_blocks=len(pending))
            done = data.map_batches(
                _Worker,
                fn_constructor_args=(open_scorer, shared, str(Path(folder).resolve()), unit_rows),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(pending))),
                num_cpus=1,
                num_gpus=gpus_per_worker,
            )
            for row in done.take_all():
                job.cost.units += int(row["units"])
                job.cost.asked += int(row["asked"])
                job.cost.seconds += float(row["seconds"])
    finally:
        if started:
            ray.shutdown()
    job.finish()
    return job.cost
