"""The contents of a diagram: boxes and skips, and whether passes kept, removed, changed or inserted them."""

from __future__ import annotations

from collections import Counter

from ..errors import PathError
from ..ir.regions import region_at
from ..ir.state import GraphState
from .boxes import Box
from .units import BLOCK, Units
from .words import substance


class Plan:
    """The boxes and skips of a graph with their states.

    Args:
        graph: the graph to draw.
        before: the graph before some passes, whose effect is shown.
    Raises:
        PathError: the graph has no blocks of a UNet.
    """

    def __init__(self, graph: GraphState, before: GraphState | None) -> None:
        self.graph, self.before = graph, before
        self.after = Units(graph)
        self.old = Units(before) if before is not None else self.after
        self.boxes = {path: self._box(path) for path in self._paths()}
        if not any(BLOCK.match(path) for path in self.boxes):
            raise PathError("the graph has no down_blocks, mid_block or up_blocks to draw", hint="draw a traced UNet")
        self.skips = [(s, "kept" if s in self.old.skips else "inserted") for s in self.after.skips]
        self.skips += [(s, "removed") for s in self.old.skips if s not in self.after.skips]
        self.news = self._news()

    def _paths(self) -> list[str]:
        """Return the paths of the units of both graphs, the old graph first, without those that have no weights."""
        paths = dict.fromkeys([*self.old.nodes, *self.after.nodes])
        return [p for p in paths if BLOCK.match(p) or self._weighs(p)]

    def _weighs(self, path: str) -> bool:
        graph = self.graph if path in self.after.nodes else self.old.graph
        return bool(region_at(graph, path).parameters) and path != "conv_norm_out"

    def _box(self, path: str) -> Box:
        state = "kept"
        if path not in self.after.nodes:
            state = "removed"
        elif path not in self.old.nodes:
            state = "inserted"
        elif self.before is not None and not self.old.same(path, self.after):
            state = "changed"
        units = self.old if state == "removed" else self.after
        return Box(path, self._label(path, state), units.share(path), state)

    def _label(self, path: str, state: str) -> str:
        if not BLOCK.match(path):
            return path
        name = path.removeprefix(BLOCK.match(path)[0] + ".")  # type: ignore[index]
        known = {"resnets": "R", "attentions": "A", "downsamplers": "down", "upsamplers": "up"}
        label = known.get(name.split(".")[0], name)
        depths = [units.depth(path) for units in (self.old, self.after) if path in units.nodes]
        if any(depths):
            label += f" ×{depths[0]}" if len(set(depths)) == 1 else f" ×{depths[0]}→{depths[1]}"
        return label

    def _news(self) -> str:
        """Return the new operations that are in no box, such as those that a pass inserts on a skip."""
        old, new = (Counter(substance(units.graph, units.outside)) for units in (self.old, self.after))
        return ", ".join(f"{number} {word}" for word, number in sorted((new - old).items()))
