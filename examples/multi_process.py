"""Two processes train one student on accelerate; without a GPU they talk over gloo.

    accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no examples/multi_process.py --out OUT
    torchrun --nproc-per-node 2 examples/multi_process.py --out OUT

`structkd ranking distill` is started the same way: put `-m structkd ranking distill ...` in place of the script.
Each process sees its share of every batch and gradients are averaged, so the result is that of one process.
"""

import argparse
from pathlib import Path

from structkd import ranking
from structkd.ranking.teachers.sources import open_teacher
from structkd.ranking.training.train import main_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=64)
    arguments = parser.parse_args()

    collection = ranking.load("pydocs", "train")
    collection = collection.with_queries(list(collection.queries.ids)[: arguments.queries])
    student = ranking.student("static", documents=collection.documents)
    teacher = open_teacher("bm25", collection.documents)
    config = ranking.DistillConfig(objective="kl", epochs=1, batch_lists=8, depth=8)
    result = ranking.distill(student, teacher, collection, config, out=arguments.out)
    if main_process():
        print(f"{result.metrics['steps']} steps, student in {arguments.out / 'student'}")


if __name__ == "__main__":
    main()
