"""`HoistInvariants`: compute once per generation what is the same at all its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sdgraph import Contract, Findings, Graph, Pass, inherit
from sdgraph.schedules import Once

ONCE = Once()


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Loop-invariant code motion over the calls of a generation: keys and values of the text, most of all.

    Whatever has costs and depends on nothing but weights and conditioning (the text, SDXL's sizes, IP-Adapter's
    images, class labels) is computed at the first call of a generation and kept. It is found by following the inputs
    that change from call to call; the numbers stay bit for bit the same.
    """

    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph: Graph) -> Findings:
        changing = graph.changing_nodes()
        found = [
            node
            for node in graph.nodes
            if node.op.startswith("call_")
            and node not in changing
            and isinstance(node.meta["val"], torch.Tensor)
            and any(user in changing or user.op == "output" for user in node.users)
        ]
        edits = []
        for node in found:
            source = _costly(graph, node)
            if source is not None:
                name = _free_name(graph, source)
                graph.inherit(node, name, ONCE)
                edits.append(f"{name} is computed once per generation")
        return Findings(edits=tuple(edits))


def _costly(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The nearest node with multiply-accumulates that a value comes from, past which nothing is kept already."""
    sources = graph.ancestors(node, stop=lambda source: source.target is inherit)
    return next((source for source in sources if graph.macs_of(source)), None)


def _free_name(graph: Graph, node: fx.Node) -> str:
    stem = str(node.target) if node.op == "call_module" else node.name
    return stem if stem not in graph.sites else f"{stem}:{node.name}"
