"""The drawing of a diagram."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .boxes import BOX_HEIGHT, BOX_WIDTH, ROW, Box
from .caption import EDGES, FILLS, GHOST, draw_legend, draw_title
from .layout import Layout
from .plan import Plan
from .units import Skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Drawing:
    """Draws a plan through matplotlib's object interface, without windows and global figures."""

    def __init__(self, plan: Plan, layout: Layout, figure: Figure) -> None:
        self.plan, self.boxes, self.figure = plan, plan.boxes, figure
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.most = max((box.share for box in self.boxes.values()), default=0.0) or 1.0
        for block, inside in layout.frames:
            self._frame(block, inside)
        self._flow(layout.flow)
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
        draw_title(self.axes, self.plan, left + 0.3, high - 0.3)
        draw_legend(self.axes, self.plan, left + 0.3, low + 0.3)


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
