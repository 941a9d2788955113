"""Measure the speed of an exported UNet.

  sdgraph bench unet-ort --calls 20 --size 64 64

The command times each graph of the directory and whole generations, on random inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_bundle, add_overwrite, add_threads, positive, write_json
from .sources import bundle_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--calls", type=positive, default=20, metavar="N", help="UNet calls per generation (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=positive, nargs=2, metavar=("H", "W"),
        help="height and width of the latents, an eighth of the image's (default: those of the model)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, default=2, metavar="N",
        help="samples per UNet call; guidance needs two per image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="measured runs after the warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--provider", metavar="NAME",
        help="execution provider of ONNX Runtime (default: CUDAExecutionProvider if there is a device, else the CPU's)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the figures")
    add_threads(parser, "ONNX Runtime")
    add_overwrite(parser, "out")


def run(args: argparse.Namespace) -> None:
    from ..exporters.ort.bench import bench
    from ..exporters.ort.unet import ORTUNet

    unet = ORTUNet.from_pretrained(bundle_folder(args.directory), provider=args.provider)
    figures = bench(unet, args.calls, args.size, args.batch, args.repeats)
    print(figures)
    if args.out is not None:
        write_json(args.out, figures.as_dict())
