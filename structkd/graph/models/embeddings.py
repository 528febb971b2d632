"""What a teacher's last layer reads: node embeddings for objectives and targets that logits cannot serve."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.graph.data.task import GraphTask
from structkd.graph.models.networks import Gcn, Sage
from structkd.graph.models.teacher import Teacher

Embeddings = Float[Tensor, "nodes dims"]


def embeds(teacher: Teacher) -> bool:
    """Whether `embed_nodes` knows this kind of teacher."""
    return isinstance(teacher.model, Gcn | Sage) and len(teacher.model.layers) > 1


@torch.no_grad()
def embed_nodes(teacher: Teacher, task: GraphTask) -> Embeddings:
    """h of every node of a task, where the teacher's logits are h W + b; eval mode.

    Raises:
        UsageError: not a GCN or SAGE of two layers or more.
    """
    model = teacher.model
    if not isinstance(model, Gcn | Sage) or not embeds(teacher):
        kind = teacher.config.model
        raise UsageError(f"embeddings are read from gcn and sage teachers of 2 layers or more, not {kind}.")
    short = copy.copy(model)
    short._modules = {**model._modules, "layers": nn.ModuleList(list(model.layers)[:-1])}
    short.eval()
    graph = model.prepare(task)
    return graph.product(torch.relu(short(task.x, graph)))
