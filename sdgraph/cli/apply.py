"""Apply passes to a UNet, and save the result.

  sdgraph apply stable-diffusion-v1-5/stable-diffusion-v1-5 "CleanUp, PruneBlocks('bk-sdm-base')" --save unet-base

The command prints what each pass changed. Without --save it only tries the passes. In Python,
`sdgraph.GraphUNet.from_pretrained("unet-base")` loads the saved UNet.
"""

from __future__ import annotations

import argparse

from .arguments import add_dtype, add_imports, add_model, add_output, add_threads
from .plans import add_passes, read_passes
from .sources import load_unet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_passes(parser, "passes")
    add_output(parser, "--save", "DIR", "folder to save the resulting UNet in")
    add_dtype(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not check the passes against their contracts")
    add_threads(parser, "PyTorch")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..runtime.apply import apply

    requested = read_passes(args.passes)
    source = load_unet(args.model, args.dtype, args.variant)
    requested.check_unet(source.config)
    unet = apply(source, requested.passes, verify=not args.no_verify, progress=True)
    print(unet.report)
    if args.save is not None:
        unet.save_pretrained(args.save)
        print(f"saved in {args.save}")
