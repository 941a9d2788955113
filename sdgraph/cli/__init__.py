"""The command line: one module for each command, whose docstring is its help.

A command's module has `options(parser)`, which declares its arguments, and `run(chosen)`, which does it. What it writes
is declared by `arguments.writes`, so that nothing is loaded if it may not be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ..errors import ContractError, ExportError, PassError, QualityError, SdgraphError
from ..spec import import_module
from ..version import __version__
from . import apply, bench, evaluate, export, inspect, passes, search
from .arguments import check_outputs
from .quiet import quiet

__all__ = ["main"]

COMMANDS = (apply, evaluate, search, export, inspect, bench, passes)
TEXT = """\
A graph-transformation compiler for diffusion UNets: change a UNet by passes, judge its images, export it.

  sdgraph passes                                            which passes there are
  sdgraph apply MODEL "PruneBlocks('mid_block')" --save DIR
  sdgraph evaluate MODEL "PruneBlocks('mid_block')" --prompts prompts.txt

MODEL is a folder, or the name of a model on the hub, OWNER/NAME. `sdgraph COMMAND --help` says more.
"""
FAILED = (QualityError, ContractError, PassError, ExportError)  # what was asked for was tried, and came out wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default those of the process.
    Returns:
        the exit status: 0; 1 if it was tried and failed, as when images fall short; 2 if it cannot be done as asked;
        130 if it was interrupted. What is wrong is said on stderr.
    """
    chosen = _parser().parse_args(arguments)
    try:
        check_outputs(chosen)
        for module in getattr(chosen, "imports", ()):
            import_module(module)
        with quiet():
            chosen.run(chosen)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nsdgraph: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SdgraphError, OSError) as error:
        print(f"sdgraph: {error}", file=sys.stderr)
        return 1 if isinstance(error, FAILED) else 2
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="sdgraph", description=TEXT, formatter_class=form)
    parser.add_argument("--version", action="version", version=f"sdgraph {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in COMMANDS:
        _add(commands, module)
    return parser


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], module: ModuleType) -> None:
    text = str(module.__doc__)
    brief = text.partition("\n")[0].rstrip(".")
    name = module.__name__.rpartition(".")[2]
    form = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=brief[0].lower() + brief[1:], description=text, formatter_class=form, allow_abbrev=False
    )
    module.options(parser)
    needed = [action for action in parser._actions if action.required]
    shown = [" ".join([*action.option_strings, str(action.metavar)]) for action in needed]
    parser.usage = " ".join(["sdgraph", name, *shown, "[options]"])  # all of them would be seven lines before an error
    parser.set_defaults(run=module.run)
