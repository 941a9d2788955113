"""The contents of a diagram: units of a UNet as boxes, skip connections, the effect of passes, and the layout."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ..errors import PathError
from ..ir.regions import region_at
from ..ir.state import GraphState
from .text import module_words, short_name

IDLE = ("to", "float", "contiguous")
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)|mid_block")
ENDS = ("conv_in", "conv_out")  # where the U begins and ends
# Sizes in inches. A row holds a layer of a down block on the left, and the layer that reads its skip on the right.
BOX_WIDTH, BOX_HEIGHT, GAP = 1.12, 0.36, 0.16
WIDE = 1.68  # of boxes outside of the U, which show their name
ROW, BAND, INDENT, MIDDLE = 0.56, 0.42, 0.30, 2.0

KINDS = ("R", "A")  # of layers, by the first letter of their labels: resnets, attentions


@dataclass
class Box:
    """A unit of a UNet in a diagram.

    Args:
        path: the module path.
        label: the text in the box.
        share: the share of the multiply-accumulates, of the graph before if the unit was removed.
        state: "kept", "removed", "changed" or "inserted".
        x: the distance of the left edge, in inches.
        y: the height of the lower edge, in inches.
    """

    path: str
    label: str
    share: float
    state: str = "kept"
    x: float = 0.0
    y: float = 0.0

    @property
    def kind(self) -> str:
        """The first letter of the label of a layer, one of `KINDS`; "" for other boxes."""
        return self.label[0] if self.label[0] in KINDS and BLOCK.match(self.path) else ""

    @property
    def width(self) -> float:
        """The width, in inches."""
        return BOX_WIDTH if BLOCK.match(self.path) or self.path in ENDS else WIDE


class Diagram:
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
        self.inserted = self._inserted()

    def _paths(self) -> list[str]:
        """Return the paths of the units of both graphs, the old graph first, without those that have no weights."""
        paths = dict.fromkeys([*self.old.nodes, *self.after.nodes])
        return [p for p in paths if BLOCK.match(p) or self._has_weights(p)]

    def _has_weights(self, path: str) -> bool:
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

    def _inserted(self) -> str:
        """Return the new operations that are in no box, such as those that a pass inserts on a skip."""
        old, new = (Counter(substance(units.graph, units.outside)) for units in (self.old, self.after))
        return ", ".join(f"{number} {word}" for word, number in sorted((new - old).items()))


@dataclass(frozen=True)
class Skip:
    """A skip connection: a value that goes from a unit on the left to a unit on the right.

    Args:
        source: the path of the unit on the left.
        target: the path of the unit on the right.
        channels: the number of channels of the value.
    """

    source: str
    target: str
    channels: int = field(compare=False, default=0)


class Units:
    """The units of a graph: nodes by path, in graph order, and the skips between units.

    Args:
        graph: the graph.
    """

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


def substance(graph: GraphState, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Return the operations and modules of nodes with their options, in order, without those that change no value.

    Regions of equal substance differ at most in operations that a clean-up removes: dropout, casts, divisions by one.
    """
    words = []
    for node in nodes:
        idle = (node.target in (operator.mul, operator.truediv) and 1 in node.args) or short_name(node) in IDLE
        if idle or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        word = module_words(graph, node) if node.op == "call_module" else short_name(node)
        if not word.startswith(("Dropout", "Identity")):
            words.append(word)
    return tuple(words)


