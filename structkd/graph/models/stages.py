"""What a trained teacher does step by step: transform features, propagate over edges, transform, propagate."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import elu, relu

from structkd.errors import UsageError
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.models.networks import Appnp, Gat, Gcn, Sage
from structkd.graph.models.teacher import Teacher


@dataclass(frozen=True, eq=False)
class Stage:
    """One step: `before` -> `after`. A transform has the layer's weight [inputs, outputs] and bias."""

    kind: Literal["transform", "propagate"]
    before: Features
    after: Float[Tensor, "nodes width"]
    weight: Tensor | None = None
    bias: Tensor | None = None


@torch.no_grad()
def stages(teacher: Teacher, task: GraphTask) -> list[Stage]:
    """The teacher's steps on a task in eval mode.

    The bias that a layer adds after propagation stands at its transform, as TINED copies it.

    Raises:
        UsageError: a teacher that has no such steps.
    """
    model = teacher.model.eval()
    if isinstance(model, Gcn | Sage):
        return _convolutions(model, task)
    if isinstance(model, Gat):
        return _attention(model, task)
    if isinstance(model, Appnp):
        return _predict_then_propagate(model, task)
    raise UsageError(f"a {teacher.config.model} teacher cannot be looked into; expected gcn, sage, gat or appnp.")


def hidden_layer(teacher: Teacher, task: GraphTask) -> Float[Tensor, "nodes hidden"]:
    """What the teacher's last transform reads: its last hidden activations.

    Raises:
        UsageError: a teacher of one layer.
    """
    last = [stage for stage in stages(teacher, task) if stage.kind == "transform"][-1].before
    if not isinstance(last, Tensor) or last is task.x:
        raise UsageError("the teacher has one layer, hence no hidden one; train it with --layers 2 or more.")
    return last


def _convolutions(model: Gcn | Sage, task: GraphTask) -> list[Stage]:
    graph, layers, found = model.prepare(task), cast(Any, model.layers), []
    x: Features = task.x
    for layer in layers:
        inner = _product(layer, x)
        outer = graph.product(inner)
        found += [Stage("transform", x, inner, layer.weight, layer.bias), Stage("propagate", inner, outer)]
        x = relu(outer + layer.bias)
    return found


def _attention(model: Gat, task: GraphTask) -> list[Stage]:
    graph, found = model.prepare(task), []
    x: Features = task.x
    for linear, attention in zip(cast(Any, model.maps), cast(Any, model.attention), strict=True):
        inner = linear(x)
        outer = attention(inner, graph)
        found.append(Stage("transform", x, inner, linear.weight, attention.bias))
        found.append(Stage("propagate", inner, outer - attention.bias))
        x = elu(outer)
    return found


def _predict_then_propagate(model: Appnp, task: GraphTask) -> list[Stage]:
    found: list[Stage] = []
    x: Features = task.x
    for layer in cast(Any, model.predict.layers):
        found.append(Stage("transform", x, layer(x), layer.weight, layer.bias))
        x = relu(found[-1].after)
    found.append(Stage("propagate", found[-1].after, model(task.x, model.prepare(task))))
    return found


def _product(layer: Any, x: Features) -> Tensor:
    out: Tensor = layer(x)
    return out if layer.bias is None else out - layer.bias
