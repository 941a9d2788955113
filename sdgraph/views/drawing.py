"""The drawing of a diagram: the U of a UNet's blocks, the effect of passes, a title and a legend."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from ..ir.state import GraphState
from .diagram import BOX_HEIGHT, BOX_WIDTH, ROW, Box, Diagram, Layout, Skip
from .figure import save_figure
from .format import format_count, format_macs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILLS = {"R": ("#e3edf8", "#9dc3e6"), "A": ("#fdebd0", "#f5b75b"), "": ("#ececec", "#bdbdbd")}
EDGES = {"kept": "#5f6b7a", "removed": "#c62828", "changed": "#7b1fa2", "inserted": "#1b7f3b"}
GHOST = "#e08a8a"


def draw_graph(graph: GraphState, path: str | os.PathLike[str], before: GraphState | None = None) -> None:
    """Draw a UNet: down blocks on the left, up blocks on the right, skip connections across.

    A box is a layer's resnet (R), attention (A, with the number of transformer blocks) or sampler. Its bar and figure
    are its share of the multiply-accumulates. In an SVG the id of a box is its module path, and the id of its label is
    the path with `:kept`, `:removed`, `:changed` or `:inserted`.

    Args:
        graph: the graph to draw.
        path: the file to write, `.svg` or `.png`.
        before: the graph before some passes, whose effect is shown.
    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: the file has another suffix.
        PathError: the graph has no blocks of a UNet.
    """
    diagram = Diagram(graph, before)
    layout = Layout(diagram.boxes, up_blocks=len(graph.config.get("up_block_types") or ()))
    with save_figure(path) as figure:
        Drawing(diagram, layout, figure)


class Drawing:
    """Draws a diagram through matplotlib's object interface, without windows and global figures."""

    def __init__(self, diagram: Diagram, layout: Layout, figure: Figure) -> None:
        self.diagram, self.boxes, self.figure = diagram, diagram.boxes, figure
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.most = max((box.share for box in self.boxes.values()), default=0.0) or 1.0
        for block, inside in layout.frames:
            self._frame(block, inside)
        self._flow(layout.flow)
        for skip, state in diagram.skips:
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

    def _box(self, box: Box) -> None:
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

    def _words(self, box: Box, gone: bool) -> None:
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

    def _skip(self, skip: Skip, state: str) -> None:
        if not {skip.source, skip.target} <= self.boxes.keys():
            return
        start, end = self.boxes[skip.source], self.boxes[skip.target]
        x, y = (start.x + start.width, end.x), (start.y + BOX_HEIGHT / 2, end.y + BOX_HEIGHT / 2)
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

    def _flow(self, flow: list[str]) -> None:
        boxes = [self.boxes[p] for p in flow if self.boxes[p].state != "removed"]
        for box, following in itertools.pairwise(boxes):
            self._arrow(box, following)

    def _arrow(self, box: Box, following: Box) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Line

        arrow = FancyArrowPatch(
            path=Line(_corners(box, following)),
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
        draw_title(self.axes, self.diagram, left + 0.3, high - 0.3)
        draw_legend(self.axes, self.diagram, left + 0.3, low + 0.3)


def _corners(box: Box, following: Box) -> list[tuple[float, float]]:
    """Return the corners of the arrow between boxes: level within a row, otherwise up or down and across."""
    if box.y == following.y and box.x < following.x and not _crosses(box, following):
        y = box.y + BOX_HEIGHT / 2
        return [(box.x + box.width, y), (following.x, y)]
    start, end = box.x + box.width / 2, following.x + following.width / 2
    if _crosses(box, following):  # no mid block: around below both
        low = min(box.y, following.y) - 0.34
        return [(start, box.y), (start, low), (end, low), (end, following.y)]
    if box.y > following.y:
        across = following.y + BOX_HEIGHT + (ROW - BOX_HEIGHT) / 2 + 0.02
        return [(start, box.y), (start, across), (end, across), (end, following.y + BOX_HEIGHT)]
    across = box.y + BOX_HEIGHT + (ROW - BOX_HEIGHT) / 2 + 0.02
    return [(start, box.y + BOX_HEIGHT), (start, across), (end, across), (end, following.y)]


def _crosses(box: Box, following: Box) -> bool:
    left = box.path.startswith("down") or box.path == "conv_in"
    return left and (following.path.startswith("up") or following.path == "conv_out")


def draw_title(axes: Axes, diagram: Diagram, x: float, y: float) -> None:
    """Write the name, the totals and the passes of the graph."""
    name = diagram.graph.config.get("_class_name", "UNet2DConditionModel")
    recipe = ", ".join(map(str, diagram.graph.passes))
    most = int((axes.get_xlim()[1] - x) / 0.068)
    words = recipe if len(recipe) <= most else f"{recipe[: most - 1]}…"
    axes.text(x, y, name, fontsize=12, weight="bold", color="#1c2430", va="center")
    axes.text(x, y - 0.25, _totals(diagram), fontsize=9.5, color="#1c2430", va="center")
    axes.text(x, y - 0.48, words, fontsize=8, color="#4a5361", va="center")


def _totals(diagram: Diagram) -> str:
    graphs = [g for g in (diagram.before, diagram.graph) if g is not None]
    nodes = [len(g.nodes) for g in graphs]
    weights = [sum(p.numel() for p in g.parameters().values()) for g in graphs]
    costs = [g.macs for g in graphs]
    return "    ".join(
        (
            f"{' → '.join(map(str, nodes))} nodes",
            f"{' → '.join(map(format_count, weights))} parameters{_change(weights)}",
            f"{' → '.join(map(format_macs, costs))}{_change(costs)}",
        )
    )


def draw_legend(axes: Axes, diagram: Diagram, x: float, y: float) -> None:
    """Explain the colours that the diagram uses."""
    from matplotlib.patches import Rectangle

    start = x
    entries = [
        ("R resnet", FILLS["R"][1], "kept"),
        ("A ×n attention, n transformer blocks", FILLS["A"][1], "kept"),
    ]
    states = {b.state for b in diagram.boxes.values()}
    if any(state == "inserted" for _, state in diagram.skips):
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
        axes.add_patch(patch)
        axes.text(x + 0.33, y + 0.08, words, fontsize=7.5, color="#1c2430", va="center")
        x += 0.62 + 0.052 * len(words)
    note = "bars and figures: share of multiply-accumulates"
    axes.text(x, y + 0.08, note, fontsize=7.5, color="#4a5361", va="center")
    if diagram.inserted:
        words = f"inserted between the boxes: {diagram.inserted}"
        axes.text(start, y - 0.12, words, fontsize=7.5, color=EDGES["inserted"], va="center")


def _change(values: list[Any]) -> str:
    if len(values) < 2 or not values[0]:
        return ""
    percent = 100 * (values[1] / values[0] - 1)
    return f" ({percent:+.0f} %)".replace("-", "−")
