"""Search for a schedule of feature inheritance.

  sdgraph search stable-diffusion-v1-5/stable-diffusion-v1-5 "InheritFeatures.deep_cache()" \\
      --prompts prompts.txt --budget 0.4

The search decides at which calls of a generation the features are refreshed, so that the images lose as little as
possible within a budget of multiply-accumulates. Each CANDIDATE is an InheritFeatures pass; the search replaces its
schedule. Use 16 to 32 prompts. A candidate that forecasts its features is
"InheritFeatures('up_blocks.-1.resnets.-1', part='entry', forecast=1)". Measurements are kept in --folder, so that an
interrupted search resumes, and a search for another budget takes one generation only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..calibration.search import search
from ..compiler.parse import parse
from .arguments import add_generation, add_imports, add_overwrite, add_pipeline, positive, write_json
from .sources import load_pipeline, read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "candidates", nargs="+", metavar="CANDIDATE", help="an InheritFeatures pass; several are applied together"
    )
    add_generation(parser)
    parser.add_argument(
        "--budget", type=float, required=True, metavar="SHARE",
        help="largest share, above 0 and at most 1, of the multiply-accumulates of a generation without inheritance",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the first latents (default: %(default)s)")
    parser.add_argument(
        "--reach", type=positive, default=10, metavar="N",
        help="largest number of calls between two refreshes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=Path("out/search"), metavar="DIR",
        help="folder to keep measurements in (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file for the passes, their timetable and their errors"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="SVG or PNG file for a figure of the timetable")
    add_overwrite(parser, "out", "picture")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    candidates = parse(", ".join(args.candidates))
    prompts = read_prompts(args.prompts)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    result = search(
        pipe, candidates, prompts, budget=args.budget, seed=args.seed, reach=args.reach, folder=args.folder,
        num_inference_steps=args.steps, **guidance,
    )  # fmt: skip
    print(result)
    if args.out is not None:
        write_json(args.out, result.as_dict())
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        result.timetable.picture(args.picture)
