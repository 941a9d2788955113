"""Search for the calls of a generation that compute and those that reuse features.

  sdgraph search stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --steps 20 --budget 0.55 \\
      --save plan.json
  sdgraph evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 plan.json --prompts others.txt
  sdgraph search PIPELINE --unet large=PIPELINE --unet small=FOLDER --prompts prompts.txt --budget 0.5 \\
      --save plan.json --save-unet switched

The search decides what each call of a generation computes, reuses, forecasts or bypasses, so that the images lose as
little as possible within a budget of time. Each CANDIDATE is an InheritFeatures or Bypass pass, whose schedule and
forecast the search replaces. Use 24 prompts or more: they are split into tuning, validation and held-out prompts. The
errors on the held-out prompts are printed beside those of the best even spacing, and of fewer steps of the same solver
in the same time. Measurements are kept in --folder, so that an interrupted search resumes, and a search for another
budget reuses them.

With --unet, the search also chooses the UNet of each call, as `sdgraph.switch` runs them. The first one is the large
one, to whose images the others come close, and the budget is a share of its time. Each UNet alone and simple switches
are printed too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_imports, add_number, add_output, add_pipeline, add_threads, seed, write_json
from .generation import add_generation, call_of, made_scheduler
from .plans import RequestedPasses, read_passes
from .sources import load_pipeline, load_unet, read_prompts

BRANCHES = tuple(f"InheritFeatures.damped(branch={branch})" for branch in range(3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "candidates", nargs="*", metavar="CANDIDATE",
        help="an InheritFeatures or Bypass pass, or a file of them; several may be alternatives (default: DeepCache's "
        "branches 0, 1 and 2; with --unet, none)",
    )  # fmt: skip
    parser.add_argument(
        "--unet", action="append", default=[], type=named_folder, metavar="NAME=FOLDER", dest="unets",
        help="a UNet to choose from for each call: a folder of a UNet or of a pipeline; repeated, the largest first "
        "(default: that of PIPELINE alone)",
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
    add_number(parser, "--reference-steps", "steps of the reference generation (default: 100, or twice --steps)")
    add_number(parser, "--trials", "moves to try", default=60)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first latents (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/search"), metavar="DIR",
        help="folder to keep measurements in (default: %(default)s)",
    )  # fmt: skip
    add_output(
        parser,
        "--save",
        "PLAN",
        "JSON file for the plan, which all commands take in the place of passes",
    )
    add_output(parser, "--save-unet", "DIR", "folder for the switch of the UNets, which commands take as a UNet")
    add_output(parser, "--picture", "FILE", "SVG or PNG file for a figure of the timetable", figure=True)
    add_threads(parser, "PyTorch")
    add_imports(parser)


def named_folder(text: str) -> tuple[str, str]:
    """Return the name and the folder of `NAME=FOLDER`.

    Raises:
        argparse.ArgumentTypeError: a part is missing.
    """
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, as in large=folder")
    return name, folder


def run(args: argparse.Namespace) -> None:
    from ..errors import SpecError
    from ..plan_search.search import check_settings, search

    candidates = read_passes(args.candidates or (() if args.unets else BRANCHES))
    prompts = read_prompts(args.prompts)
    twice = [name for name, _ in args.unets if [other for other, _ in args.unets].count(name) > 1]
    if twice:
        raise SpecError(f"two UNets are named {twice[0]}", where="--unet", hint="name each differently")
    if args.save_unet is not None and not args.unets:
        raise SpecError("there is no switch of one UNet to save", where="--save-unet", hint="use --save, or add --unet")
    held_out = () if args.held_out is None else read_prompts(args.held_out)
    call = call_of(args, RequestedPasses(candidates.passes))  # the steps of a plan are not those of the search
    check_settings(prompts, args.budget, held_out, args.cost)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device, args.variant)
    pipe.scheduler = made_scheduler(args.scheduler, pipe.scheduler)
    unets = {name: load_unet(folder, args.dtype, args.variant).to(args.device) for name, folder in args.unets} or None
    candidates.check_unet((pipe.unet if unets is None else next(iter(unets.values()))).config)
    result = search(
        pipe, candidates.passes, prompts, budget=args.budget, held_out=held_out, cost=args.cost, seed=args.seed,
        reference_steps=args.reference_steps, trials=args.trials, folder=args.folder,
        unets=unets, **call,
    )  # fmt: skip
    if args.save is not None:
        write_json(args.save, result.as_dict())
    if args.save_unet is not None and result.plan is not None and unets is not None:
        result.plan.switch(unets).save_pretrained(args.save_unet)
    if args.picture is not None:
        result.timetable.draw(args.picture)
    print(result)
    if args.save is not None:
        print(f"saved in {args.save}")
