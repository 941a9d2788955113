"""Say what an exported folder holds.

  sdgraph inspect unet-ort

Its graphs, what they inherit and when, its inputs and its files.
"""

from __future__ import annotations

import argparse

from .arguments import positive
from .sources import exported


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="what `sdgraph export` wrote")
    parser.add_argument("--calls", type=positive, default=50, help="of the generation to show (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare files with their hashes")


def run(chosen: argparse.Namespace) -> None:
    from ..exporters.bundle.inspect import contents

    print(contents(exported(chosen.directory), chosen.calls, verify=not chosen.no_verify))
