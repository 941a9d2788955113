"""Apply passes to a UNet, and save the result.

  sdgraph apply stable-diffusion-v1-5/stable-diffusion-v1-5 "CleanUp, PruneBlocks('bk-sdm-base')" --save unet-base

The command prints what each pass changed. Without --save it only tries the passes. In Python,
`sdgraph.GraphUNet.from_pretrained("unet-base")` loads the saved UNet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_dtype, add_imports, add_model, add_overwrite, add_threads
from .sources import load_unet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("passes", metavar="PASSES", help="passes as text, separated by commas; see `sdgraph passes`")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder to save the resulting UNet in")
    add_dtype(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not check the passes against their contracts")
    add_overwrite(parser, "save")
    add_threads(parser, "PyTorch")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..compiler.parse import parse
    from ..runtime.apply import apply

    passes = parse(args.passes)
    unet = apply(load_unet(args.model, args.dtype, args.variant), passes, verify=not args.no_verify, progress=True)
    print(unet.report)
    if args.save is not None:
        unet.save_pretrained(args.save)
        print(f"saved in {args.save}")
