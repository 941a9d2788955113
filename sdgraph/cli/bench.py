"""Measure the speed of an exported UNet.

  sdgraph bench unet-ort --calls 20 --size 64 64

The command times each graph of the directory and whole generations, on random inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_bundle, add_overwrite, add_provider, add_threads, positive, write_json
from .sources import load_bundle


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
    add_provider(parser, "the fastest that is installed, by the kind of processor")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the figures")
    add_threads(parser, "ONNX Runtime")
    add_overwrite(parser, "out")


def run(args: argparse.Namespace) -> None:
    from ..exporters.ort.bench import bench

    unet = load_bundle(args.directory, args.provider, args.precision)
    figures = bench(unet, args.calls, args.size, args.batch, args.repeats)
    print(figures)
    if args.out is not None:
        write_json(args.out, figures.as_dict())
