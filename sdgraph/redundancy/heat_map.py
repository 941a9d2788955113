"""The heat map of an analysis: the U of a UNet, coloured by what the removal of each region changes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SpecError
from ..views.figure import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = tuple[float, float, float, float]  # the left and lower edge, the width and the height, in inches
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)|mid_block")
LAYER = re.compile(r"(?P<block>.*_blocks?(?:\.\d+)?)\.(?P<kind>resnets|attentions)\.(?P<number>\d+)")
UNIT = re.compile(r"(?P<layer>.*)\.transformer_blocks\.(?P<row>\d+)\.(?P<name>attn1|attn2|ff)")
UNITS = ("attn1", "attn2", "ff")
HEAD, ROW, SMALL, GAP = 0.26, 0.34, 0.24, 0.05  # heights in inches: of a block's name, a layer, a unit; and gaps
LAYER_WIDTH, UNIT_WIDTH, BLOCK_WIDTH, MARGIN = 0.95, 0.62, 1.5, 0.15
FIXED = "#ffffff"


def draw_heat_map(
    path: str | os.PathLike[str],
    errors: Mapping[str, float],
    saved: Mapping[str, float],
    fixed: Iterable[str],
    quantity: str,
) -> None:
    """Draw the regions of a UNet as cells of a U, coloured by error.

    Args:
        path: the file, `.svg` or `.png`.
        errors: the error of the removal of each region, by module path.
        saved: the share that it saves.
        fixed: the regions that cannot be removed alone.
        quantity: the name of what is saved.
    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: the file has another suffix, or no region is a block, a layer or a unit of a UNet.
    """
    cells = dict(_cells({*errors, *fixed}))
    if not cells:
        raise SpecError("no region lies in a block of a UNet", where="draw", hint="draw an analysis of a UNet")
    with save_figure(path) as figure:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm

        width = max(x + w for x, _, w, _ in cells.values()) + 2 * MARGIN
        low, high = min(y for _, y, _, _ in cells.values()) - 0.15, max(y + h for _, y, _, h in cells.values()) + 0.15
        tall = high - low + 0.9
        figure.set_size_inches(width, tall)
        axes = figure.add_axes((0.0, 0.9 / tall, 1.0, (high - low) / tall))
        axes.set(xlim=(-MARGIN, width - MARGIN), ylim=(low, high))
        axes.set_axis_off()
        least = min((error for error in errors.values() if error > 0), default=1.0)
        scale = ScalarMappable(LogNorm(least, max(1.001 * least, *errors.values())), "YlOrRd")
        for region, cell in cells.items():
            colour = scale.to_rgba(np.array([max(errors[region], least)]))[0] if region in errors else FIXED
            words = f"{saved[region]:.1%}" if region in saved else ""
            _draw_cell(axes, region, cell, colour, words)
        beneath = figure.add_axes((0.12, 0.55 / tall, 0.76, 0.12 / tall))
        bar = figure.colorbar(scale, cax=beneath, orientation="horizontal")
        bar.set_label(
            f"error of the output without the region; text: share of the {quantity} that this saves", fontsize=7
        )
        bar.ax.tick_params(labelsize=7)


def _cells(regions: Iterable[str]) -> Iterator[tuple[str, Cell]]:
    """Yield the cell of each region that is a block, a layer or a unit, and of each block that holds one."""
    blocks: dict[str, list[str]] = {}
    for region in regions:
        match = BLOCK.match(region)
        if match is not None:
            blocks.setdefault(match[0], []).append(region)
    inside = {block: list(_inside(block, found)) for block, found in blocks.items()}
    wide = {block: max(BLOCK_WIDTH, *(x + w for _, (x, _, w, _) in cells), 0) for block, cells in inside.items()}
    tall = {block: HEAD - min((y for _, (_, y, _, _) in cells), default=0.0) for block, cells in inside.items()}
    sides = {
        side: sorted((b for b in blocks if b.startswith(side)), key=lambda b: int(b.rpartition(".")[2]))
        for side in ("down_blocks", "up_blocks")
    }
    sides["up_blocks"].reverse()
    middle = max((wide[b] for b in sides["down_blocks"]), default=0.0) + 0.5
    y = 0.0
    places = dict[str, tuple[float, float]]()
    for level in range(max(map(len, sides.values()))):
        band = [(x, side[level]) for x, side in zip((0.0, middle), sides.values(), strict=True) if level < len(side)]
        places |= {block: (x, y) for x, block in band}
        y -= max(tall[block] for _, block in band) + 0.2
    if "mid_block" in blocks:
        places["mid_block"] = (max(0.0, middle - 0.25 - wide["mid_block"] / 2), y)
    for block, (left, top) in places.items():
        yield block, (left, top - HEAD, wide[block], HEAD)
        for region, (x, below, w, h) in inside[block]:
            yield region, (left + x, top - HEAD + below, w, h)


def _inside(block: str, regions: Iterable[str]) -> Iterator[tuple[str, Cell]]:
    """Yield the cells of the layers and units of a block, whose name ends at height 0."""
    layers: dict[int, dict[str, str]] = {}
    units: dict[int, list[tuple[int, str, str]]] = {}
    for region in regions:
        layer, unit = LAYER.fullmatch(region), UNIT.fullmatch(region)
        if layer is not None:
            layers.setdefault(int(layer["number"]), {})[layer["kind"]] = region
        elif unit is not None and (layer := LAYER.fullmatch(unit["layer"])) is not None:
            layers.setdefault(int(layer["number"]), {})
            units.setdefault(int(layer["number"]), []).append((int(unit["row"]), unit["name"], region))
    columns = [kind for kind in ("resnets", "attentions") if any(kind in found for found in layers.values())]
    y = -GAP
    for number, found in sorted(layers.items()):
        rows = max((row + 1 for row, _, _ in units.get(number, ())), default=0)
        height = max(ROW, rows * SMALL)
        for kind, region in found.items():
            yield region, (columns.index(kind) * (LAYER_WIDTH + GAP), y - height, LAYER_WIDTH, height)
        left = len(columns) * (LAYER_WIDTH + GAP)
        for row, name, region in units.get(number, ()):
            share = height / rows
            yield region, (left + UNITS.index(name) * UNIT_WIDTH, y - (row + 1) * share, UNIT_WIDTH, share)
        y -= height + GAP


def _draw_cell(axes: Axes, region: str, cell: Cell, colour: Any, words: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    x, y, width, height = cell
    patch = Rectangle((x, y), width, height, facecolor=colour, edgecolor="#5f6b7a", linewidth=0.6)
    patch.set_gid(region)
    axes.add_patch(patch)
    unit, layer, name = UNIT.fullmatch(region), LAYER.fullmatch(region), region
    if layer is not None:
        name = f"{'R' if layer['kind'] == 'resnets' else 'A'}{layer['number']}"
    elif unit is not None:
        name = unit["name"]
    red, green, blue = to_rgb(colour)
    ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#20262e"
    text = f"{name} {words}".strip()
    axes.text(x + width / 2, y + height / 2, text, fontsize=5.5 if unit else 7, color=ink, ha="center", va="center")
