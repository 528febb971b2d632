"""Teachers (GCN, SAGE, GAT, APPNP, GCNII) and MLP students; the first layer multiplies sparse features as they are."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, elu, relu
from torch_geometric.nn import GATConv, GCN2Conv

from structkd.errors import UsageError, did_you_mean
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.kernels import _layers
from structkd.graph.spectral import propagation
from structkd.kernels import seed_of_draws

Logits = Float[Tensor, "nodes classes"]


def relu_dropout(x: Float[Tensor, "rows width"], share: float, training: bool) -> Float[Tensor, "rows width"]:
    """dropout(relu(x)); on CPU in one pass that draws as it goes, where torch takes two and memory for the draws.

    The draws follow torch's random state: one seed a call comes from it.
    """
    if not training or not share:
        return relu(x)
    if x.is_cuda or not 0 < share < 1:
        return dropout(relu(x), share, training)
    out: Tensor = _ReluDropout.apply(x, share)  # type: ignore[no-untyped-call]
    return out


class _ReluDropout(torch.autograd.Function):
    """The result says by its zeros where the gradient stops, so no mask is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        source, out = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.scale = source.numpy().dtype.type(1 / (1 - share))
        _layers.relu_dropout(source.numpy(), *seed_of_draws(share), ctx.scale, out.numpy())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        slope = torch.empty_like(out)
        _layers.relu_dropout_slope(gradients[0].contiguous().numpy(), out.numpy(), ctx.scale, slope.numpy())
        return slope, None


class Linear(nn.Module):
    """x @ weight + bias for dense or sparse x; weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, glorot: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        bound = math.sqrt(6 / (inputs + outputs)) if glorot else 1 / math.sqrt(max(1, inputs))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None and not glorot:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Features) -> Tensor:
        """Outputs [rows, outputs]."""
        product = x.product(self.weight) if isinstance(x, SparseMatrix) else x @ self.weight
        return product if self.bias is None else product + self.bias


def check_shape(layers: int, hidden: int, dropout: float) -> None:
    """UsageError on a depth, a width or a share of dropped values that no model has."""
    if layers < 1 or hidden < 1:
        raise UsageError(f"layers {layers}, hidden {hidden}: expected 1 or more of both.")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout {dropout}: expected a share from 0 to below 1.")


class Mlp(nn.Module):
    """The student: Linear, ReLU, dropout between layers, no norm; x -> logits, no graph."""

    def __init__(self, inputs: int, hidden: int, classes: int, layers: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        check_shape(layers, hidden, dropout)
        self.widths = [inputs, *[hidden] * (layers - 1), classes]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(self.widths))
        self.dropout = dropout

    def forward(self, x: Features) -> Logits:
        """Logits of each row."""
        for layer in self.layers[:-1]:
            x = relu_dropout(layer(x), self.dropout, self.training)
        out: Tensor = self.layers[-1](x)
        return out


class _Convolutions(nn.Module):
    """Linear maps with a constant propagation after each; ReLU and dropout between."""

    self_loops = 1.0
    normalisation: Any = "symmetric"

    def __init__(self, inputs: int, hidden: int, classes: int, layers: int, dropout: float, heads: int = 1) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), classes]
        self.layers = nn.ModuleList(Linear(a, b, glorot=True) for a, b in pairwise(widths))
        self.dropout = dropout

    def prepare(self, task: GraphTask) -> SparseMatrix:
        """The propagation matrix of a task."""
        return propagation(task, self.self_loops, self.normalisation)

    def forward(self, x: Features, graph: SparseMatrix) -> Logits:
        """Logits of each node."""
        out: Any = x
        for layer in self.layers:
            if layer is not self.layers[0]:
                out = relu_dropout(out, self.dropout, self.training)
            out = _propagated(layer, out, graph)
        assert isinstance(out, Tensor)
        return out


def _propagated(layer: Any, x: Features, graph: SparseMatrix) -> Tensor:
    """graph @ x @ weight + bias; the map comes first, since a class or hidden width is the narrower side."""
    product = x.product(layer.weight) if isinstance(x, SparseMatrix) else x @ layer.weight
    out: Tensor = graph.product(product)
    return out if layer.bias is None else out + layer.bias


class Gcn(_Convolutions):
    """Graph convolution (Kipf & Welling, ICLR 2017, eq. 2): D~^-1/2 (A + I) D~^-1/2 x W + b."""


class Sage(_Convolutions):
    """GraphSAGE with the "gcn" aggregator, self-loops already in the graph, as FF-G2M has it: (A + 2I)/(d + 2)."""

    self_loops = 2.0
    normalisation = "row"


class Gat(nn.Module):
    """Graph attention (Velickovic et al., ICLR 2018): heads joined, last layer one head; features dropped at inputs."""

    attention_dropout = 0.3

    def __init__(self, inputs: int, hidden: int, classes: int, layers: int, dropout: float, heads: int = 4) -> None:
        super().__init__()
        if hidden % heads:
            raise UsageError(f"hidden width {hidden} is no multiple of {heads} attention heads.")
        widths = [inputs, *[hidden] * (layers - 1), classes]
        self.maps = nn.ModuleList(Linear(a, b, bias=False, glorot=True) for a, b in pairwise(widths))
        self.attention = nn.ModuleList()
        for depth, width in enumerate(widths[1:]):
            count = heads if depth < layers - 1 else 1
            convolution = GATConv(width, width // count, count, dropout=self.attention_dropout)
            convolution.lin = nn.Identity()  # the map above did it, sparse x included
            self.attention.append(convolution)
        self.dropout = dropout

    def prepare(self, task: GraphTask) -> Tensor:
        """Directed edges; GATConv adds self-loops."""
        return task.edge_index

    def mapped(self, depth: int, x: Features) -> Float[Tensor, "nodes width"]:
        """What one layer's attention weighs: its linear map of the features after dropout."""
        out: Tensor = self.maps[depth](dropped(x, self.dropout, self.training))
        return out

    def forward(self, x: Features, graph: Tensor) -> Logits:
        """Logits of each node."""
        out: Any = x
        for depth, attention in enumerate(self.attention):
            out = attention(self.mapped(depth, out), graph)
            if depth < len(self.maps) - 1:
                out = elu(out)
        assert isinstance(out, Tensor)
        return out


