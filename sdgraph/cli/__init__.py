"""The command line: one module for each command, whose docstring is its help.

The module of a command has `add_arguments(parser)`, which declares its arguments, and `run(args)`, which executes it.
`arguments.add_output` declares an option that names an output, so that nothing is loaded if it must not be written.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..errors import ContractError, ExportError, PassError, QualityError, SdgraphError, did_you_mean
from ..progress import silent
from ..spec import import_module
from ..version import __version__
from . import analyse, apply, bench, evaluate, export, generate, inspect, passes, search, show, tune
from .arguments import add_overwrite, add_quiet, check_outputs, threads
from .terminal import interruptible, outputs, quiet_libraries

__all__ = ["main"]

COMMANDS = (apply, show, evaluate, search, analyse, tune, export, generate, inspect, bench, passes)
DESCRIPTION = """\
A graph-transformation compiler for diffusion UNets: change a UNet by passes, compare its images, export it.

  sdgraph passes                                            # list the passes
  sdgraph apply MODEL "PruneBlocks('mid_block')" --save DIR
  sdgraph evaluate PIPELINE "PruneBlocks('mid_block')" --prompts prompts.txt

MODEL and PIPELINE are folders, or names of models on the hub, OWNER/NAME. `sdgraph COMMAND --help` explains a command.
"""
FAILURES = (QualityError, ContractError, PassError, ExportError)  # the command ran, and its result is not good enough


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Errors are printed to standard error.

    Args:
        arguments: the command line without the name of the program; by default that of the process.
    Returns:
        The exit status: 0 for success; 1 if the command ran and failed, as when images fall short; 2 if the request is
        invalid; 3 if sdgraph has a defect, whose traceback is printed; 130 if the user interrupted it; 143 if it was
        terminated.
    """
    with interruptible() as over:
        try:
            with outputs():
                status = _status(arguments)
            over.set()
        except KeyboardInterrupt as interrupt:
            over.set()
            number = signal.SIGTERM if signal.SIGTERM in interrupt.args else signal.SIGINT
            with outputs():
                print(f"\nsdgraph: {'terminated' if number == signal.SIGTERM else 'interrupted'}", file=sys.stderr)
            status = 128 + number
    return status


def _status(arguments: Sequence[str] | None) -> int:
    """Execute a command, print its errors, and return its exit status."""
    try:
        _execute(_parsed(arguments))
    except SdgraphError as error:
        print(f"sdgraph: {error}", file=sys.stderr)
        return 1 if isinstance(error, FAILURES) else 2
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        print(f"sdgraph: {file}{error.strerror or error}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, of a device
            print(f"sdgraph: out of memory: {error}\n  hint:  a smaller batch, or --dtype float16", file=sys.stderr)
            return 1
        traceback.print_exc()
        print("sdgraph: this is a defect of sdgraph or of a pass: please report the lines above", file=sys.stderr)
        return 3
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a command. An unknown option ends the process, with the nearest name in the message."""
    args, unknown = _parser().parse_known_args(arguments)
    args.words = sys.argv[1:] if arguments is None else arguments
    if unknown:
        known = [option for action in args.parser._actions for option in action.option_strings]
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        near = next(filter(None, (did_you_mean(option, known, 1) for option in options)), "")
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{near and f' ({near})'}")
    return args


def _execute(args: argparse.Namespace) -> None:
    check_outputs(args)
    for module in getattr(args, "imports", ()):
        import_module(module)
    with silent(args.quiet), threads(args), quiet_libraries():
        args.run(args)


class _Command(argparse.ArgumentParser):
    """A parser of a command, whose positional arguments may stand before and after its options."""

    _intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed:
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="sdgraph", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"sdgraph {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands", parser_class=_Command)
    for module in COMMANDS:
        _add_command(commands, module)
    return parser


def _add_command(commands: argparse._SubParsersAction[_Command], module: ModuleType) -> None:
    description = str(module.__doc__)
    summary = description.partition("\n")[0].rstrip(".")
    name = module.__name__.rpartition(".")[2]
    parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    add_overwrite(parser)
    add_quiet(parser)
    required = [action for action in parser._actions if action.required]
    words = [" ".join([*action.option_strings, str(action.metavar)]) for action in required]
    # argparse would list every option, which puts seven lines before an error
    parser.usage = " ".join(["sdgraph", name, *words, "[options]"])
    parser.set_defaults(run=module.run, parser=parser)
