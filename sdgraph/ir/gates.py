"""Gates: numbers that mix what a region returns with the value that replaces it when the region is removed."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .regions import Region


def insert_gates(nodes: fx.Graph, regions: Sequence[Region]) -> None:
    """Give a graph a further, last argument with a gate for each region, (regions,), or (regions, B).

    With a gate of 1 the region is as it was, with 0 it is removed, both exactly. In between, its outputs are mixed
    linearly with the values of `Region.stand_in`. The gate of an outer region acts on values that inner gates have
    mixed.

    Args:
        nodes: the graph, a copy of that of the regions whose nodes have the same names.
        regions: the regions.
    """
    known = {node.name: node for node in nodes.nodes}
    with nodes.inserting_after([node for node in nodes.nodes if node.op == "placeholder"][-1]):
        gates = nodes.placeholder("gates")
    inside = {region.path: {known[node.name] for node in region.nodes} for region in regions}
    last: dict[fx.Node, fx.Node] = {}
    mixed: list[tuple[fx.Node, fx.Node, set[fx.Node]]] = []  # a value, its mixture, and what reads the value itself
    for region in sorted(regions, key=lambda one: -one.path.count(".")):  # inner ones first
        with nodes.inserting_after(gates):
            gate = nodes.call_function(operator.getitem, (gates, regions.index(region)))
        for output in region.outputs:
            value, instead = (known[node.name] for node in region.stand_in(output))
            with nodes.inserting_after(last.get(value, value)):
                mixture = nodes.call_function(mix, (instead, value, gate))
            mixture.meta = dict(value.meta)
            mixed.append((value, mixture, inside[region.path] if value.name == output.name else set()))
            last[value] = mixture
            for outer in regions:
                if region.path.startswith(f"{outer.path}."):
                    inside[outer.path].add(mixture)
    newest: dict[fx.Node, fx.Node] = {}
    for value, mixture, within in mixed:
        kept = {mixture, *within}
        newest.get(value, value).replace_all_uses_with(mixture, lambda user, kept=kept: user not in kept)  # type: ignore[misc]
        newest[value] = mixture


def mix(instead: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """Return a value that is mixed with the one that replaces it, exactly one of them at the ends.

    Args:
        instead: the value at a gate of 0.
        value: the value at a gate of 1; under autocast it may have another dtype.
        gate: the gate, a scalar, or one for each sample, (B,).
    """
    dtype = torch.promote_types(instead.dtype, value.dtype)
    gate = gate.reshape(gate.shape + (1,) * (value.ndim - 1)) if gate.ndim else gate
    return torch.lerp(instead.to(dtype), value.to(dtype), gate.to(dtype))
