"""Measure how redundant the blocks, layers and units of a pipeline's UNet are, and choose what to prune.

  sdgraph analyse stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --steps 20 --out analysis.json
  sdgraph analyse stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --steps 20 --time 0.7 \\
      --picture redundancy.svg

Each region is removed alone. The table has what that changes (the error of the output, at timesteps of real
generations), and what it saves (parameters, multiply-accumulates, and seconds on --target). With a budget, --time,
--macs or --parameters, the last line is the PruneBlocks that costs least, which every command takes as passes.
Measurements are kept in --folder, so that an interrupted analysis resumes, and the same command with another budget
measures nothing again. Use 4 to 16 prompts with different words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_imports, add_number, add_output, add_pipeline, add_threads, number, seed
from .generation import add_generation, call_of, made_scheduler
from .plans import RequestedPasses
from .sources import load_pipeline, read_prompts

BUDGETS = {"time": "the seconds of a call", "macs": "the multiply-accumulates", "parameters": "the parameters"}
LEVELS = ("block", "layer", "unit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    add_generation(parser)
    parser.add_argument(
        "--levels", nargs="+", choices=LEVELS, default=list(LEVELS), metavar="LEVEL",
        help="levels of regions: block, layer (resnets and attentions), unit (attn1, attn2, ff; default: all three)",
    )  # fmt: skip
    parser.add_argument(
        "--target", default="eager", metavar="TARGET",
        help="what is timed: eager or compiled (PyTorch on --device), onnx:PROVIDER (a provider of ONNX Runtime), or "
        "none (default: %(default)s)",
    )  # fmt: skip
    add_number(parser, "--calls", "calls of a generation on which errors are measured, spread evenly", default=8)
    parser.add_argument("--latents", action="store_true", help="measure the error of the final latents as well")
    parser.add_argument("--images", action="store_true", help="measure the SSIM of the decoded images as well")
    parser.add_argument(
        "--pairs", action="store_true", help="measure neighbouring regions together, for what is not additive"
    )
    for name, meaning in BUDGETS.items():
        parser.add_argument(
            f"--{name}", type=number, metavar="SHARE",
            help=f"budget: largest share, above 0 and at most 1, of {meaning} that pruning leaves",
        )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first latents (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/analyse"), metavar="DIR",
        help="folder to keep measurements in (default: %(default)s)",
    )  # fmt: skip
    add_output(parser, "--out", "FILE", "JSON file for the analysis, which `sdgraph.Redundancy.load` reads")
    add_output(parser, "--picture", "FILE", "SVG or PNG file for a heat map of the UNet", figure=True)
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..redundancy.analysis import analyse
    from ..redundancy.redundancy import check_budgets

    prompts = read_prompts(args.prompts)
    call = call_of(args, RequestedPasses(()))
    target = None if args.target == "none" else args.target
    budgets = {name: getattr(args, name) for name in BUDGETS if getattr(args, name) is not None}
    check_budgets(budgets, target)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device, args.variant)
    pipe.scheduler = made_scheduler(args.scheduler, pipe.scheduler)
    found = analyse(
        pipe, prompts, levels=args.levels, target=target, calls=args.calls, latents=args.latents, images=args.images,
        pairs=args.pairs, seed=args.seed, folder=args.folder, **call,
    )  # fmt: skip
    if args.out is not None:
        found.save(args.out)
    if args.picture is not None:
        found.draw(args.picture)
    print(found)
    if budgets:
        print(f"\n{found.cheapest(**budgets)}")
    if args.out is not None:
        print(f"saved in {args.out}")
