"""Describe an exported UNet.

  sdgraph inspect unet-ort

The command prints the graphs, what they inherit at which calls, the inputs and the files. It runs nothing.
"""

from __future__ import annotations

import argparse

from .arguments import add_bundle, add_calls
from .sources import bundle_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_calls(parser, 50)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their hashes")


def run(args: argparse.Namespace) -> None:
    from ..exporters.bundle.inspect import contents

    print(contents(bundle_folder(args.directory), args.calls, verify=not args.no_verify))
