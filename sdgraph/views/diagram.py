"""A UNet as a picture: the U of its blocks, and what passes have done to it."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import PathError
from ..ir.region import region_at
from ..ir.state import GraphState
from .figure import paper
from .text import cost, count, substance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ENDS = ("conv_in", "conv_out")  # where the U begins and ends
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)|mid_block")

# Sizes in inches. A row holds one layer, left the one going down, right the one going up that takes its skip.
BOX_WIDTH, BOX_HEIGHT, GAP = 1.12, 0.36, 0.16
WIDE = 1.68  # of boxes outside of the U, which show their name
ROW, BAND, INDENT, MIDDLE = 0.56, 0.42, 0.30, 2.0

FILLS = {"R": ("#e3edf8", "#9dc3e6"), "A": ("#fdebd0", "#f5b75b"), "": ("#ececec", "#bdbdbd")}
EDGES = {"kept": "#5f6b7a", "removed": "#c62828", "changed": "#7b1fa2", "inserted": "#1b7f3b"}
GHOST = "#e08a8a"


def picture(graph: GraphState, path: str | os.PathLike[str], before: GraphState | None = None) -> None:
    """Draw a UNet: going down on the left, up on the right, skip connections across.

    Each box is a layer's resnet (R), attention (A, with its number of transformer blocks) or sampler; its bar
    and figure are its share of the multiply-accumulates. In an SVG each box is an element whose id is its
    module path, and its label one whose id is the path and `:kept`, `:removed`, `:changed` or `:inserted`.

    Args:
        path: the file to write, `.svg` or `.png`.
        before: the graph before some passes, to show what they removed, changed and inserted.
    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: another suffix.
        PathError: the graph has no blocks of a UNet.
    """
    plan = _Plan(graph, before)
    with paper(path) as figure:
        _Drawing(plan, figure)


# -- what there is to draw -----------------------------------------------------------------------------------


@dataclass
class _Box:
    """One unit of the UNet, in whichever of the two graphs it is."""

    path: str
    label: str
    share: float
    state: str = "kept"
    x: float = 0.0
    y: float = 0.0

    @property
    def kind(self) -> str:
        return self.label[0] if self.label[0] in FILLS and BLOCK.match(self.path) else ""

    @property
    def width(self) -> float:
        return BOX_WIDTH if BLOCK.match(self.path) or self.path in ENDS else WIDE


@dataclass(frozen=True)
class _Skip:
    """A value that goes from a unit on the left to one on the right."""

    source: str
    target: str
    channels: int = field(compare=False, default=0)


class _Units:
    """The units of one graph: nodes by path, in graph order, and the skips between them."""

    def __init__(self, graph: GraphState) -> None:
        self.graph = graph
        self.nodes: dict[str, list[fx.Node]] = {}
        self.outside: list[fx.Node] = []
        for node in graph.fx.nodes:
            unit = _unit(node)
            if unit:
                self.nodes.setdefault(unit, []).append(node)
            else:
                self.outside.append(node)
        self.total = max(graph.macs, 1)
        self.skips = list(dict.fromkeys(self._skips()))

    def share(self, path: str) -> float:
        return sum(map(self.graph.macs_of, self.nodes[path])) / self.total

    def same(self, path: str, other: _Units) -> bool:
        classes = [units.graph.classes.get(path) for units in (self, other)]
        does = [substance(units.graph, units.nodes[path]) for units in (self, other)]
        shapes = [[p.shape for p in region_at(units.graph, path).parameters.values()] for units in (self, other)]
        return classes[0] == classes[1] and does[0] == does[1] and shapes[0] == shapes[1]

    def depth(self, path: str) -> int:
        """Number of transformer blocks in a unit."""
        stacks = (p for n in self.nodes[path] for p in n.meta.get("nn_module_stack", {}))
        return len({p for p in stacks if re.fullmatch(rf"{re.escape(path)}\.transformer_blocks\.\d+", p)})

    def _skips(self) -> Iterable[_Skip]:
        for node in self.graph.fx.nodes:
            parts = node.args[0] if node.target in (torch.cat, torch.concat) and node.args else ()
            if not _unit(node) and isinstance(parts, tuple | list) and len(parts) > 1:
                target = next((u for u in map(_unit, _descend(node)) if u), "")
                for part in parts[1:]:
                    source = _source(part) if isinstance(part, fx.Node) else ""
                    if source and target.startswith("up_blocks") and not source.startswith("up_blocks"):
                        yield _Skip(source, target, int(part.meta["val"].shape[1]))


def _unit(node: fx.Node) -> str:
    """The part of a block that a node belongs to, or the top-level module outside of the blocks."""
    stack: list[str] = list(node.meta.get("nn_module_stack", {}))
    if not stack or (len(stack) == 1 and BLOCK.fullmatch(stack[0])):
        return ""
    return stack[1] if BLOCK.fullmatch(stack[0]) else stack[0]


def _source(node: fx.Node) -> str:
    """The unit that makes a value: residuals that are added on the way are passed over."""
    while not _unit(node):
        made = [n for n in node.all_input_nodes if n.op not in ("placeholder", "get_attr")]
        if not made:
            return ""
        node = made[0]
    return _unit(node)


def _descend(node: fx.Node) -> Iterable[fx.Node]:
    while node.users:
        node = next(iter(node.users))
        yield node


class _Plan:
    """Boxes with their state and place, and skips by what became of them."""

    def __init__(self, graph: GraphState, before: GraphState | None) -> None:
        self.graph, self.before = graph, before
        self.after = _Units(graph)
        self.old = _Units(before) if before is not None else self.after
        self.boxes = {path: self._box(path) for path in self._paths()}
        if not any(BLOCK.match(path) for path in self.boxes):
            raise PathError("the graph has no down_blocks, mid_block or up_blocks to draw", hint="draw a traced UNet")
        self.skips = [(s, "kept" if s in self.old.skips else "inserted") for s in self.after.skips]
        self.skips += [(s, "removed") for s in self.old.skips if s not in self.after.skips]
        self.news = self._news()
        self.flow: list[str] = []
        self.frames: list[tuple[str, list[str]]] = []
        self._place()

    def _paths(self) -> list[str]:
        """Paths of both graphs, those of the old one first; of the top level, what has weights."""
        paths = dict.fromkeys([*self.old.nodes, *self.after.nodes])
        return [p for p in paths if BLOCK.match(p) or self._weighs(p)]

    def _weighs(self, path: str) -> bool:
        graph = self.graph if path in self.after.nodes else self.old.graph
        return bool(region_at(graph, path).parameters) and path != "conv_norm_out"

    def _box(self, path: str) -> _Box:
        state = "kept"
        if path not in self.after.nodes:
            state = "removed"
        elif path not in self.old.nodes:
            state = "inserted"
        elif self.before is not None and not self.old.same(path, self.after):
            state = "changed"
        units = self.old if state == "removed" else self.after
        return _Box(path, self._label(path, state), units.share(path), state)

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
        """New operations that are in no box, such as what a pass puts on a skip."""
        was, now = (Counter(substance(units.graph, units.outside)) for units in (self.old, self.after))
        return ", ".join(f"{many} {word}" for word, many in sorted((now - was).items()))

    # -- places ----------------------------------------------------------------------------------------------

    def _place(self) -> None:
        blocks: dict[str, list[str]] = {}
        for path in self.boxes:
            match = BLOCK.match(path)
            if match:
                blocks.setdefault(match[0], []).append(path)
        downs = {int(b.split(".")[1]): _layers(p) for b, p in blocks.items() if b.startswith("down")}
        ups = {int(b.split(".")[1]): _layers(p) for b, p in blocks.items() if b.startswith("up")}
        # the config tells how many levels there were where the outermost are gone
        outermost = max([*ups, len(self.graph.config.get("up_block_types") or ()) - 1])
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
        self.flow = [path for row in [*falling, entry, middle, *rising] for path in row]

    def _rising(self, level: int, layers: list[list[str]]) -> list[list[str]]:
        """Rows of an up block, from below; its up-sampler, or the end of the U, goes with the last layer."""
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
        """What the blocks do not hold, such as the embeddings, side by side above the skips."""
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


def _layers(paths: Iterable[str]) -> list[list[str]]:
    """The units of a block, one row per layer; samplers in a last row of their own."""
    rows: dict[int, list[str]] = {}
    for path in paths:
        _, _, index = path.rpartition(".")
        sampler = "sampler" in path
        rows.setdefault(1000 if sampler else int(index) if index.isdigit() else 0, []).append(path)
    return [sorted(rows[i], key=lambda p: ".resnets." not in p) for i in sorted(rows)]


def _split(rows: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Layers, and the samplers behind them."""
    if rows and "sampler" in rows[-1][0]:
        return rows[:-1], rows[-1]
    return rows, []


