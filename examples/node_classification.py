"""Serve a node classifier without the graph: a GCN teaches an MLP that reads one row of features.

Run it as it is (digits as a nearest-neighbour graph, embedded), or name a dataset:

    python examples/node_classification.py
    python examples/node_classification.py planetoid:Cora --root data
"""

import argparse
import tempfile

import torch

from structkd import graph
from structkd.graph.distillation import rows_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("--root")
    arguments = parser.parse_args()

    task = graph.load(arguments.dataset, root=arguments.root, seed=0)
    teacher = graph.train_teacher(task, graph.TeacherConfig(model="gcn"))
    with tempfile.TemporaryDirectory() as store:  # a real project keeps this folder: the teacher is asked once
        logits = graph.score_nodes(teacher, task, store=store)
        result = graph.distill(task, logits, graph.DistillConfig(method="ff-g2m"))

    print(f"teacher {teacher.metrics['test']:.4f}  student {result.metrics['test']:.4f}  (test at best validation)")
    with torch.no_grad():
        result.student.eval()
        print("one node, no neighbours:", result.student(rows_of(task.x, torch.tensor([7]))).softmax(1)[0])


if __name__ == "__main__":
    main()