class Layout:
    """The places of boxes, which it sets.

    Its `frames` are the blocks with the paths of their boxes. Its `flow` is the paths in the order of computation.

    Args:
        boxes: the boxes by path.
        up_blocks: the number of up blocks in the configuration, because the outermost may have been removed.
    """

    def __init__(self, boxes: Mapping[str, Box], up_blocks: int) -> None:
        self.boxes = boxes
        self.frames: list[tuple[str, list[str]]] = []
        blocks: dict[str, list[str]] = {}
        for path in self.boxes:
            match = BLOCK.match(path)
            if match:
                blocks.setdefault(match[0], []).append(path)
        downs = {int(b.split(".")[1]): _layer_rows(p) for b, p in blocks.items() if b.startswith("down")}
        ups = {int(b.split(".")[1]): _layer_rows(p) for b, p in blocks.items() if b.startswith("up")}
        outermost = max([*ups, up_blocks - 1])
        levels = max([*(d + 1 for d in downs), *(outermost - u + 1 for u in ups)], default=0)
        widest = max((len(r) for rows in (*downs.values(), *ups.values()) for r in rows), default=1)
        self.side = widest * (BOX_WIDTH + GAP)
        self.centre = self.side + INDENT * max(levels - 1, 0) + MIDDLE / 2
        y = 0.0
        entry = [path for path in ENDS[:1] if path in self.boxes]
        falling: list[list[str]] = []
        rising: list[list[str]] = []
        for level in range(levels):
            down, samplers = _split(downs.get(level, []))
            up = self._rising(level, ups.get(outermost - level, []))
            rows = max(len(down) + 1, len(up))
            self._sides(level, y, rows, [entry, *down], up)
            self._frame(f"down_blocks.{level}", down)
            self._frame(f"up_blocks.{outermost - level}", [[p for p in row if p not in ENDS] for row in up])
            falling, rising = [*falling, entry, *down], [*up, *rising]
            y -= ROW * rows + BAND
            entry = samplers  # they stand where the next level begins, beside the layer that takes their skip
        self._row(entry, INDENT * levels, y)
        middle = blocks.get("mid_block", [])
        self._row(middle, self.centre - (len(middle) * (BOX_WIDTH + GAP) - GAP) / 2, y - ROW * bool(entry))
        self._frame("mid_block", [middle])
        self._top()
        self.flow: list[str] = [path for row in [*falling, entry, middle, *rising] for path in row]

    def _rising(self, level: int, layers: list[list[str]]) -> list[list[str]]:
        """Return the rows of an up block, from below. The up-sampler, or the end of the U, is in the last row."""
        up, tail = _split(layers)
        if level == 0:
            tail = [*tail, *(path for path in ENDS[1:] if path in self.boxes)]
        return [*up[:-1], [*up[-1], *tail]] if up else [tail]

    def _sides(self, level: int, y: float, rows: int, down: list[list[str]], up: list[list[str]]) -> None:
        x = INDENT * level
        for i, row in enumerate(down):
            self._row(row, x, y - ROW * i)
        for i, row in enumerate(up):
            self._row(row, 2 * self.centre - x - self.side, y - ROW * (rows - 1 - i))
            if ENDS[1] in row:
                self.boxes[ENDS[1]].x += GAP  # it stands outside of the block's frame

    def _top(self) -> None:
        """Place the boxes outside of blocks, such as the embeddings, side by side above the skips."""
        rest = [b for b in self.boxes.values() if not BLOCK.match(b.path) and b.path not in ENDS]
        width = len(rest) * (WIDE + GAP) - GAP
        for i, box in enumerate(rest):
            box.x, box.y = self.centre - width / 2 + i * (WIDE + GAP), ROW * 1.35

    def _row(self, paths: list[str], x: float, y: float) -> None:
        for i, path in enumerate(paths):
            self.boxes[path].x, self.boxes[path].y = x + i * (BOX_WIDTH + GAP), y

    def _frame(self, block: str, rows: list[list[str]]) -> None:
        inside = [p for row in rows for p in row]
        if inside:
            self.frames.append((block, inside))


def _layer_rows(paths: Iterable[str]) -> list[list[str]]:
    """Return the units of a block in a row for every layer, and a last row for samplers."""
    rows: dict[int, list[str]] = {}
    for path in paths:
        _, _, index = path.rpartition(".")
        sampler = "sampler" in path
        rows.setdefault(1000 if sampler else int(index) if index.isdigit() else 0, []).append(path)
    return [sorted(rows[i], key=lambda p: ".resnets." not in p) for i in sorted(rows)]


def _split(rows: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of layers, and the samplers that follow them."""
    if rows and "sampler" in rows[-1][0]:
        return rows[:-1], rows[-1]
    return rows, []
