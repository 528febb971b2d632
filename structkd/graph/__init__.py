"""Graph half: node classifiers, from GNN teachers to MLP students."""

from structkd.graph.bench import BenchConfig, bench
from structkd.graph.data.datasets import DatasetConfig, load
from structkd.graph.data.task import GraphTask
from structkd.graph.distillation import METHODS, DistillConfig, DistillResult, distill
from structkd.graph.link_prediction.bench import LinkBenchConfig, bench_links
from structkd.graph.link_prediction.distillation import LinkConfig, LinkResult, links
from structkd.graph.models.teacher import Teacher, TeacherConfig, read_scores, score_nodes, teacher_spec, train_teacher
from structkd.graph.policies.flags import Policies
from structkd.graph.serving.latency import Latency, latency
from structkd.graph.spectrum import Spectrum, spectrum
from structkd.graph.storage import evaluate_saved
from structkd.graph.targets.fusing import fuse

__all__ = [
    "METHODS",
    "BenchConfig",
    "DatasetConfig",
    "DistillConfig",
    "DistillResult",
    "GraphTask",
    "Latency",
    "LinkBenchConfig",
    "LinkConfig",
    "LinkResult",
    "Policies",
    "Spectrum",
    "Teacher",
    "TeacherConfig",
    "bench",
    "bench_links",
    "distill",
    "evaluate_saved",
    "fuse",
    "latency",
    "links",
    "load",
    "read_scores",
    "score_nodes",
    "spectrum",
    "teacher_spec",
    "train_teacher",
]