# -- drawing -------------------------------------------------------------------------------------------------


class _Drawing:
    """Puts a plan on paper, through matplotlib's object interface: no window, no global figure."""

    def __init__(self, plan: _Plan, figure: Figure) -> None:
        self.plan, self.boxes, self.figure = plan, plan.boxes, figure
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.most = max((box.share for box in self.boxes.values()), default=0.0) or 1.0
        for block, inside in plan.frames:
            self._frame(block, inside)
        self._flow()
        for skip, state in plan.skips:
            self._skip(skip, state)
        for box in self.boxes.values():
            self._box(box)
        self._fit()

    def _frame(self, block: str, inside: list[str]) -> None:
        from matplotlib.patches import FancyBboxPatch

        boxes = [self.boxes[p] for p in inside]
        gone = all(b.state == "removed" for b in boxes)
        left, right = min(b.x for b in boxes) - 0.1, max(b.x + b.width for b in boxes) + 0.1
        low, high = min(b.y for b in boxes) - 0.1, max(b.y for b in boxes) + BOX_HEIGHT + 0.1
        patch = FancyBboxPatch(
            (left, low),
            right - left,
            high - low,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor="#fdf3f3" if gone else "#f6f7f9",
            edgecolor="#e3b5b5" if gone else "#d5d9e0",
            linewidth=0.8,
            linestyle="--" if gone else "-",
            zorder=0,
        )
        patch.set_gid(block)
        self.axes.add_patch(patch)
        total = sum(b.share for b in boxes if b.state != "removed")
        ups = block.startswith("up")
        words = f"{block}  removed" if gone else f"{block}  {100 * total:.1f} %"
        x, align = (right, "right") if ups else (left, "left")
        if right - left < 2 * BOX_WIDTH:  # one column: beside the arrow that leaves or enters it
            x += -0.74 if ups else 0.74
        if block == "mid_block":
            x, align = (left + right) / 2, "center"
        y = low - 0.04
        color = EDGES["removed"] if gone else "#4a5361"
        halo = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        self.axes.text(x, y, words, fontsize=7, color=color, ha=align, va="top", bbox=halo, zorder=4)

    def _box(self, box: _Box) -> None:
        from matplotlib.patches import Rectangle

        pale, strong = FILLS[box.kind]
        gone = box.state == "removed"
        edge = EDGES[box.state]
        at = (box.x, box.y)
        outline = Rectangle(
            at,
            box.width,
            BOX_HEIGHT,
            facecolor="#ffffff" if gone else pale,
            edgecolor=edge if not gone else GHOST,
            linewidth=0.7 if box.state == "kept" else 1.1 if gone else 2.0,
            linestyle=(0, (3, 2)) if gone else "-",
            hatch="////" if gone else None,
            zorder=2,
        )
        outline.set_gid(box.path)
        self.axes.add_patch(outline)
        if not gone and box.share:
            width = box.width * box.share / self.most
            self.axes.add_patch(Rectangle(at, width, BOX_HEIGHT, facecolor=strong, linewidth=0, zorder=2.1))
            self.axes.add_patch(
                Rectangle(
                    at,
                    box.width,
                    BOX_HEIGHT,
                    fill=False,
                    edgecolor=edge,
                    linewidth=outline.get_linewidth(),
                    zorder=2.2,
                )
            )
        self._words(box, gone)

    def _words(self, box: _Box, gone: bool) -> None:
        color = EDGES["removed"] if gone else "#1c2430"
        y = box.y + BOX_HEIGHT / 2
        halo = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if gone else None
        figure = f"{100 * box.share:.1f} %" if box.share >= 0.00005 else ""
        label = self.axes.text(
            box.x + 0.07,
            y,
            box.label,
            fontsize=7.5,
            color=color,
            va="center",
            weight="bold",
            bbox=halo,
            zorder=3,
        )
        label.set_gid(f"{box.path}:{box.state}")
        self.axes.text(
            box.x + box.width - 0.07,
            y,
            figure,
            fontsize=7,
            color=color,
            ha="right",
            va="center",
            bbox=halo,
            zorder=3,
        )

    def _skip(self, skip: _Skip, state: str) -> None:
        if not {skip.source, skip.target} <= self.boxes.keys():
            return
        one, two = self.boxes[skip.source], self.boxes[skip.target]
        x, y = (one.x + one.width, two.x), (one.y + BOX_HEIGHT / 2, two.y + BOX_HEIGHT / 2)
        look = {
            "kept": {"color": "#8a94a3", "linewidth": 1.0},
            "inserted": {"color": EDGES["changed"], "linewidth": 1.3},
            "removed": {"color": GHOST, "linewidth": 0.9, "linestyle": (0, (3, 2))},
        }[state]
        self.axes.annotate(
            "",
            (x[1], y[1]),
            (x[0], y[0]),
            arrowprops={"arrowstyle": "-|>", "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0, **look},
            zorder=1,
        )
        if state == "kept":
            self.axes.text(
                x[1] - 0.18,
                y[1] + 0.02,
                str(skip.channels),
                fontsize=5.5,
                color="#8a94a3",
                ha="right",
                va="bottom",
            )

    def _flow(self) -> None:
        boxes = [self.boxes[p] for p in self.plan.flow if self.boxes[p].state != "removed"]
        for one, two in itertools.pairwise(boxes):
            self._arrow(one, two)

    def _arrow(self, one: _Box, two: _Box) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Line

        arrow = FancyArrowPatch(
            path=Line(_corners(one, two)),
            arrowstyle="-|>",
            mutation_scale=6,
            shrinkA=0,
            shrinkB=0,
            facecolor="#39424e",
            edgecolor="#39424e",
            linewidth=0.9,
            fill=True,
            zorder=1.5,
        )
        self.axes.add_patch(arrow)

    def _fit(self) -> None:
        boxes = self.boxes.values()
        left, right = min(b.x for b in boxes) - 0.4, max(b.x + b.width for b in boxes) + 0.4
        low, high = min(b.y for b in boxes) - 0.95, max(b.y for b in boxes) + BOX_HEIGHT + 1.05
        right = max(right, left + 8.2)
        self.figure.set_size_inches(right - left, high - low)
        self.axes.set_xlim(left, right)
        self.axes.set_ylim(low, high)
        self.axes.axis("off")
        self._title(left + 0.3, high - 0.3)
        self._legend(left + 0.3, low + 0.3)

    def _title(self, x: float, y: float) -> None:
        name = self.plan.graph.config.get("_class_name", "UNet2DConditionModel")
        recipe = ", ".join(map(str, self.plan.graph.passes))
        most = int((self.axes.get_xlim()[1] - x) / 0.068)
        words = recipe if len(recipe) <= most else f"{recipe[: most - 1]}…"
        self.axes.text(x, y, name, fontsize=12, weight="bold", color="#1c2430", va="center")
        self.axes.text(x, y - 0.25, self._totals(), fontsize=9.5, color="#1c2430", va="center")
        self.axes.text(x, y - 0.48, words, fontsize=8, color="#4a5361", va="center")

    def _totals(self) -> str:
        graphs = [g for g in (self.plan.before, self.plan.graph) if g is not None]
        nodes = [len(g.nodes) for g in graphs]
        weights = [sum(p.numel() for p in g.parameters().values()) for g in graphs]
        costs = [g.macs for g in graphs]
        return "    ".join(
            (
                f"{' → '.join(map(str, nodes))} nodes",
                f"{' → '.join(map(count, weights))} parameters{_change(weights)}",
                f"{' → '.join(map(cost, costs))}{_change(costs)}",
            )
        )

    def _legend(self, x: float, y: float) -> None:
        from matplotlib.patches import Rectangle

        start = x
        entries = [
            ("R resnet", FILLS["R"][1], "kept"),
            ("A ×n attention, n transformer blocks", FILLS["A"][1], "kept"),
        ]
        states = {b.state for b in self.boxes.values()}
        if any(state == "inserted" for _, state in self.plan.skips):
            entries.append(("rewired skip", "", "changed"))
        entries += [(state, "white", state) for state in ("removed", "changed", "inserted") if state in states]
        for words, fill, state in entries:
            gone = state == "removed"
            patch = Rectangle(
                (x, y if fill else y + 0.08),
                0.26,
                0.16 if fill else 0,
                facecolor=fill or "white",
                edgecolor=EDGES[state] if not gone else GHOST,
                linewidth=0.7 if state == "kept" else 1.1 if gone else 2.0,
                linestyle=(0, (3, 2)) if gone else "-",
                hatch="////" if gone else None,
            )
            patch.set_gid(f"legend:{words.split()[0]}")
            self.axes.add_patch(patch)
            self.axes.text(x + 0.33, y + 0.08, words, fontsize=7.5, color="#1c2430", va="center")
            x += 0.62 + 0.052 * len(words)
        note = "bars and figures: share of multiply-accumulates"
        self.axes.text(x, y + 0.08, note, fontsize=7.5, color="#4a5361", va="center")
        if self.plan.news:
            words = f"inserted between the boxes: {self.plan.news}"
            self.axes.text(start, y - 0.12, words, fontsize=7.5, color=EDGES["inserted"], va="center")


def _corners(one: _Box, two: _Box) -> list[tuple[float, float]]:
    """The way from a box to the next: level within a row, else down or up and across just before or after."""
    if one.y == two.y and one.x < two.x and not _crosses(one, two):
        y = one.y + BOX_HEIGHT / 2
        return [(one.x + one.width, y), (two.x, y)]
    start, end = one.x + one.width / 2, two.x + two.width / 2
    if _crosses(one, two):  # no mid block: around below both
        low = min(one.y, two.y) - 0.34
        return [(start, one.y), (start, low), (end, low), (end, two.y)]
    if one.y > two.y:
        across = two.y + BOX_HEIGHT + (ROW - BOX_HEIGHT) / 2 + 0.02
        return [(start, one.y), (start, across), (end, across), (end, two.y + BOX_HEIGHT)]
    across = one.y + BOX_HEIGHT + (ROW - BOX_HEIGHT) / 2 + 0.02
    return [(start, one.y + BOX_HEIGHT), (start, across), (end, across), (end, two.y)]


def _crosses(one: _Box, two: _Box) -> bool:
    left = one.path.startswith("down") or one.path == "conv_in"
    return left and (two.path.startswith("up") or two.path == "conv_out")


def _change(values: list[Any]) -> str:
    if len(values) < 2 or not values[0]:
        return ""
    percent = 100 * (values[1] / values[0] - 1)
    return f" ({percent:+.0f} %)".replace("-", "−")
