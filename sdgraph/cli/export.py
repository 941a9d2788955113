"""Apply passes to a UNet, and export it for ONNX Runtime.

  sdgraph export stable-diffusion-v1-5/stable-diffusion-v1-5 --passes "CleanUp, InheritFeatures.deep_cache(3)" \\
      --out unet-ort

The directory has one graph for each variant, and one file with the weights of all graphs. It appears only if every
graph agrees with PyTorch.
"""

from __future__ import annotations

import argparse

from .arguments import CALLS, add_calls, add_dtype, add_imports, add_model, add_output, add_provider, add_threads
from .plans import add_passes, read_passes
from .sources import load_unet

CHOICES = ("target", "layout", "inputs", "overwrite", "provider", "precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_passes(parser, "--passes", default="")
    add_output(parser, "--out", "DIR", "directory to export to", required=True)
    parser.add_argument(
        "--target", default="portable", choices=("portable", "cuda"),
        help="portable: standard operators for any provider; cuda: also fused operators of the CUDA provider "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", default="variants", choices=("variants", "single"),
        help="variants: one file for each graph; single: one file for all graphs (default: %(default)s)",
    )  # fmt: skip
    add_dtype(parser, ("float32", "float16"))
    add_calls(parser)
    parser.add_argument(
        "--inputs", nargs="*", default=(), metavar="NAME",
        help="optional inputs to export, such as ControlNet's mid_block_additional_residual",
    )  # fmt: skip
    add_provider(parser, "none; the CPU's is always compared with PyTorch, and this one too")
    add_threads(parser, "PyTorch", "ONNX Runtime")
    add_imports(parser)


def run(args: argparse.Namespace) -> None:
    from ..exporters.onnx import check_target, export
    from ..runtime.apply import apply

    check_target(args.overwrite, args.out)  # before the minutes that the export takes
    requested = read_passes(args.passes)
    requested.check_calls(args.calls)
    source = load_unet(args.model, args.dtype, args.variant)
    requested.check_unet(source.config)
    unet = apply(source, requested.passes)
    if unet.graph.passes:
        print(unet.report)
    options = {name: getattr(args, name) for name in CHOICES}
    print(export(unet, args.out, calls=args.calls or requested.calls or CALLS, **options))
