"""Search for what the calls of a generation inherit.

  sdgraph search stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --steps 20 --budget 0.55 \\
      --save plan.json
  sdgraph evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 plan.json --prompts others.txt

The search decides what each call of a generation computes, inherits, forecasts or bypasses, so that the images lose as
little as possible within a budget of time. Each CANDIDATE is an InheritFeatures or Bypass pass, whose schedule and
forecast the search replaces. Use 24 prompts or more. Some are tuned on, some validate, and some are held out: these say
what to expect, beside the best even spacing and fewer steps of the same solver in the same time. Measurements are kept
in --folder, so that an interrupted search resumes, and a search for another budget reuses them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_imports, add_overwrite, add_pipeline, add_threads, positive, seed, write_json
from .generation import add_generation, call_of, check_scheduler, check_size, made_scheduler
from .plans import read_passes
from .sources import load_pipeline, read_prompts

BRANCHES = tuple(f"InheritFeatures.damped(branch={branch})" for branch in range(3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "candidates", nargs="*", default=BRANCHES, metavar="CANDIDATE",
        help="an InheritFeatures or Bypass pass, or a file of them; several may be alternatives (default: DeepCache's "
        "branches 0, 1 and 2)",
    )  # fmt: skip
    add_generation(parser)
    parser.add_argument(
        "--budget", type=float, required=True, metavar="SHARE",
        help="largest share, above 0 and at most 1, of the time of a generation that computes everything",
    )  # fmt: skip
    parser.add_argument(
        "--cost", default="time", metavar="COST",
        help="time, measured here; macs, which counts multiply-accumulates; or the JSON file of `sdgraph bench "
        "--out` for a bundle with these candidates (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE",
        help="text file with the prompts to hold out (default: every third of --prompts)",
    )  # fmt: skip
    parser.add_argument(
        "--reference-steps", type=positive, metavar="N",
        help="steps of the generation whose latents are aimed at (default: 100, or twice --steps)",
    )  # fmt: skip
    parser.add_argument("--trials", type=positive, default=60, metavar="N", help="moves to try (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first latents (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/search"), metavar="DIR",
        help="folder to keep measurements in (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--save", type=Path, metavar="PLAN",
        help="JSON file for the plan, which all commands take in the place of passes, and its errors",
    )  # fmt: skip
    parser.add_argument("--picture", type=Path, metavar="FILE", help="SVG or PNG file for a figure of the timetable")
    add_overwrite(parser, "save", "picture")
    add_threads(parser, "PyTorch")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..plan_search.search import check_settings, search

    given, call = read_passes(args.candidates), call_of(args)
    prompts = read_prompts(args.prompts)
    held_out = () if args.held_out is None else read_prompts(args.held_out)
    check_scheduler(args.scheduler, args.pipeline, call["num_inference_steps"])
    check_settings(prompts, args.budget, held_out, args.cost)
    check_size(args, args.pipeline, given.passes)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device, args.variant)
    pipe.scheduler = made_scheduler(args.scheduler, pipe.scheduler)
    given.check_unet(pipe.unet.config)
    result = search(
        pipe, given.passes, prompts, budget=args.budget, held_out=held_out, cost=args.cost, seed=args.seed,
        reference_steps=args.reference_steps, trials=args.trials, folder=args.folder, **call,
    )  # fmt: skip
    if args.save is not None:
        write_json(args.save, result.as_dict())
    if args.picture is not None:
        result.timetable.draw(args.picture)
    print(result)
    if args.save is not None:
        print(f"saved in {args.save}")