def dropped(x: Features, share: float, training: bool) -> Features:
    """Features with a share of their entries zeroed, the rest scaled up; sparse ones keep their pattern."""
    if isinstance(x, SparseMatrix):
        return x.with_values(dropout(x.values, share, training)) if training and share else x
    return dropout(x, share, training)


class Appnp(nn.Module):
    """Predict, then propagate by personalised PageRank (Gasteiger et al., ICLR 2019, eq. 5): 10 steps, restart 0.1."""

    steps = 10
    restart = 0.1

    def __init__(
        self,
        inputs: int,
        hidden: int,
        classes: int,
        layers: int,
        dropout: float,
        heads: int = 1,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.predict = Mlp(inputs, hidden, classes, layers, dropout)
        self.input_dropout = input_dropout

    def prepare(self, task: GraphTask) -> SparseMatrix:
        """The symmetric propagation matrix."""
        return propagation(task)

    def forward(self, x: Features, graph: SparseMatrix) -> Logits:
        """Logits of each node."""
        start: Tensor = self.predict(dropped(x, self.input_dropout, self.training))
        out = start
        for _ in range(self.steps):
            out = (1 - self.restart) * graph.product(out) + self.restart * start
        return out


class _Gcn2Conv(GCN2Conv):  # type: ignore[misc]
    """The same layer with our sparse product in place of gathered messages, which cost edges x width memory."""

    def propagate(self, edge_index: Any, **parts: Any) -> Tensor:
        """S x."""
        out: Tensor = edge_index.product(parts["x"])
        return out


class Gcnii(nn.Module):
    """GCNII (Chen et al., ICML 2020, eq. 5): initial residual .1 and identity mapping with theta .5, any depth."""

    alpha = 0.1
    theta = 0.5

    def __init__(self, inputs: int, hidden: int, classes: int, layers: int, dropout: float, heads: int = 1) -> None:
        super().__init__()
        self.enter = Linear(inputs, hidden, glorot=True)
        self.leave = Linear(hidden, classes, glorot=True)
        self.layers = nn.ModuleList(
            _Gcn2Conv(hidden, self.alpha, self.theta, depth + 1, normalize=False) for depth in range(layers)
        )
        self.dropout = dropout

    def prepare(self, task: GraphTask) -> SparseMatrix:
        """The symmetric propagation matrix."""
        return propagation(task)

    def forward(self, x: Features, graph: SparseMatrix) -> Logits:
        """Logits of each node."""
        out = first = relu(self.enter(dropped(x, self.dropout, self.training)))
        for layer in self.layers:
            out = relu(layer(dropout(out, self.dropout, self.training), first, graph))
        logits: Tensor = self.leave(dropout(out, self.dropout, self.training))
        return logits


MODELS: dict[str, Callable[..., nn.Module]] = {
    "gcn": Gcn, "sage": Sage, "gat": Gat, "appnp": Appnp, "gcnii": Gcnii,
}  # fmt: skip


def build_teacher(
    name: str, inputs: int, hidden: int, classes: int, layers: int, dropout: float, heads: int
) -> nn.Module:
    """A teacher by name; UsageError when there is none of that name."""
    if name not in MODELS:
        raise UsageError(
            f"teacher {name!r}: expected one of {', '.join(MODELS)}, or scores:DIR or scores:FILE."
            + did_you_mean(name, MODELS)
        )
    check_shape(layers, hidden, dropout)
    return MODELS[name](inputs, hidden, classes, layers, dropout, heads)
