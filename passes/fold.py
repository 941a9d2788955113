"""`Fold`: one kernel again, where `Overparameterize` composed it of several parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sdgraph import Contract, Graph, Pass

from .composed import Layer, branches, low_rank, multiplied, product, summed, updated

KERNELS: Mapping[Any, Any] = {product: multiplied, branches: summed, low_rank: updated}


def no_layer_is_composed(graph: Graph) -> list[fx.Node]:
    """No kernel is composed of several parameters."""
    return [node for node in graph.nodes if node.target in KERNELS]


def parameters_are_weights(graph: Graph) -> list[fx.Node]:
    """Every parameter of a composed kernel is one of the weights, and no pass has computed another in its place.

    Apply Fold before the pass that did this.
    """
    return [node for node in no_layer_is_composed(graph) if any(tensor.op != "get_attr" for tensor in _read(node))]


@dataclass(frozen=True)
class Fold(Pass):
    """Make layers plain again that `Overparameterize` has composed of several parameters.

    The layers have the names and shapes of the source again, so that a saved folder, an export and `to_diffusers` are
    those of a plain UNet. Layers that share their parameters share the result.

    Raises:
        PreconditionError: a parameter of a layer was replaced since by a value that is computed.
        NoChangeError: there is nothing to fold.
    Example:
        `sdgraph.apply(tuned, [Fold()]).to_diffusers()`
    Source:
        Guo et al., "ExpandNets", 2020; Ding et al., "RepVGG", 2021.
    """

    contract: ClassVar[Contract] = Contract.CLOSE
    preconditions = (parameters_are_weights,)
    postconditions = (no_layer_is_composed,)

    def run(self, graph: Graph) -> None:
        composed = no_layer_is_composed(graph)
        layers = [_plain(graph, node) for node in composed]  # all, before any takes the names of its parameters
        first: dict[tuple[str, ...], str] = {}
        for node, layer in zip(composed, layers, strict=True):
            path, read = graph.module_path(node), _read(node)
            call = graph.replace(node, layer, node.args[0], leaving=read)
            shared = first.setdefault(tuple(str(tensor.target) for tensor in read), path)
            if shared != path:
                graph.share(call, shared)


def _read(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of the parameters of a composed layer."""
    return [argument for argument in node.args[1:-1] if isinstance(argument, fx.Node)]


def _plain(graph: Graph, node: fx.Node) -> Layer:
    """Return the plain layer that computes the same as a composed one."""
    options: Any = node.args[-1]
    targets = {tensor: graph.tensor(str(tensor.target)) for tensor in _read(node)}
    *parts, bias = (None if argument is None else targets[argument] for argument in node.args[1:-1])  # type: ignore[index]
    with torch.no_grad():
        kernel: Tensor = KERNELS[node.target](*parts, 1 if options is None else options[3])
    layer: Layer
    if options is None:
        layer = nn.Linear(kernel.shape[1], kernel.shape[0], bias is not None, device="meta")
    else:
        stride, padding, dilation, groups = options
        sizes = kernel.shape[1] * groups, kernel.shape[0], tuple(kernel.shape[2:])
        layer = nn.Conv2d(*sizes, stride, padding, dilation, groups, bias is not None, device="meta")  # type: ignore[arg-type]
    layer.weight = nn.Parameter(kernel, requires_grad=any(p.requires_grad for p in targets.values()))
    layer.bias = bias
    return layer
