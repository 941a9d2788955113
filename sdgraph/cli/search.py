"""Find a schedule for feature inheritance.

  sdgraph search stable-diffusion-v1-5/stable-diffusion-v1-5 "InheritFeatures.deep_cache()" \\
      --prompts prompts.txt --budget 0.4

It says at which calls of a generation features are computed anew, so that it costs the least quality within a
budget. Each CANDIDATE is an InheritFeatures pass whose schedule is replaced by the one that is found. To extrapolate:
"InheritFeatures('up_blocks.-1.resnets.-1', part='entry', forecast=1)". Measurements are kept in --folder: a stopped
search goes on there, and another budget costs one generation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..calibration.search import search
from ..compiler.parse import parse
from .arguments import DTYPES, device, imports, positive, write_json, writes
from .sources import load_pipeline, read_prompts


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a diffusers pipeline, or its name on the hub")
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE", help="a pass; several lie beside each other")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="text file, one prompt per line; 16 to 32 of them"
    )
    parser.add_argument(
        "--budget",
        type=float,
        required=True,
        metavar="SHARE",
        help="most multiply-accumulates, of 1",
    )
    parser.add_argument("--steps", type=positive, default=50, help="of the scheduler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument(
        "--reach", type=positive, default=10, help="most calls between refreshes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the latents (default: %(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/search"), metavar="DIR", help="of measurements (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON: the passes, their timetable and errors")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="SVG or PNG: calls against sites")
    writes(parser, "out", "picture")
    imports(parser)


def run(chosen: argparse.Namespace) -> None:
    candidates = parse(", ".join(chosen.candidates))
    prompts = read_prompts(chosen.prompts)
    pipe = load_pipeline(chosen.pipeline, chosen.dtype, chosen.device)
    guidance = {} if chosen.guidance is None else {"guidance_scale": chosen.guidance}
    found = search(
        pipe, candidates, prompts, budget=chosen.budget, seed=chosen.seed, reach=chosen.reach, folder=chosen.folder,
        num_inference_steps=chosen.steps, **guidance,
    )  # fmt: skip
    print(found)
    if chosen.out is not None:
        write_json(chosen.out, found.as_dict())
    if chosen.picture is not None:
        chosen.picture.parent.mkdir(parents=True, exist_ok=True)
        found.timetable.picture(chosen.picture)
