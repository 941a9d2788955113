"""List the available passes.

  sdgraph passes
  sdgraph passes MECondConv

The list has the passes of sdgraph and of every installed package, with their contracts, options and presets. With NAME,
the command prints the full description of that pass.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import SdgraphError, SpecError, did_you_mean
from ..options import annotations_of, described
from ..spec import Spec, presets

if TYPE_CHECKING:
    from ..compiler.passes import Pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the pass to describe in full")


def run(args: argparse.Namespace) -> None:
    points = {point.name: point for point in importlib.metadata.entry_points(group="sdgraph.passes")}
    if args.name is None:
        print("\n\n".join(_summary(points[name]) for name in sorted(points)))
    elif args.name in points:
        print(_description(points[args.name]))
    else:
        hint = did_you_mean(args.name, points) or f"the passes are {', '.join(sorted(points))}"
        raise SpecError(f"there is no pass named {args.name!r}", hint=hint)


def _summary(point: importlib.metadata.EntryPoint) -> str:
    try:
        pass_class = point.load()
    except Exception as error:  # one broken package must not hide the passes of all others
        return f"{_title(point)}\n  cannot be loaded: {error}"
    lines = [_title(point), textwrap.indent(_wrapped(_first_sentence(pass_class)), "  "), *_facts(pass_class)]
    for name, preset in presets(pass_class).items():
        lines.append(_labelled("preset", f".{name}({_signature(preset)})"))
        lines.append(_labelled("", _first_sentence(preset)))
    return "\n".join(lines)


def _description(point: importlib.metadata.EntryPoint) -> str:
    try:
        pass_class = point.load()
    except Exception as error:
        hint = f"repair or uninstall {_package(point)}"
        raise SpecError(f"{point.name} cannot be loaded: {error}", where=point.value, hint=hint) from error
    parts = ["\n".join([_title(point), *_facts(pass_class)]), _ranges(pass_class), inspect.getdoc(pass_class) or ""]
    parts = [part for part in parts if part]
    for name, preset in presets(pass_class).items():
        text = textwrap.indent(inspect.getdoc(preset) or "", "  ")
        parts.append(f"{point.name}.{name}({_signature(preset)})\n{text}")
    return "\n\n".join(parts)


def _ranges(pass_class: type[Pass]) -> str:
    """Return the options of a pass with the values that they accept, a line each."""
    from ..compiler.passes import Chain

    hints = {} if issubclass(pass_class, Chain) else annotations_of(pass_class)
    options = [name for name in inspect.signature(pass_class).parameters if name in hints]
    return "\n".join(f"  {name} is {described(hints[name])}" for name in options)


def _title(point: importlib.metadata.EntryPoint) -> str:
    return point.name if point.module.startswith("sdgraph.") else f"{point.name}, of {_package(point)}"


def _package(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _facts(pass_class: type[Pass]) -> list[str]:
    from ..compiler.passes import Chain

    options = "" if issubclass(pass_class, Chain) else _signature(pass_class)  # a chain's passes are no options of it
    return [_labelled("contract", _contract(pass_class)), _labelled("options", options)]


def _contract(pass_class: type[Pass]) -> str:
    if not isinstance(inspect.getattr_static(pass_class, "contract"), property):
        return str(pass_class.contract)
    try:
        return str(pass_class().contract) + (", by default" if pass_class.__dict__.get("contract") else "")
    except (TypeError, SdgraphError):
        return "depends on the options"


def _signature(constructor: Callable[..., Any]) -> str:
    """Return the options of a pass or a preset with their defaults, as text."""
    options = []
    for name, option in inspect.signature(constructor).parameters.items():
        default = str(option.default) if isinstance(option.default, Spec) else repr(option.default)
        options.append(name if option.default is inspect.Parameter.empty else f"{name}={default}")
    return ", ".join(options)


def _first_sentence(documented: Any) -> str:
    """Return the first sentence of a docstring."""
    text = " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def _labelled(label: str, text: str) -> str:
    return textwrap.indent(_wrapped(f"{label:10}{text or 'none'}", " " * 10), "  ")


def _wrapped(text: str, hanging: str = "") -> str:
    return textwrap.fill(text, 110, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
