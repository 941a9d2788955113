"""Quality against time of the small trained Stable Diffusion, for the ways of generating images of `ways.py`.

    python benchmarks/frontier.py inheritance           # feature inheritance, and fewer steps
    python benchmarks/frontier.py plans                 # damped forecasts at 20 to 40 steps of DPM-Solver++ 2M Karras
    python benchmarks/frontier.py attention             # global-regional attention, and token merging
    python benchmarks/frontier.py inheritance --quick   # a smoke test
    python benchmarks/frontier.py inheritance --device cuda --dtype float16 --images 256

All ways get the same prompts and seeds, and take turns batch by batch. PSNR compares an image with that of all steps. A
few images turn into different ones, so the figure is that of the median image. The attributes measure whether an image
shows what the prompt says. Schedules are searched on other prompts than the measured ones. The script writes JSON, a
table and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from table import report
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from scenes.pipeline import load  # noqa: E402
from scenes.quality import Quality, held_out_captions  # noqa: E402
from ways import KINDS, Way  # noqa: E402

import sdgraph  # noqa: E402
from sdgraph.evaluation import metrics  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def measured(pipe: Any, ways: Mapping[str, Way], images: int, batch: int, device: str) -> dict[str, dict[str, Any]]:
    """Generate images by all ways in turns, and return their figures by the name of the way.

    Args:
        pipe: the pipeline, whose UNet is exchanged.
        ways: the ways by name, "all steps" among them.
        images: the number of images of each way.
        batch: the number of images per call.
        device: the device that is timed.
    """
    _, prompts = held_out_captions(images)
    generated: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}

    scheduler = pipe.scheduler

    def run(way: Way, first: int, results: list[np.ndarray[Any, Any]]) -> None:
        pipe.unet, pipe.scheduler = way.unet, way.scheduler or scheduler
        part = range(first, min(first + batch, images))
        generators = [torch.Generator().manual_seed(i) for i in part]
        inheriting = isinstance(way.unet, sdgraph.GraphUNet)
        with sdgraph.attach(pipe) if inheriting else contextlib.nullcontext():
            output = pipe(
                [prompts[i] for i in part], generator=generators, num_inference_steps=way.steps, output_type="np"
            )
        results.append(output.images)

    order = list(ways)
    for name in tqdm(order, desc="warming up"):
        way = ways[name]
        run(way if way.passes else replace(way, steps=min(3, way.steps)), 0, [])
    for first in tqdm(range(0, images, batch), desc="images", unit="batch"):
        for name in order:
            seconds[name].append(measure.timed(partial(run, ways[name], first, generated[name]), device))
        order.reverse()
    quality = Quality()
    reference = np.concatenate(generated["all steps"])
    figures: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        results = np.concatenate(generated[name])
        ratios = [own / whole for own, whole in zip(seconds[name], seconds["all steps"], strict=True)]
        psnrs = [metrics.psnr(image, other) for image, other in zip(reference, results, strict=True)]
        low, median = np.percentile(psnrs, [10, 50], method="lower")  # infinite where the images are equal
        figures[name] = {
            "kind": way.kind,
            "passes": way.passes,
            "steps": way.steps,
            "macs": way.macs,
            "time": statistics.median(ratios),
            "seconds": seconds[name],
            "psnr": float(median) if np.isfinite(median) else None,
            "psnr_low": float(low) if np.isfinite(low) else None,
            **quality(results, prompts),
        }
    return figures


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot PSNR and Fréchet distance against time."""
    from sdgraph.views.figure import paper

    kinds = dict.fromkeys(way["kind"] for way in result["ways"].values())
    with paper(path) as figure:
        figure.set_size_inches(10, 4.2)
        for axes, key, label in zip(
            figure.subplots(1, 2), ("psnr", "frechet"), ("PSNR against all steps, dB", "Fréchet distance"), strict=True
        ):
            for kind in kinds:
                points = sorted(
                    (way["time"], way[key])
                    for way in result["ways"].values()
                    if way["kind"] == kind and way[key] is not None
                )
                axes.plot(*zip(*points, strict=True), "o-" if kind == "fewer steps" else "o", label=kind, markersize=4)
            axes.set_xlabel("time, as a share of all steps")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        axes.set_yscale("log")
        axes.legend(fontsize=8)
        figure.tight_layout()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="ways to compare")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="smoke test with few images and steps")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "search", help="folder to keep measurements of searches in"
    )
    parser.add_argument("--out", type=Path, help="JSON file; the plot is written beside it")
    args = parser.parse_args()
    pipe = load().to(args.device, getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    images, batch = (4, 2) if args.quick else (args.images, args.batch)
    ways = KINDS[args.kind](pipe, args.quick, args.folder)
    figures = measured(pipe, ways, images, batch, args.device)
    settings = {"dtype": args.dtype, "images": images, "batch": batch, "steps": ways.steps, "quick": args.quick}
    settings["solver"] = "DDIM" if args.kind != "plans" else "DPM-Solver++ 2M Karras"
    result = {**measure.circumstances(args.device), **settings, "ways": figures}
    name = f"{result['date'][:10]}-{torch.device(args.device).type}-{args.dtype}-{args.kind}.json"
    out = args.out or (ROOT / "out" / "bench" if args.quick else RESULTS) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out.with_suffix(".svg"))
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
