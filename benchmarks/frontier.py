"""Quality against time: of the small trained Stable Diffusion, for the ways of making images of `ways.py`.

    python benchmarks/frontier.py inheritance           # feature inheritance, and fewer steps
    python benchmarks/frontier.py attention             # global-regional attention, and token merging
    python benchmarks/frontier.py inheritance --quick   # a smoke test
    python benchmarks/frontier.py inheritance --device cuda --dtype float16 --images 256

Every way of making images gets the same prompts and seeds, and all ways take turns, batch by batch. PSNR is against
the image of all steps, so it asks for the same image; a few tip over into another one, so it is the median image's. The
attributes ask whether the image is what the prompt says. Schedules are searched on other prompts than those that are
measured. Writes JSON, a table and a plot.
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
from sdgraph.evaluation import metrics as similarity  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def measured(pipe: Any, found: Mapping[str, Way], images: int, batch: int, device: str) -> dict[str, dict[str, Any]]:
    """Figures of each way."""
    _, prompts = held_out_captions(images)
    made: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in found}
    seconds: dict[str, list[float]] = {name: [] for name in found}

    def run(way: Way, first: int, into: list[np.ndarray[Any, Any]]) -> None:
        pipe.unet = way.unet
        part = range(first, min(first + batch, images))
        generators = [torch.Generator().manual_seed(i) for i in part]
        inheriting = isinstance(way.unet, sdgraph.GraphUNet)
        with sdgraph.attach(pipe) if inheriting else contextlib.nullcontext():
            found = pipe(
                [prompts[i] for i in part], generator=generators, num_inference_steps=way.steps, output_type="np"
            )
        into.append(found.images)

    order = list(found)
    for name in tqdm(order, desc="warming up"):
        run(replace(found[name], steps=min(3, found[name].steps)) if not found[name].passes else found[name], 0, [])
    for first in tqdm(range(0, images, batch), desc="images", unit="batch"):
        for name in order:
            into: list[np.ndarray[Any, Any]] = made[name]
            seconds[name].append(measure.timed(partial(run, found[name], first, into), device))
        order.reverse()
    quality = Quality()
    reference = np.concatenate(made["all steps"])
    figures: dict[str, dict[str, Any]] = {}
    for name, way in found.items():
        pictures = np.concatenate(made[name])
        ratios = [mine / all_ for mine, all_ in zip(seconds[name], seconds["all steps"], strict=True)]
        each = [similarity.psnr(one, other) for one, other in zip(reference, pictures, strict=True)]
        low, middle = np.percentile(each, [10, 50], method="lower")  # infinite where an image is the same
        figures[name] = {
            "kind": way.kind,
            "passes": way.passes,
            "steps": way.steps,
            "macs": way.macs,
            "time": statistics.median(ratios),
            "seconds": seconds[name],
            "psnr": float(middle) if np.isfinite(middle) else None,
            "psnr_low": float(low) if np.isfinite(low) else None,
            **quality(pictures, prompts),
        }
    return figures


def plot(result: Mapping[str, Any], path: Path) -> None:
    """PSNR and Fréchet distance against time."""
    from sdgraph.views.figure import paper

    kinds = dict.fromkeys(each["kind"] for each in result["ways"].values())
    with paper(path) as figure:
        figure.set_size_inches(10, 4.2)
        for axes, key, label in zip(
            figure.subplots(1, 2), ("psnr", "frechet"), ("PSNR against all steps, dB", "Fréchet distance"), strict=True
        ):
            for kind in kinds:
                points = sorted(
                    (each["time"], each[key])
                    for each in result["ways"].values()
                    if each["kind"] == kind and each[key] is not None
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
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "search", help="where searches are kept")
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it")
    chosen = parser.parse_args()
    pipe = load().to(chosen.device, getattr(torch, chosen.dtype))
    pipe.set_progress_bar_config(disable=True)
    images, batch = (4, 2) if chosen.quick else (chosen.images, chosen.batch)
    ways = KINDS[chosen.kind](pipe, chosen.quick, chosen.folder)
    figures = measured(pipe, ways, images, batch, chosen.device)
    settings = {"dtype": chosen.dtype, "images": images, "batch": batch, "steps": ways.steps, "quick": chosen.quick}
    result = {**measure.circumstances(chosen.device), **settings, "ways": figures}
    name = f"{result['date'][:10]}-{torch.device(chosen.device).type}-{chosen.dtype}-{chosen.kind}.json"
    out = chosen.out or (ROOT / "out" / "bench" if chosen.quick else RESULTS) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out.with_suffix(".svg"))
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
