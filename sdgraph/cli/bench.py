"""Measure what is fast on this machine: the images of a pipeline, or an exported UNet.

  sdgraph bench PIPELINE "InheritFeatures.damped(2)" --height 256 --width 256 --steps 10 --threads 2
  sdgraph bench unet-ort --calls 20 --height 512 --width 512

With a pipeline, the command makes images with every installed engine, in float32 and in lower precisions, with and
without the passes, each in a separate process. It prints seconds per image, seconds to the first image, peak memory and
the PSNR to the source in float32, and the lines of Python for the fastest engine. With the directory of an exported
UNet, it times each graph and whole generations on random inputs.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from ..errors import SpecError
from ..plan_search import TIMES_FORMAT
from .arguments import add_imports, add_number, add_output, add_provider, add_threads, add_variant, write_json
from .generation import UNIT, add_images, call_of, scheduler_class
from .plans import add_passes, read_passes
from .sources import load_bundle, local_folder, read_prompts

CALLS, BATCH = 20, 2
OF_A_PIPELINE = ("passes", "prompts", "negative_prompt", "steps", "scheduler", "guidance_scale", "without", "rounds")
OF_A_BUNDLE = ("calls", "batch", "provider", "precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline", metavar="PIPELINE",
        help="folder of a diffusers pipeline, or its name on the hub; or a directory that `sdgraph export` wrote",
    )  # fmt: skip
    add_variant(parser)
    add_passes(parser, "passes", nargs="?", default="")
    add_images(parser)
    parser.add_argument(
        "--without", action="append", metavar="ENGINE",
        help="engine to leave out: PyTorch, compiled, 'ONNX Runtime' or OpenVINO; may be repeated. The first row, "
        "PyTorch in float32, is always measured",
    )  # fmt: skip
    add_number(parser, "--rounds", "processes for each engine, which take turns (default: 2)")
    add_number(parser, "--calls", f"UNet calls per generation of an exported UNet (default: {CALLS})")
    batch = f"samples per call of an exported UNet; guidance needs two per image (default: {BATCH})"
    add_number(parser, "--batch", batch)
    add_number(parser, "--repeats", "measured runs after the first (default: 2 images, 3 generations)")
    add_provider(parser, "the fastest that is installed, by the kind of processor")
    add_output(parser, "--out", "FILE", "JSON file for the figures")
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    folder = local_folder(args.pipeline)
    from ..untrusted import is_exported

    exported = folder is not None and is_exported(folder)
    for name in OF_A_PIPELINE if exported else OF_A_BUNDLE:
        if getattr(args, name) not in (None, ""):
            other, kind = ("a pipeline", "an exported UNet") if exported else ("an exported UNet", "a pipeline")
            raise SpecError(
                f"{args.pipeline} is {kind}, and this option is for {other}",
                where="PASSES" if name == "passes" else f"--{name.replace('_', '-')}",
                hint="leave it out",
            )
    figures = _graphs(args) if exported else _engines(args)
    print(figures)
    if args.out is not None:
        write_json(
            args.out, {"format": TIMES_FORMAT, "command": shlex.join(["sdgraph", *args.words]), **figures.as_dict()}
        )


def _graphs(args: argparse.Namespace) -> Any:
    """Return the times of the graphs of an exported UNet."""
    from ..exporters.ort.bench import bench

    unet = load_bundle(args.pipeline, args.provider, args.precision)
    size = [side for side in (args.height, args.width) if side is not None]
    if len(size) == 1 or any(side % UNIT for side in size):
        raise SpecError(
            "a size needs both a height and a width, in multiples of 8 pixels", where="--height, --width",
            hint="as in --height 512 --width 512",
        )  # fmt: skip
    latents = (size[0] // UNIT, size[1] // UNIT) if size else None
    return bench(unet, args.calls or CALLS, latents, args.batch or BATCH, args.repeats or 3)


def _engines(args: argparse.Namespace) -> Any:
    """Return the comparison of the engines of this machine, on the images of a pipeline."""
    from ..exporters import engines

    requested = read_passes(args.passes)
    call = call_of(args, requested)
    steps = call.pop("num_inference_steps")
    prompts = engines.PROMPTS if args.prompts is None else read_prompts(args.prompts)
    scheduler = None
    if args.scheduler is not None:
        kind, options = scheduler_class(args.scheduler)
        scheduler = kind.__name__, options
    return engines.compare(
        args.pipeline, requested.passes, prompts=prompts, steps=steps, call=call, scheduler=scheduler,
        variant=args.variant, imports=args.imports, threads=args.threads, device=args.device,
        leave_out=args.without or (), rounds=args.rounds or 2, repeats=args.repeats or 2,
    )  # fmt: skip
