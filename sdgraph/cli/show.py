"""Show what passes make of a UNet, at the sizes of your images.

  sdgraph show stable-diffusion-v1-5/stable-diffusion-v1-5 "InheritFeatures.deep_cache(3)" --calls 25 --height 768 \\
      --picture unet.svg --timetable calls.svg

The command prints the regions of the UNet with their cost, and what each call of a generation computes, reuses,
forecasts or bypasses. It computes nothing, and reads no weights unless a pass looks at them.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import DecisionError
from .arguments import CALLS, add_calls, add_imports, add_model, add_number, add_output
from .generation import add_scheduler, add_size, check_size, latent_unit, made_scheduler, own_scheduler, with_calls
from .plans import add_passes, read_passes
from .sources import load_unet, sketch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_passes(parser, "passes", nargs="?", default="")
    add_calls(parser)
    add_scheduler(parser)
    add_size(parser)
    add_number(parser, "--depth", "levels of regions: 2 shows blocks, 3 layers, 4 their parts", default=3)
    add_output(
        parser, "--picture", "FILE", "SVG or PNG file for a figure of the UNet and of what passes changed", figure=True
    )
    add_output(parser, "--timetable", "FILE", "SVG or PNG file for a figure of the calls", figure=True)
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..runtime.apply import apply

    requested = read_passes(args.passes)
    requested.check_calls(args.calls)
    check_size(args, args.model)
    calls = args.calls or requested.calls or CALLS
    run = _run(args, calls)
    graph = sketch(args.model, args.variant)
    requested.check_unet(graph.config)
    try:
        after = apply(graph, requested.passes, verify=False).graph
    except DecisionError:  # a pass looks at weights
        graph = apply(load_unet(args.model, "float32", args.variant)).graph
        after = apply(graph, requested.passes, verify=False).graph
    pixels = latent_unit(args.model)
    sides = {"H": args.height, "W": args.width}
    sizes = {symbol: side // pixels for symbol, side in sides.items() if side is not None}
    graph, after = (one.at(**sizes) for one in (graph, after))
    timetable = after.timetable(run)
    if args.picture is not None:
        after.draw(args.picture, before=graph if requested.passes else None)
    if args.timetable is not None:
        timetable.draw(args.timetable)
    print(f"{after.text(args.depth)}\n\n{timetable}")


def _run(args: argparse.Namespace, calls: int) -> Any:
    """Return a scheduler that makes the calls, or their number where no scheduler is known."""
    own = own_scheduler(args.model)
    if own is None and args.scheduler is not None:
        from diffusers import DDIMScheduler

        own = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
    return calls if own is None else with_calls(made_scheduler(args.scheduler, own), calls)
