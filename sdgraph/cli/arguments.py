"""Kinds of arguments that commands share, and the check of what they would write."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import SpecError

DTYPES = ("float32", "float16", "bfloat16")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def bound(text: str) -> tuple[str, float]:
    """A figure and its bound, `NAME=NUMBER`."""
    found = re.fullmatch(r"([\w ]+)=([-+.\de]+)", text)
    with contextlib.suppress(ValueError):
        if found is not None:
            return found[1], float(found[2])
    raise argparse.ArgumentTypeError(f"{text!r} is no bound: write NAME=NUMBER, as in psnr=30")


def device(text: str) -> str:
    """A device of PyTorch's that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"PyTorch cannot use the device {text!r} here: {reason}") from error
    return text


def imports(parser: argparse.ArgumentParser) -> None:
    """Let the command know passes of the user's own, before it reads any."""
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="Python module with passes of your own, installed or in the current folder; may be repeated",
    )  # fmt: skip


def writes(parser: argparse.ArgumentParser, *options: str) -> None:
    """Declare which options name what the command writes, and that it may replace it."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(writes=options)


def check_outputs(chosen: argparse.Namespace) -> None:
    """Refuse to replace anything unasked, before anything is loaded.

    Raises:
        SpecError: it is there; an empty folder is fine.
    """
    for option in getattr(chosen, "writes", ()):
        path: Path | None = getattr(chosen, option)
        if path is None or chosen.overwrite or not path.exists():
            continue
        if path.is_file() or any(path.iterdir()):
            raise SpecError(f"{path} is there already", where=f"--{option}", hint="--overwrite, or another name")


def write_json(path: Path, plain: Any) -> None:
    """Write plain data, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1) + "\n")
