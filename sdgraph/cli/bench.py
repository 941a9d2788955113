"""Time an exported folder.

  sdgraph bench unet-ort --calls 20 --size 64 64

Each graph, and whole generations, on random inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import positive, write_json, writes
from .sources import exported


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="what `sdgraph export` wrote")
    parser.add_argument("--calls", type=positive, default=20, help="of a generation (default: %(default)s)")
    parser.add_argument(
        "--size", type=positive, nargs=2, metavar=("H", "W"), help="of the latents (default: the model's)"
    )
    parser.add_argument("--batch", type=positive, default=2, help="guidance doubles that of the images (default: 2)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns that count (default: %(default)s)")
    parser.add_argument("--provider", help="of ONNX Runtime (default: CUDA where there is a device, else the CPU)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON: the figures")
    writes(parser, "out")


def run(chosen: argparse.Namespace) -> None:
    from ..exporters.ort.bench import bench
    from ..exporters.ort.unet import ORTUNet

    unet = ORTUNet.from_pretrained(exported(chosen.directory), provider=chosen.provider)
    figures = bench(unet, chosen.calls, chosen.size, chosen.batch, chosen.repeats)
    print(figures)
    if chosen.out is not None:
        write_json(chosen.out, figures.as_dict())
