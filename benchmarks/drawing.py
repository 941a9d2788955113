"""The figure of a frontier, and sheets of the worst images of each way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compared import Kept, psnrs
from margins import front
from studio import Way, file_name
from trained import sheet

from sdgraph.views.figure import save_figure

PANELS = {"psnr": "median image", "psnr_low": "worst tenth of the images"}
MARKERS = "osD^vP*Xh<>"
WORST = 10


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw PSNR against time: a line for each plain solver, and the names of the other ways that no way beats."""
    ways = {name: way for name, way in result["ways"].items() if way["kind"] != "reference"}
    times = [way["time"] for way in ways.values() if way["kind"] != "plain"]
    end = 1.1 * max(times, default=1.0)
    with save_figure(path) as figure:
        figure.set_size_inches(12, 5.6)
        panels = figure.subplots(1, 2)
        for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
            shown = {name: way for name, way in ways.items() if way[key] is not None and way["time"] <= end}
            for solver in dict.fromkeys(way["solver"] for way in shown.values() if way["kind"] == "plain"):
                points = [w for w in shown.values() if (w["kind"], w["solver"]) == ("plain", solver)]
                line = sorted((way["time"], way[key]) for way in points)
                axes.plot(*zip(*line, strict=True), ".-", label=solver, linewidth=1, markersize=4)
            kinds = dict.fromkeys(way["kind"] for way in shown.values() if way["kind"] != "plain")
            for kind, marker in zip(kinds, MARKERS, strict=False):
                points = [(way["time"], way[key]) for way in shown.values() if way["kind"] == kind]
                axes.plot(*zip(*points, strict=True), marker, label=kind, markersize=5, alpha=0.8)
            for name in front(shown, key):
                if shown[name]["kind"] != "plain":
                    at = (shown[name]["time"], shown[name][key])
                    offset = {"xytext": (-5, 2), "textcoords": "offset points", "ha": "right"}
                    axes.annotate(name, at, fontsize=6, **offset)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(f"time, in units of {next(iter(shown.values()))['unit']}", fontsize=8)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"PSNR against {result['reference']}, dB", fontsize=8)
        panels[1].legend(fontsize=7, loc="lower right")
        figure.tight_layout()


def sheets(ways: Sequence[Way], kept: Mapping[str, Kept], folder: Path) -> None:
    """Write a sheet for each way: its ten worst images, under those of the reference."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = kept[ways[0].name].images
    for way in ways[1:]:
        images = kept[way.name].images
        worst = np.argsort(psnrs(images, reference))[:WORST]
        sheet(np.concatenate([reference[worst], images[worst]]), columns=len(worst)).save(
            folder / f"{file_name(way.name)}.png"
        )
