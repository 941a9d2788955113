"""Draws what students of the small trained Stable Diffusion have learned after few and many optimizer steps.

    python benchmarks/tuning.py --presets base --ways ours chain --steps 200    # a file for that number of steps
    cd benchmarks/results/tuning
    python ../../learning_curves.py cpu-float32-{200,800}-steps.json            # the ways that both files have

A point is a run of its own, whose learning rate falls to zero at its end. The script writes a figure and a table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import markdown
from trained import ROOT

from sdgraph.views.figure import save_figure

PANELS = {"shape and colour": "share of captions shown right", "psnr": "PSNR to the teacher's images, dB"}
MARKED = re.compile("<!-- curves -->.*?<!-- end of curves -->", re.DOTALL)
FIGURE = ROOT / "benchmarks" / "results" / "tuning" / "learning-curves.svg"


def curves(results: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the figures at the first point by way and by steps, of ways that several results have.

    Raises:
        SystemExit: the results were measured on different captions or with different solvers.
    """
    settings = {(result["captions"], result["sampling"], result["scenes"], result["batch"]) for result in results}
    if len(settings) > 1:
        raise SystemExit(f"the files were measured in different ways, {sorted(settings)}: name those of one study")
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: int(result["steps"])):
        for name, way in result["ways"].items():
            if "losses" in way and "untuned" not in name:
                found.setdefault(name, {})[result["steps"]] = way["points"][0]
    return {name: points for name, points in found.items() if len(points) > 1}


def draw(found: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw a line for each way."""
    with save_figure(path) as figure:
        figure.set_size_inches(9, 3.8)
        panels = figure.subplots(1, len(PANELS))
        for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
            for name, points in found.items():
                axes.plot(list(points), [point[key] for point in points.values()], ".-", label=name)
            ticks = sorted({steps for points in found.values() for steps in points})
            axes.set(xscale="log", xlabel="optimizer steps", title=title)
            axes.set_xticks(ticks, [str(steps) for steps in ticks], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[-1].legend(fontsize=7, loc="lower right")
        figure.tight_layout()


def table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return the figures as Markdown."""
    columns = sorted({steps for points in found.values() for steps in points})
    rows = [("UNet", *(f"{steps} steps" for steps in columns))]
    for name, points in found.items():
        cells = (points.get(steps) for steps in columns)
        rows.append((name, *(f"{100 * p['shape and colour']:.1f} %, {p['psnr']:.1f} dB" if p else "-" for p in cells)))
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of tuning.py")
    parser.add_argument("--out", type=Path, default=FIGURE, help="figure, .svg or .png")
    parser.add_argument("--into", type=Path, help="document whose marked table is replaced")
    chosen = parser.parse_args()
    found = curves([json.loads(file.read_text()) for file in chosen.results])
    if not found:
        raise SystemExit("no way is in two of the files: train it with another number of steps as well")
    draw(found, chosen.out)
    if chosen.into is not None:
        text = f"<!-- curves -->\n{table(found)}\n<!-- end of curves -->"
        document, count = MARKED.subn(lambda _: text, chosen.into.read_text())
        if not count:
            raise SystemExit(f"{chosen.into} has no table between <!-- curves --> and <!-- end of curves -->")
        chosen.into.write_text(document)
    print(f"{table(found)}\n\ndrawn in {chosen.out}")


if __name__ == "__main__":
    main()
