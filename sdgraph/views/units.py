"""The units of a UNet, which are the boxes of a diagram, and the skip connections between them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from ..ir.regions import region_at
from ..ir.state import GraphState
from .words import substance

BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)|mid_block")


@dataclass(frozen=True)
class Skip:
    """A skip connection: a value that goes from a unit on the left to a unit on the right."""

    source: str
    target: str
    channels: int = field(compare=False, default=0)


class Units:
    """The units of a graph: nodes by path, in graph order, and the skips between units."""

    def __init__(self, graph: GraphState) -> None:
        self.graph = graph
        self.nodes: dict[str, list[fx.Node]] = {}
        self.outside: list[fx.Node] = []
        for node in graph.fx.nodes:
            unit = unit_of(node)
            if unit:
                self.nodes.setdefault(unit, []).append(node)
            else:
                self.outside.append(node)
        self.total = max(graph.macs, 1)
        self.skips = list(dict.fromkeys(self._skips()))

    def share(self, path: str) -> float:
        """Return the share of a unit in the multiply-accumulates."""
        return sum(map(self.graph.macs_of, self.nodes[path])) / self.total

    def same(self, path: str, other: Units) -> bool:
        """Return whether a unit is the same in another graph."""
        classes = [units.graph.classes.get(path) for units in (self, other)]
        does = [substance(units.graph, units.nodes[path]) for units in (self, other)]
        shapes = [[p.shape for p in region_at(units.graph, path).parameters.values()] for units in (self, other)]
        return classes[0] == classes[1] and does[0] == does[1] and shapes[0] == shapes[1]

    def depth(self, path: str) -> int:
        """Return the number of transformer blocks in a unit."""
        stacks = (p for n in self.nodes[path] for p in n.meta.get("nn_module_stack", {}))
        return len({p for p in stacks if re.fullmatch(rf"{re.escape(path)}\.transformer_blocks\.\d+", p)})

    def _skips(self) -> Iterable[Skip]:
        for node in self.graph.fx.nodes:
            parts = node.args[0] if node.target in (torch.cat, torch.concat) and node.args else ()
            if not unit_of(node) and isinstance(parts, tuple | list) and len(parts) > 1:
                target = next((u for u in map(unit_of, _descend(node)) if u), "")
                for part in parts[1:]:
                    source = _source_unit(part) if isinstance(part, fx.Node) else ""
                    if source and target.startswith("up_blocks") and not source.startswith("up_blocks"):
                        yield Skip(source, target, int(part.meta["val"].shape[1]))


def unit_of(node: fx.Node) -> str:
    """Return the path of the unit of a node: a part of a block, or a top-level module; "" if it is in none."""
    stack: list[str] = list(node.meta.get("nn_module_stack", {}))
    if not stack or (len(stack) == 1 and BLOCK.fullmatch(stack[0])):
        return ""
    return stack[1] if BLOCK.fullmatch(stack[0]) else stack[0]


def _source_unit(node: fx.Node) -> str:
    """Return the unit that computes a value. Residuals that are added on the way are skipped."""
    while not unit_of(node):
        computed = [n for n in node.all_input_nodes if n.op not in ("placeholder", "get_attr")]
        if not computed:
            return ""
        node = computed[0]
    return unit_of(node)


def _descend(node: fx.Node) -> Iterable[fx.Node]:
    while node.users:
        node = next(iter(node.users))
        yield node
