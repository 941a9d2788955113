"""Apply passes to a UNet, and write it for ONNX Runtime.

  sdgraph export stable-diffusion-v1-5/stable-diffusion-v1-5 --passes "CleanUp, InheritFeatures.deep_cache(3)" \\
      --out unet-ort

One graph for each kind of call, one file of weights. Nothing appears in --out unless every graph agrees with PyTorch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..compiler.parse import parse
from ..runtime.apply import apply
from .arguments import imports, positive, writes
from .sources import load_unet


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a pipeline or a UNet, or the name of one on the hub")
    parser.add_argument(
        "--passes", default="", help="such as \"PruneBlocks('bk-sdm-base'), InheritFeatures.deep_cache(3)\""
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--target", default="portable", choices=("portable", "cuda"), help="cuda: fused operators")
    parser.add_argument("--layout", default="variants", choices=("variants", "single"), help="single: one file")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--calls", type=positive, default=50, help="of the UNet per generation (default: %(default)s)")
    parser.add_argument("--inputs", nargs="*", default=(), help="optional inputs, as mid_block_additional_residual")
    writes(parser, "out")
    imports(parser)


def run(chosen: argparse.Namespace) -> None:
    from ..exporters.onnx.export import check_target, export

    check_target(chosen.overwrite, chosen.out)  # before minutes are spent
    passes = parse(chosen.passes)
    unet = apply(load_unet(chosen.model, chosen.dtype), passes)
    if unet.graph.passes:
        print(unet.report)
    options = {name: getattr(chosen, name) for name in ("target", "layout", "calls", "inputs", "overwrite")}
    print(export(unet, chosen.out, **options))
