"""List the passes there are.

  sdgraph passes
  sdgraph passes MECondConv

Those of sdgraph and of every installed package, with their contracts, options and presets; with a NAME, all that is to
be said of that pass.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from ..compiler.base import Pass
from ..compiler.chain import Chain
from ..errors import SdgraphError, SpecError, did_you_mean
from ..spec import Spec, presets


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one pass, to read all of it")


def run(chosen: argparse.Namespace) -> None:
    points = {point.name: point for point in importlib.metadata.entry_points(group="sdgraph.passes")}
    if chosen.name is None:
        print("\n\n".join(_brief(points[name]) for name in sorted(points)))
    elif chosen.name in points:
        print(_whole(points[chosen.name]))
    else:
        hint = did_you_mean(chosen.name, points) or f"there are {', '.join(sorted(points))}"
        raise SpecError(f"no pass is named {chosen.name!r}", hint=hint)


def _brief(point: importlib.metadata.EntryPoint) -> str:
    try:
        one = point.load()
    except Exception as error:  # one broken package must not hide all others' passes
        return f"{_title(point)}\n  cannot be loaded: {error}"
    lines = [_title(point), textwrap.indent(_filled(_sentence(one)), "  "), *_facts(one)]
    for name, preset in presets(one).items():
        lines.append(_labelled("preset", f".{name}({_options(preset)})"))
        lines.append(_labelled("", _sentence(preset)))
    return "\n".join(lines)


def _whole(point: importlib.metadata.EntryPoint) -> str:
    try:
        one = point.load()
    except Exception as error:
        hint = f"mend or remove {_package(point)}"
        raise SpecError(f"{point.name} cannot be loaded: {error}", where=point.value, hint=hint) from error
    parts = ["\n".join([_title(point), *_facts(one)]), inspect.getdoc(one) or ""]
    for name, preset in presets(one).items():
        parts.append(f"{point.name}.{name}({_options(preset)})\n{textwrap.indent(inspect.getdoc(preset) or '', '  ')}")
    return "\n\n".join(parts)


def _title(point: importlib.metadata.EntryPoint) -> str:
    return point.name if _package(point) == "sdgraph" else f"{point.name}, of {_package(point)}"


def _package(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _facts(one: type[Pass]) -> list[str]:
    chain = issubclass(one, Chain)  # its passes are what it is, and no option
    return [_labelled("contract", _contract(one)), _labelled("options", "" if chain else _options(one))]


def _contract(one: type[Pass]) -> str:
    if not isinstance(inspect.getattr_static(one, "contract"), property):
        return str(one.contract)
    try:
        return str(one().contract) + (", by default" if one.__dict__.get("contract") else "")
    except (TypeError, SdgraphError):
        return "as its options are"


def _options(make: Callable[..., Any]) -> str:
    told = []
    for name, option in inspect.signature(make).parameters.items():
        value = str(option.default) if isinstance(option.default, Spec) else repr(option.default)
        told.append(name if option.default is inspect.Parameter.empty else f"{name}={value}")
    return ", ".join(told)


def _sentence(one: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(one) or "").partition("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def _labelled(label: str, text: str) -> str:
    return textwrap.indent(_filled(f"{label:10}{text or 'none'}", " " * 10), "  ")


def _filled(text: str, hanging: str = "") -> str:
    return textwrap.fill(text, 110, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
