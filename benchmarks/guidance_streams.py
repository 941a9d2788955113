"""Guidance by streams: the half of a call without the prompt computed at some calls only, on the trained model.

    python benchmarks/guidance_streams.py             # 32 held-out captions
    python benchmarks/guidance_streams.py --quick     # a smoke test

With classifier-free guidance, a prediction is cond + (scale - 1) · (cond - uncond). Here the difference is computed at
every n-th call. At the others it is the line through its last two values, damped: 0 repeats the last value, 1 is the
line. Each such way is compared with the solver, DPM-Solver++ 2M Karras, with fewer steps in the same time, and damped
forecasts of features are beside it. Time is counted in predictions for one sample, of which a plain call has two; a
call that inherits features counts by its multiply-accumulates. PSNR compares images with those of many steps. The
margin of a way is by how much its median is above that of the plain solver, on the line between numbers of steps.

The script writes JSON after every batch of captions, with the number of those that are complete.

Result (`results/guidance-streams/`, of the first eight captions): a thinned difference is better than the plain solver
in the same time at guidance 1.5 only. At 3 the best of it is as good, and from 5 on all of it is worse. So the library
has none of it. It would need to be told which part of a batch is which, for calls of one part are another batch and
another generation; a timetable for each part; and the guidance scale, which only the pipeline knows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from scenes.pipeline import load  # noqa: E402
from scenes.quality import held_out_captions  # noqa: E402

import sdgraph  # noqa: E402
from sdgraph.evaluation import metrics  # noqa: E402
from sdgraph.forecasts import Polynomial, weighted  # noqa: E402
from sdgraph.passes import InheritFeatures  # noqa: E402
from sdgraph.schedules import SamplingRun  # noqa: E402

SCALES = (1.5, 3.0, 5.0, 7.5, 9.0)
CONVERGED, PLAIN = 60, (10, 13, 15, 20)  # steps
THINNED = ((20, 2, 0.0), (20, 2, 0.5), (20, 2, 1.0), (20, 3, 0.5), (25, 2, 0.5), (25, 3, 0.5))  # steps, every, damping
DAMPED = (20, 25)  # steps, at every second of which features are forecast


@dataclass(frozen=True)
class Way:
    """A way of generating images.

    Args:
        cost: whole calls of the UNet with guidance that take as long.
        images: returns images (N, H, W, C) of prompts, by their guidance scale and seeds.
    """

    cost: float
    images: Callable[[list[str], float, range], Any]


def thinned(pipe: Any, steps: int, every: int, damping: float, prompts: list[str], scale: float, seeds: range) -> Any:
    """Generate with the difference between predictions with and without the prompt computed at every n-th call."""
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    forecast, run, known = Polynomial(1, damping), SamplingRun.of(scheduler), list[tuple[int, Tensor]]()
    text, empty = pipe.encode_prompt(prompts, "cpu", 1, True)
    size = (1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    noise = torch.cat([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents = noise * scheduler.init_noise_sigma
    for number, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, timestep)
        if number % every == 0:
            uncond, cond = pipe.unet(torch.cat([sample] * 2), timestep, torch.cat([empty, text])).sample.chunk(2)
            known = [*known, (number, cond - uncond)][-2:]
            difference = cond - uncond
        else:
            cond = pipe.unet(sample, timestep, text).sample
            weights = forecast.weights([at for at, _ in known], number, run)
            difference = weighted([value for _, value in known], weights)
        latents = scheduler.step(cond + (scale - 1) * difference, timestep, latents).prev_sample
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(images, output_type="np")


def generated(pipe: Any, unet: Any, steps: int, prompts: list[str], scale: float, seeds: range) -> Any:
    """Generate by the pipeline, with a UNet that inherits features."""
    own, pipe.unet = pipe.unet, unet
    try:
        with sdgraph.attach(pipe):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            options = {"num_inference_steps": steps, "generator": generators, "output_type": "np"}
            return pipe(prompts, guidance_scale=scale, **options).images
    finally:
        pipe.unet = own


def ways(pipe: Any, quick: bool) -> Iterator[tuple[str, Way]]:
    """Yield the ways by name, the reference first."""
    source = sdgraph.apply(pipe.unet, (), verify=False)
    for steps in (8, 4) if quick else (CONVERGED, *PLAIN):
        yield f"{steps} steps", Way(steps, partial(thinned, pipe, steps, 1, 0.0))
    for steps, every, damping in ((5, 2, 0.5),) if quick else THINNED:
        name = f"{steps} steps, difference at every {every}., damping {damping:g}"
        yield name, Way((steps + -(-steps // every)) / 2, partial(thinned, pipe, steps, every, damping))
    for steps in (5,) if quick else DAMPED:
        unet = sdgraph.apply(source, InheritFeatures.damped(2), verify=False)
        cost = unet.graph.timetable(steps).macs / source.graph.macs
        yield f"{steps} steps, damped features", Way(cost, partial(generated, pipe, unet, steps))


def report(psnrs: Mapping[str, list[float]], costs: Mapping[str, float], plain: list[str]) -> dict[str, Any]:
    """Return the figures of one guidance scale, by way."""
    median, low = ({name: float(np.percentile(v, at)) for name, v in psnrs.items()} for at in (50, 10))
    figures: dict[str, Any] = {}
    for name, cost in costs.items():
        figures[name] = {"cost": cost, "psnr": median[name], "psnr_low": low[name]}
        if name not in plain:
            for key, of in (("margin", median), ("margin_low", low)):
                equal = np.interp(cost, [costs[n] for n in plain], [of[n] for n in plain])
                figures[name][key] = of[name] - float(equal)
    return figures


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="smoke test with few images and steps")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    images, scales = (4, SCALES[1:2]) if args.quick else (args.images, SCALES)
    compared = dict(ways(pipe, args.quick))
    reference, *others = compared
    plain = [name for name in others if name.endswith(" steps")]
    costs = {name: compared[name].cost for name in others}
    psnrs: dict[float, dict[str, list[float]]] = {scale: {name: [] for name in others} for scale in scales}
    at = measure.circumstances("cpu")
    folder = ROOT / ("out/bench" if args.quick else "benchmarks/results") / "guidance-streams"
    out = args.out or folder / f"{at['date'][:10]}-cpu-float32.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    _, prompts = held_out_captions(images)
    began = time.process_time()
    for first in tqdm(range(0, images, args.batch), desc="captions", unit="batch"):
        seeds = range(first, min(first + args.batch, images))
        some = [prompts[i] for i in seeds]
        for scale in tqdm(scales, desc="guidance", leave=False):
            aim = compared[reference].images(some, scale, seeds)
            for name in others:
                made = compared[name].images(some, scale, seeds)
                psnrs[scale][name] += [metrics.psnr(a, b) for a, b in zip(aim, made, strict=True)]
        figures = {str(scale): report(psnrs[scale], costs, plain) for scale in scales}
        settings = {"images": seeds.stop, "reference": reference, "solver": "DPM-Solver++ 2M Karras"}
        result = {**at, **settings, "cpu_seconds": time.process_time() - began, "scales": figures}
        out.write_text(json.dumps(result, indent=1) + "\n")
    for scale, of_scale in figures.items():
        print(f"\nguidance {scale}, {images} captions: PSNR and margin, median and worst tenth, in dB")
        for name, row in sorted(of_scale.items(), key=lambda item: item[1]["cost"]):
            margin = f"{row['margin']:+6.1f} {row['margin_low']:+6.1f}" if "margin" in row else ""
            print(f"  {row['cost']:5.1f} calls  {row['psnr']:5.1f} {row['psnr_low']:5.1f}  {margin}  {name}")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
