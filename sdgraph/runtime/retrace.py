"""`retrace`: the graph of a source UNet after a change, made by tracing it again and replaying the passes.

A graph keeps its source without the numbers: the modules, their attention processors and settings, on the meta device.
With the graph's weights, the source is a UNet of diffusers again, and any method of diffusers can change it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..compiler.runner import replay
from ..errors import ModeError
from ..frontend.capture import capture
from ..frontend.source import check_modules
from ..graph import Graph
from ..ir.verify import alike
from ..ir.weights import Weights, skeleton

_AGAIN = "do it on the source UNet, then call sdgraph.apply again"


def retrace(graph: Graph, change: Callable[[UNet2DConditionModel], Any]) -> Graph:
    """Return the graph of the same source after a change, with the same passes and weights.

    Args:
        graph: the graph before the change, which stays as it is.
        change: a function that changes a UNet of diffusers. The UNet has the weights that the graph still has.
    Raises:
        SdgraphError: the changed UNet cannot be traced, or a pass cannot be repeated.
        ModeError: the graph is more than its source and passes, or needs weights that it no longer has.
    """
    graph.check_unaltered()
    if graph.source is None or not alike(_replayed(graph, graph.source), graph):
        raise ModeError("the graph has edits outside of passes, which would be lost", where="GraphUNet", hint=_AGAIN)
    source = nn.Module.to(copy.deepcopy(graph.source), graph.dtype)
    _fill(source, graph.weights)
    before = dict(_tensors(source))
    change(source)
    replaced = {name for name, tensor in _tensors(source) if before.get(name) is not tensor}
    check_modules(source, {type(processor) for processor in graph.source.attn_processors.values()})
    new_graph = _replayed(graph, source)
    new_graph.device = graph.device
    weight = next(iter(graph.parameters().values()), None)
    for name, tensor in _tensors(new_graph.weights):
        held = graph.weights.get(name)
        if name not in replaced and isinstance(held, torch.Tensor) and held.shape == tensor.shape:
            _set(new_graph.weights, name, held)  # the very object: an optimizer may hold it
        elif tensor.is_meta:
            raise ModeError("this needs a weight that a pass took out of the graph", where=name, hint=_AGAIN)
        elif weight is not None:
            tensor.data = tensor.data.to(weight.device)  # it was not in the graph when that was moved
    new_graph.source = skeleton(source, new_graph.weights)
    return new_graph


def _replayed(graph: Graph, source: UNet2DConditionModel) -> Graph:
    names = [i.name for i in graph.inputs if i.name == "encoder_attention_mask"]
    return replay(graph.passes, capture(source, names))


def _fill(source: UNet2DConditionModel, weights: Weights) -> None:
    """Give the source the graph's own tensors; those that the graph lacks stay on the meta device."""
    for name, tensor in list(_tensors(source)):
        held = weights.get(name)
        if not isinstance(held, torch.Tensor):
            held = _unfused(name, weights)
        if held is not None and held.shape == tensor.shape:
            _set(source, name, held)


def _unfused(name: str, weights: Weights) -> nn.Parameter | None:
    """Return the share of a projection in the fused one that a graph has in its place."""
    path, _, leaf = name.rpartition(".")
    attention, _, projection = path.rpartition(".")
    for fused in ("to_q.to_k.to_v", "to_k.to_v"):
        parts = fused.split(".")
        whole = weights.get(f"{attention}.{'to_' + ''.join(part[-1] for part in parts)}.{leaf}")
        if projection in parts and isinstance(whole, torch.Tensor):
            share = whole.detach().chunk(len(parts))[parts.index(projection)].clone()
            return nn.Parameter(share, whole.requires_grad)
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    holder = model.get_submodule(path)
    (holder._parameters if leaf in holder._parameters else holder._buffers)[leaf] = tensor  # type: ignore[assignment]
