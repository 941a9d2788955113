"""Plots of results: PSNR against time, learning curves, and sheets of the worst images of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.scenes.quality import sheet
from sdgraph.views.figure import save_figure

from . import mixes as measured_mixes
from .comparison import MethodImages, psnrs
from .generator import Method, file_name
from .pareto import front

PANELS = {"psnr": "median image", "psnr_low": "10th percentile of the images"}
LEARNED = {"shape and colour": "share of captions shown right", "psnr": "PSNR to the teacher's images, dB"}
MARKERS = "osD^vP*Xh<>"
WORST = 10


def frontier(result: Mapping[str, Any], path: Path) -> None:
    """Draw PSNR against time: a line for each plain solver, and the names of the other Pareto-optimal methods."""
    methods = {name: method for name, method in result["methods"].items() if method["kind"] != "reference"}
    times = [method["time"] for method in methods.values() if method["kind"] != "plain"]
    end = 1.1 * max(times, default=1.0)
    with save_figure(path) as figure:
        figure.set_size_inches(12, 5.6)
        panels = figure.subplots(1, 2)
        for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
            shown = {name: method for name, method in methods.items() if method[key] is not None}
            shown = {name: method for name, method in shown.items() if method["time"] <= end}
            for solver in dict.fromkeys(method["solver"] for method in shown.values() if method["kind"] == "plain"):
                points = [m for m in shown.values() if (m["kind"], m["solver"]) == ("plain", solver)]
                line = sorted((method["time"], method[key]) for method in points)
                axes.plot(*zip(*line, strict=True), ".-", label=solver, linewidth=1, markersize=4)
            kinds = dict.fromkeys(method["kind"] for method in shown.values() if method["kind"] != "plain")
            for kind, marker in zip(kinds, MARKERS, strict=False):
                points = [(method["time"], method[key]) for method in shown.values() if method["kind"] == kind]
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


def mixes(result: Mapping[str, Any], path: Path) -> None:
    """Draw quality against time of the mixes of UNets and of their parts, with both Pareto fronts."""
    methods = measured_mixes.timed(result)
    kinds = dict.fromkeys(method["kind"] for method in methods.values())
    with save_figure(path) as figure:
        figure.set_size_inches(12, 5)
        for axes, (key, title) in zip(figure.subplots(1, 2), LEARNED.items(), strict=True):
            for kind, marker in zip(kinds, MARKERS, strict=False):
                points = [(m["time"], measured_mixes.quality(m, key)) for m in methods.values() if m["kind"] == kind]
                axes.plot(*zip(*points, strict=True), marker, label=kind, markersize=4, alpha=0.8)
            best = [methods[name] for name in measured_mixes.front(methods, key)]
            line = [(method["time"], measured_mixes.quality(method, key)) for method in best]
            axes.step(*zip(*line, strict=True), "k-", where="post", linewidth=0.7, label="Pareto front")
            axes.set(xlabel="time, in calls of the teacher", title=title)
            axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower right")
        figure.tight_layout()


def learning_curves(curves: Mapping[str, Mapping[int, Mapping[str, Any]]], path: Path) -> None:
    """Draw a line for each UNet of `tables.curves`."""
    with save_figure(path) as figure:
        figure.set_size_inches(9, 3.8)
        panels = figure.subplots(1, len(LEARNED))
        for axes, (key, title) in zip(panels, LEARNED.items(), strict=True):
            for name, points in curves.items():
                axes.plot(list(points), [point[key] for point in points.values()], ".-", label=name)
            ticks = sorted({steps for points in curves.values() for steps in points})
            axes.set(xscale="log", xlabel="optimizer steps", title=title)
            axes.set_xticks(ticks, [str(steps) for steps in ticks], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[-1].legend(fontsize=7, loc="lower right")
        figure.tight_layout()


def predictions(result: Mapping[str, Any], path: Path) -> None:
    """Draw predicted against measured time and error of the sets of `pruning.py`."""
    sets = [method for method in result["methods"].values() if "tuned" in method]
    with save_figure(path) as figure:
        figure.set_size_inches(9, 4)
        for axes, name in zip(figure.subplots(1, 2), ("time", "error"), strict=True):
            ends = list[float]()
            for kind, marker in zip(dict.fromkeys(method["kind"] for method in sets), MARKERS, strict=False):
                points = [(_predicted(method, name), method[name]) for method in sets if method["kind"] == kind]
                axes.plot(*zip(*points, strict=True), marker, label=kind, markersize=5, alpha=0.8)
                ends += [value for point in points for value in point]
            axes.plot([min(ends), max(ends)], [min(ends), max(ends)], "k-", linewidth=0.5)
            axes.set(xlabel=f"predicted {name}", ylabel=f"measured {name}")
            if name == "error":
                axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        figure.tight_layout()


def _predicted(method: Mapping[str, Any], name: str) -> float:
    found = method["predicted"]["time"] if name == "time" else method["scores"]["output error, pairs"]
    return float(found)


def worst_images(methods: Sequence[Method], made: Mapping[str, MethodImages], folder: Path) -> None:
    """Write a sheet for each method: its ten worst images, under those of the reference."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = made[methods[0].name].images
    for method in methods[1:]:
        images = made[method.name].images
        worst = np.argsort(psnrs(images, reference))[:WORST]
        sheet(np.concatenate([reference[worst], images[worst]]), columns=len(worst)).save(
            folder / f"{file_name(method.name)}.png"
        )
