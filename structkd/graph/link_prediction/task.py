"""Link prediction as a problem: edges split three ways, non-edges drawn, and the only graph that training may see."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from structkd.errors import DataError, UsageError
from structkd.graph.data.task import GraphTask, clean_edges

Pairs = Int[Tensor, "2 _"]
HITS = (10, 20, 50)


@dataclass(frozen=True, eq=False)
class LinkTask:
    """Edges to learn from, to choose by and to report on.

    Attributes:
        seen: the task with the training edges alone: teachers, walks and training negatives read nothing else.
        train: training edges, each once (i < j).
        valid, test: held-out edges.
        valid_negative, test_negative: as many pairs that are no edge of the whole graph; none stands twice.
    """

    seen: GraphTask
    train: Pairs
    valid: Pairs
    test: Pairs
    valid_negative: Pairs
    test_negative: Pairs


def split_links(task: GraphTask, seed: int, valid: float = 0.05, test: float = 0.1) -> LinkTask:
    """Hold out shares of the edges (LLP's transductive protocol: 5 % and 10 %), drawn from the seed.

    Held-out edges leave the graph in both directions before anything is learnt. Labels play no part.

    Raises:
        UsageError: a setting that hides nodes, or shares that leave nothing on one side.
        DataError: too few edges.
    """
    if task.setting != "transductive":
        raise UsageError(
            f"link prediction in the {task.setting} setting: only transductive is there; edges are hidden."
        )
    if min(valid, test) <= 0 or valid + test >= 1:
        raise UsageError(f"shares {valid} and {test} of held-out edges: expected positive numbers below 1 together.")
    edges = task.edge_index[:, task.edge_index[0] < task.edge_index[1]]
    count = edges.shape[1]
    sizes = int(valid * count), int(test * count)
    if not all(sizes) or sum(sizes) >= count:
        raise DataError(f"{task.name}: {count} edges are too few to hold out {valid:.0%} and {test:.0%} of them.")
    generator = torch.Generator().manual_seed(seed * 1009 + 11)
    drawn = edges[:, torch.randperm(count, generator=generator)]
    held = drawn[:, : sizes[0]], drawn[:, sizes[0] : sum(sizes)]
    train = drawn[:, sum(sizes) :]
    apart = non_edges(task, sum(sizes), generator)
    seen = replace(
        task, edge_index=clean_edges(train.numpy(), task.num_nodes, task.name), y=torch.full_like(task.y, -1)
    )
    return LinkTask(seen, train, *held, apart[:, : sizes[0]], apart[:, sizes[0] :])


def non_edges(graph: GraphTask, count: int, generator: torch.Generator) -> Pairs:
    """Pairs i < j, each once, that are no edge of this graph.

    Training negatives are drawn from the graph that training sees, so a held-out edge may be among them: leaving those
    out would tell the student which they are.

    Raises:
        DataError: the graph has not so many.
    """
    nodes = graph.num_nodes
    taken = graph.edge_index[0] * nodes + graph.edge_index[1]
    free = nodes * (nodes - 1) // 2 - len(taken) // 2
    if free < count:
        raise DataError(f"{graph.name}: {count} pairs without an edge wanted, {free} there.")
    found = torch.zeros(0, dtype=torch.int64)
    while len(found) < count:
        ends = torch.randint(nodes, (2, 2 * count), generator=generator)
        low, high = ends.min(dim=0).values, ends.max(dim=0).values
        keys = (low * nodes + high)[low < high]
        fresh = keys[~torch.isin(keys, taken)]
        found = unique_in_order(torch.cat([found, fresh]))
    found = found[:count]
    return torch.stack([found // nodes, found % nodes])


def unique_in_order(keys: Int[Tensor, " keys"]) -> Int[Tensor, " unique"]:
    """The first of each, in the order of first sight."""
    _, first = np.unique(keys.numpy(), return_index=True)
    return keys[torch.from_numpy(np.sort(first))]


def walk_contexts(
    graph: GraphTask,
    anchors: Int[Tensor, " anchors"],
    walks: int,
    hops: int,
    negatives: int,
    generator: torch.Generator,
) -> Int[Tensor, "anchors context"]:
    """Each anchor's context: nodes met on `walks` walks of `hops` steps, then `negatives` times as many random nodes.

    A walk stays where it is at a node without edges.
    """
    starts, columns, degrees = graph.adjacency.starts, graph.adjacency.columns, graph.degrees
    met = []
    for _ in range(walks):
        at = anchors
        for _ in range(hops):
            draw = torch.rand(len(at), generator=generator)
            step = starts[at] + torch.minimum((draw * degrees[at]).to(torch.int64), (degrees[at] - 1).clamp_min(0))
            moved = columns[step.clamp_max(max(0, len(columns) - 1))] if len(columns) else at
            at = torch.where(degrees[at] > 0, moved, at)
            met.append(at)
    random = torch.randint(graph.num_nodes, (len(anchors), negatives * len(met)), generator=generator)
    return torch.cat([torch.stack(met, dim=1), random], dim=1)


def link_metrics(positive: Float[Tensor, " pos"], negative: Float[Tensor, " neg"]) -> dict[str, float]:
    """auc (ties half), hits@K (share of edges scored above the K-th best non-edge, as OGB counts), mrr (mean of
    1 / rank of each edge among all non-edges, ties at their middle)."""
    high, low = positive.double().numpy(), negative.double().numpy()
    ranks = rankdata(np.concatenate([high, low]))
    count = len(high)
    out = {"auc": float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(low)))}
    ordered = np.sort(low)[::-1]
    for k in HITS:
        out[f"hits@{k}"] = float((high > ordered[k - 1]).mean()) if len(low) >= k else 1.0
    above = (low[None, :] > high[:, None]).sum(axis=1)
    equal = (low[None, :] == high[:, None]).sum(axis=1)
    return out | {"mrr": float((1 / (1 + above + equal / 2)).mean())}
