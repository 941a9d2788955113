"""The arguments that commands share, with one help text each, and the types that parse them."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..progress import note

CALLS = 50
# The arguments that may name files or folders, which no command writes to.
INPUTS = (
    "model",
    "pipeline",
    "directory",
    "change",
    "reference",
    "passes",
    "prompts",
    "held_out",
    "cost",
    "clip",
    "image",
    "mask",
)
DTYPES = ("float32", "float16", "bfloat16")


# -- types ------------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def number(text: str) -> float:
    """Parse a finite number."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number")


def seed(text: str) -> int:
    """Parse a seed, a whole number that is not negative."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := int(text)) < 2**63:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")


def bound(text: str) -> tuple[str, float]:
    """Parse a figure and its bound, `NAME=NUMBER`."""
    match = re.fullmatch(r"([\w ]+)=([-+.\de]+)", text)
    with contextlib.suppress(ValueError):
        if match is not None:
            return match[1], float(match[2])
    raise argparse.ArgumentTypeError(f"{text!r} is not a bound: write NAME=NUMBER, as in psnr=30")


def device(text: str) -> str:
    """Check that PyTorch can use a device on this machine."""
    if text == "cpu":  # without loading PyTorch, as for `--help`
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"PyTorch cannot use the device {text!r} here: {reason}") from error
    return text


# -- arguments --------------------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, the UNet that a command changes, and --variant."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a diffusers pipeline or of a UNet, or its name on the hub"
    )
    add_variant(parser)


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """Add PIPELINE, which a command generates images with, and --variant."""
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a diffusers pipeline, or its name on the hub")
    add_variant(parser)


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Add --variant, as diffusers' `from_pretrained` has it."""
    parser.add_argument(
        "--variant", metavar="NAME",
        help="variant of the weights, such as fp16 (default: the plain weights, or the only variant of a folder)",
    )  # fmt: skip


def add_dtype(parser: argparse.ArgumentParser, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Add --dtype, one of the names in `dtypes`."""
    parser.add_argument(
        "--dtype", default="float32", choices=dtypes, help="dtype of the weights (default: %(default)s)"
    )


def add_provider(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --provider and --precision, with which ONNX Runtime runs exported models.

    Args:
        parser: the parser of the command.
        default: the default provider, for the help.
    """
    parser.add_argument(
        "--provider", metavar="NAME",
        help="execution provider of ONNX Runtime, such as CPUExecutionProvider or OpenVINOExecutionProvider "
        f"(default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"),
        help="precision of OpenVINO's provider (default: float32); others compute in the dtype of the exported UNet",
    )  # fmt: skip


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, which every command has."""
    parser.add_argument("--quiet", action="store_true", help="print results and errors only, and no progress")


def add_threads(parser: argparse.ArgumentParser, *libraries: str) -> None:
    """Add --threads.

    Args:
        parser: the parser of the command.
        libraries: the libraries that compute, PyTorch and ONNX Runtime or one of them; all have as many threads.
    """
    parser.set_defaults(computing=libraries)
    parser.add_argument(
        "--threads", type=positive, metavar="N",
        help="threads of PyTorch, and as many of ONNX Runtime (default: one for each core, or OMP_NUM_THREADS)",
    )  # fmt: skip


@contextlib.contextmanager
def threads(args: argparse.Namespace) -> Iterator[None]:
    """Set the number of PyTorch's threads during a command, and print it."""
    if not hasattr(args, "threads"):  # the command computes nothing
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    note(f"threads: {torch.get_num_threads()} ({' and '.join(args.computing)})")
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_number(parser: argparse.ArgumentParser, name: str, meaning: str, default: int | None = None) -> None:
    """Add an option whose value is a whole number of at least 1.

    Args:
        parser: the parser of the command.
        name: the name of the option, with dashes.
        meaning: the help text.
        default: the default, which the help text then ends with.
    """
    meaning += "" if default is None else " (default: %(default)s)"
    parser.add_argument(name, type=positive, default=default, metavar="N", help=meaning)


def add_calls(parser: argparse.ArgumentParser, default: int = CALLS) -> None:
    """Add --calls, the length of a generation, which is None where the command line does not give it."""
    add_number(parser, "--calls", f"UNet calls per generation (default: those of a plan, or {default})")


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add --import, which names modules of passes to import before the command parses any pass."""
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="Python module with your own passes, installed or in the current folder; may be repeated",
    )  # fmt: skip


def add_output(
    parser: argparse.ArgumentParser,
    name: str,
    metavar: str,
    meaning: str,
    *,
    required: bool = False,
    figure: bool = False,
) -> None:
    """Add an option that names a file or a folder which the command writes.

    Args:
        parser: the parser of the command.
        name: the name of the option, with dashes, or a short and a long one, "-o/--out".
        metavar: the kind of output, FILE, DIR or PLAN.
        meaning: the help text.
        required: whether the option must be given.
        figure: whether the output is a figure, an SVG or PNG file.
    """
    option = parser.add_argument(*name.split("/"), type=Path, required=required, metavar=metavar, help=meaning)
    parser.set_defaults(outputs={**(parser.get_default("outputs") or {}), option.dest: figure})


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite, if the command has outputs."""
    if parser.get_default("outputs"):
        parser.add_argument("--overwrite", action="store_true", help="replace output that already exists")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse to replace existing output without --overwrite, before anything is loaded.

    Args:
        args: the arguments of the command.
    Raises:
        SpecError: a file or a folder that is not empty already exists where the command would write; it cannot write
            there; or the command would write to what it reads, which --overwrite does not allow either.
        ExtraError: an output is a figure, and matplotlib is not installed.
    """
    from ..atomic import check_apart

    outputs: dict[str, bool] = getattr(args, "outputs", None) or {}
    named = {option: getattr(args, option) for option in INPUTS if getattr(args, option, None)}
    inputs = [(option, Path(path).expanduser()) for option, path in named.items()]
    inputs = [(option, path) for option, path in inputs if os.path.exists(path)]
    for option in (*outputs, "folder"):
        path: Path | None = getattr(args, option, None)
        if path is None:
            continue
        check_apart(path, inputs, SpecError, f"--{option}", around=False)
        if option not in outputs:  # the folder of a search, whose measurements are read again
            continue
        _check_writable(path, f"--{option}")
        if outputs[option]:
            from ..views.figure import check_figure_path

            check_figure_path(path)
        if not args.overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
            raise SpecError(
                f"{path} already exists", where=f"--{option}", hint="pass --overwrite, or write to another path"
            )


def _check_writable(path: Path, where: str) -> None:
    from ..atomic import nearest_folder

    folder = nearest_folder(path)
    if not folder.is_dir():
        raise SpecError(f"{folder} is a file, not a folder", where=where, hint="write to another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(f"there is no permission to write in {folder}", where=where, hint="write to another path")
    if path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise SpecError(f"there is no permission to write in {path}", where=where, hint="write to another path")


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, and create the folder of the file if necessary."""
    from ..atomic import written

    with written(path) as file:
        file.write_text(json.dumps(data, indent=1) + "\n")
