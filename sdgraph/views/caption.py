"""What a diagram says about itself: its title, its totals and its legend, in the colours of its boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .format import cost, count
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILLS = {"R": ("#e3edf8", "#9dc3e6"), "A": ("#fdebd0", "#f5b75b"), "": ("#ececec", "#bdbdbd")}
EDGES = {"kept": "#5f6b7a", "removed": "#c62828", "changed": "#7b1fa2", "inserted": "#1b7f3b"}
GHOST = "#e08a8a"


def draw_title(axes: Axes, plan: Plan, x: float, y: float) -> None:
    """Write the name, the totals and the passes of the graph."""
    name = plan.graph.config.get("_class_name", "UNet2DConditionModel")
    recipe = ", ".join(map(str, plan.graph.passes))
    most = int((axes.get_xlim()[1] - x) / 0.068)
    words = recipe if len(recipe) <= most else f"{recipe[: most - 1]}…"
    axes.text(x, y, name, fontsize=12, weight="bold", color="#1c2430", va="center")
    axes.text(x, y - 0.25, _totals(plan), fontsize=9.5, color="#1c2430", va="center")
    axes.text(x, y - 0.48, words, fontsize=8, color="#4a5361", va="center")


def _totals(plan: Plan) -> str:
    graphs = [g for g in (plan.before, plan.graph) if g is not None]
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


def draw_legend(axes: Axes, plan: Plan, x: float, y: float) -> None:
    """Explain the colours that the diagram uses."""
    from matplotlib.patches import Rectangle

    start = x
    entries = [
        ("R resnet", FILLS["R"][1], "kept"),
        ("A ×n attention, n transformer blocks", FILLS["A"][1], "kept"),
    ]
    states = {b.state for b in plan.boxes.values()}
    if any(state == "inserted" for _, state in plan.skips):
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
    if plan.news:
        words = f"inserted between the boxes: {plan.news}"
        axes.text(start, y - 0.12, words, fontsize=7.5, color=EDGES["inserted"], va="center")


def _change(values: list[Any]) -> str:
    if len(values) < 2 or not values[0]:
        return ""
    percent = 100 * (values[1] / values[0] - 1)
    return f" ({percent:+.0f} %)".replace("-", "−")
