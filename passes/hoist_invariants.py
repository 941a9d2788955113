"""`HoistInvariants`: compute values that are the same at all calls of a generation once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sdgraph import Contract, Graph, Pass, inherit
from sdgraph.schedules import Once

ONCE = Once()


def invariants_are_inherited(graph: Graph) -> list[fx.Node]:
    """Every value with multiply-accumulates that is the same at all calls is inherited from the first call."""
    changing = graph.changing_nodes()
    return [
        node
        for node in graph.nodes
        if node.op.startswith("call_")
        and node not in changing
        and isinstance(node.meta["val"], torch.Tensor)
        and any(user in changing or user.op == "output" for user in node.users)
        and _costly(graph, node) is not None
    ]


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Move loop-invariant code out of the calls of a generation: above all, the keys and values of the text.

    Values that cost multiply-accumulates and depend on nothing but weights and conditioning (the text, SDXL's sizes,
    IP-Adapter's images, class labels) are computed at the first call of a generation and kept. They are the values that
    do not depend on the inputs that change from call to call. All results stay the same bit for bit.
    """

    contract: ClassVar[Contract] = Contract.EXACT
    postconditions = (invariants_are_inherited,)

    def run(self, graph: Graph) -> None:
        names = set(graph.sites)
        for node in invariants_are_inherited(graph):
            source = _costly(graph, node)
            if source is not None:  # not so where all that it costs is inherited by now
                stem = str(source.target) if source.op == "call_module" else source.name
                name = stem if stem not in names else f"{stem}:{source.name}"
                names.add(name)
                graph.inherit(node, name, ONCE)


def _costly(graph: Graph, node: fx.Node) -> fx.Node | None:
    """Return a node with multiply-accumulates that a value is computed from; None if it is kept or costs nothing."""
    sources = graph.ancestors(node, stop=lambda source: source.target is inherit)
    return next((source for source in sources if graph.macs_of(source)), None)
