"""Apply passes to a UNet, and save the result.

  sdgraph apply stable-diffusion-v1-5/stable-diffusion-v1-5 "CleanUp, PruneBlocks('bk-sdm-base')" --save unet-base

Prints what each pass did. `sdgraph.GraphUNet.from_pretrained("unet-base")` loads what was saved. Without --save
the passes are only tried.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..compiler.parse import parse
from ..runtime.apply import apply
from .arguments import DTYPES, imports, writes
from .sources import load_unet


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a pipeline or a UNet, or the name of one on the hub")
    parser.add_argument("passes", metavar="PASSES", help="`sdgraph passes` lists them")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder to be made for the UNet")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="do not check passes against their contracts")
    writes(parser, "save")
    imports(parser)


def run(chosen: argparse.Namespace) -> None:
    passes = parse(chosen.passes)
    unet = apply(load_unet(chosen.model, chosen.dtype), passes, verify=not chosen.no_verify, progress=True)
    print(unet.report)
    if chosen.save is not None:
        unet.save_pretrained(chosen.save)
        print(f"saved in {chosen.save}")
