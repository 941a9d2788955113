"""Weights of regions are taken from another graph, in which the regions do the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import fx, nn

from ..errors import EditError, ShapeError
from .nodes import called, weights_read
from .read_only import also_read_only
from .region import Region, region_at
from .state import GraphState
from .weights import Shares, described


def take_weights(graph: GraphState, paths: Sequence[str], other: GraphState) -> tuple[str, ...]:
    """Take the weights of regions; see `EditableGraph.take_weights`."""
    inside: set[fx.Node] = set()
    for path in paths:
        region = region_at(graph, path)
        _check_same(region, region_at(other, path))
        inside.update(region.nodes)
    names = tuple(weights_read(node for node in graph.fx.nodes if node in inside))
    outside = weights_read(node for node in graph.fx.nodes if node not in inside)
    held = {name: other.weights.get(name) for name in names}
    for name, value in held.items():
        _check_fits(name, graph.weights.get(name), value)
        if name in outside:
            raise EditError(
                f"{name} is used outside of {', '.join(paths)} as well",
                where=name,
                hint="take all regions that share these weights",
            )
    also_read_only(other.tensors())
    shares = Shares()
    for name, value in held.items():
        if isinstance(value, nn.Module):
            graph.add_module(name, value, shares)
        else:
            graph.add_tensor(name, value, shares)
    return names


def _check_same(mine: Region, its: Region) -> None:
    """Refuse regions that differ in more than their weights."""
    for here, there in zip_longest(_operations(mine), _operations(its), fillvalue="nothing"):
        if here != there:
            passes = ", ".join(map(str, its.graph.passes)) or "none"
            raise EditError(
                f"{mine.path} is not the same in both graphs: here {here}, there {there}",
                where=mine.path,
                hint=f"apply the same passes to both; those of the graph to take from are: {passes}",
            )


def _operations(region: Region) -> list[str]:
    """Return what the nodes of a region compute, as text, whatever its inputs are computed from."""
    number = {node: count for count, node in enumerate(region.nodes)}

    def named(node: fx.Node) -> str:
        return f"%{number[node]}" if node in number else "%"

    return [f"{called(node)} {fx.map_arg((node.args, node.kwargs), named)}" for node in region.nodes]


def _check_fits(name: str, mine: nn.Module | torch.Tensor, its: nn.Module | torch.Tensor) -> None:
    """Refuse weights of another shape, dtype or device."""
    if described(mine) != described(its):
        raise ShapeError(
            f"{name} is {described(mine)}, and {described(its)} in the graph to take from",
            where=name,
            hint="take regions from a UNet of the same configuration",
        )
    places = [_place(mine), _place(its)]
    if places[0] != places[1]:
        raise EditError(
            f"{name} is {places[0]}, and {places[1]} in the graph to take from",
            where=name,
            hint="unet.to(device, dtype) first",
        )


def _place(held: nn.Module | torch.Tensor) -> str:
    tensors = [held] if isinstance(held, torch.Tensor) else [*held.parameters(), *held.buffers()]
    return ", ".join(dict.fromkeys(f"{tensor.dtype} on {tensor.device}" for tensor in tensors))
