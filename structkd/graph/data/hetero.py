"""torch_geometric's HeteroData as one kind of node with edges among themselves, direct or through other kinds."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from structkd.errors import DataError, UsageError, did_you_mean

_MASKS = ("train_mask", "val_mask", "test_mask")


def homogeneous(data: HeteroData, node_type: str, through: Sequence[str] = ()) -> Data:
    """The nodes of one type with x, y and masks; an edge is one of the data's own, or two nodes that share a neighbour.

    Args:
        node_type: the nodes to classify, as "paper".
        through: types whose nodes join their neighbours pairwise, as ("author",) for papers of one author. A node with
            d neighbours makes d (d - 1) / 2 edges.

    Raises:
        UsageError: an unknown type.
        DataError: no edge among these nodes.
    """
    for name in (node_type, *through):
        if name not in data.node_types:
            known = ", ".join(data.node_types)
            raise UsageError(f"node type {name!r}: expected one of {known}.{did_you_mean(name, data.node_types)}")
    own = [data[kind].edge_index for kind in data.edge_types if kind[0] == kind[2] == node_type]
    found = own + [_joined(data, node_type, name) for name in through]
    if not found:
        near = sorted({kind[0] if kind[2] == node_type else kind[2] for kind in data.edge_types if node_type in kind})
        raise DataError(
            f"no edge joins two nodes of type {node_type!r}; give through=(TYPE, ...) with some of {', '.join(near)}."
        )
    store = data[node_type]
    given = {name: store[name] for name in ("x", "y", *_MASKS) if name in store}
    return Data(edge_index=torch.cat(found, dim=1), num_nodes=store.num_nodes, **given)


def checked(data: Data, name: str) -> Data:
    """The data when it has features, labels and one set of masks.

    Raises:
        DataError: something is missing, or there are several splits.
    """
    missing = [field for field in ("x", "y", "edge_index", *_MASKS) if data.get(field) is None]
    if missing:
        raise DataError(
            f"{name}: the Data object has no {', '.join(missing)}; expected x, y, edge_index and the masks train_mask, "
            "val_mask, test_mask (torch_geometric.transforms.RandomNodeSplit makes masks)."
        )
    several = [field for field in _MASKS if data[field].ndim != 1]
    if several:
        shape = tuple(data[several[0]].shape)
        raise DataError(f"{name}: {several[0]} has shape {shape}; choose one split, as in data.train_mask[:, 0].")
    return data


def _joined(data: HeteroData, node_type: str, middle: str) -> Tensor:
    """Pairs of nodes that share a node of type `middle`, as edges in both directions."""
    shape = data[node_type].num_nodes, data[middle].num_nodes
    rows, columns = [], []
    for kind in data.edge_types:
        ends = data[kind].edge_index.numpy()
        if (kind[0], kind[2]) in ((node_type, middle), (middle, node_type)):
            rows.append(ends[0] if kind[0] == node_type else ends[1])
            columns.append(ends[1] if kind[0] == node_type else ends[0])
    if not rows:
        raise DataError(f"no edge joins {node_type!r} and {middle!r}; the data has {data.edge_types}.")
    at = np.concatenate(rows), np.concatenate(columns)
    incidence = sp.csr_array((np.ones(len(at[0]), dtype=np.int64), at), shape=shape)
    shared = sp.coo_array(incidence @ incidence.T)
    apart = shared.row != shared.col
    return torch.from_numpy(np.stack([shared.row[apart], shared.col[apart]]).astype(np.int64))
