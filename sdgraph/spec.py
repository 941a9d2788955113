"""Passes and their options as text: printed, parsed back, found by name.

The text is that of a Python call with literal arguments, of a class, `PruneBlocks('bk-sdm-base')`, or of one of its
presets, `InheritFeatures.deep_cache(3)`; nothing else of it is executed.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import logging
import math
import os
import sys
import typing
from collections.abc import Iterator
from typing import Any

from .errors import SpecError, did_you_mean

log = logging.getLogger("sdgraph")

NUMBERS = {"inf": math.inf, "nan": math.nan}  # what `repr` writes for a float that is no literal
ABSTRACT = (
    "sdgraph.compiler.base",
    "sdgraph.compiler.chain",
    "sdgraph.compiler.rewrite",
)  # these modules define what passes are made of, and no pass


@dataclasses.dataclass(frozen=True)
class Spec:
    """A frozen dataclass that prints as a call and parses back; passes and their options are such."""

    def __str__(self) -> str:
        parts = []
        for i, field in enumerate(f for f in dataclasses.fields(self) if f.init):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(_text(value) if i == 0 else f"{field.name}={_text(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def specs(self) -> Iterator[Spec]:
        """This one and the specs among its options, to any depth."""
        yield self
        stack = [getattr(self, field.name) for field in dataclasses.fields(self)]
        while stack:
            value = stack.pop()
            if isinstance(value, Spec):
                yield from value.specs()
            elif isinstance(value, tuple):
                stack.extend(value)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(map(_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value) if isinstance(value, Spec) else repr(value)


def read(text: str, kind: type[Spec] = Spec) -> Spec:
    """One spec, such as a schedule, from the text that `str` made of it.

    Args:
        kind: the class it is to be of; by default any.
    Raises:
        SpecError: it is something else.
    """
    try:
        found = value_of(ast.parse(text, mode="eval").body, text, kind)
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {error.msg}", hint="write a call, as in 'Uniform(3)'"
        ) from error
    if not isinstance(found, Spec):
        raise SpecError(f"{text!r} is no spec", hint="write a call, as in 'Uniform(3)'")
    return found


def known(kind: type[Spec] = Spec) -> dict[str, type[Spec]]:
    """The specs that can be named, by name: those defined so far, and those of installed packages' entry points.

    Args:
        kind: the base class of those wanted, as `Pass` or `Schedule`; by default all.
    """
    for point in importlib.metadata.entry_points(group="sdgraph.passes"):
        try:
            point.load()
        except Exception as error:  # one broken package must not take all others' passes along
            log.warning("the pass %s (%s) cannot be loaded: %s", point.name, point.value, error)
    return {
        name: one
        for name, one in _defined().items()
        if issubclass(one, kind) and one is not kind and one.__module__ not in ABSTRACT
    }


def import_module(name: str) -> None:
    """Import a module that defines passes, so that their text is understood; the current folder is searched too.

    Raises:
        SpecError: it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the code of the module raises
        raise SpecError(
            f"cannot import {name}: {type(error).__name__}: {error}",
            where=name,
            hint="name a module as Python's import does, without .py: one that is installed or in the current folder",
        ) from error


def _defined() -> dict[str, type[Spec]]:
    """The specs that are defined so far."""
    found: dict[str, type[Spec]] = {}
    stack = [Spec]
    while stack:
        for one in stack.pop().__subclasses__():
            found[one.__name__] = one  # a class defined again, as in a notebook, is the newest
            stack.append(one)
    return {name: one for name, one in found.items() if not name.startswith("_")}


def value_of(tree: ast.expr, text: str, kind: type[Spec]) -> Any:
    """What a piece of a spec stands for.

    Args:
        kind: the base class of the specs that make sense here.
    """
    if isinstance(tree, ast.Tuple | ast.List):
        return tuple(value_of(item, text, kind) for item in tree.elts)
    if isinstance(tree, ast.Name):
        return NUMBERS[tree.id] if tree.id in NUMBERS else _construct(tree, text, kind)
    if isinstance(tree, ast.UnaryOp) and ast.unparse(tree) in ("-inf", "-nan"):
        return -NUMBERS[ast.unparse(tree.operand)]
    if isinstance(tree, ast.Call) and all(k.arg for k in tree.keywords):
        name, dot, preset = ast.unparse(tree.func).partition(".")
        if name.isidentifier() and (preset.isidentifier() or not dot):
            return _construct(tree, text, kind)
    try:
        return ast.literal_eval(tree)
    except ValueError as error:
        raise SpecError(
            f"{ast.unparse(tree)!r} is neither a literal nor a call", where=text, hint="use literal arguments"
        ) from error


def presets(one: type[Spec]) -> dict[str, Any]:
    """The class methods of a spec class that construct it with options of some fame."""
    names = (n for n in dir(one) if not n.startswith("_") and isinstance(inspect.getattr_static(one, n), classmethod))
    return {name: getattr(one, name) for name in names}


def _named(name: str, preset: str, text: str, kind: type[Spec]) -> tuple[str, Any]:
    """The full name of a class or preset, and what constructs it."""
    classes = _defined()
    if name not in classes:
        known()  # loads what installed packages declare
        classes = _defined()
    if name not in classes:
        near = known(kind)
        otherwise = f"write text in quotes: {name!r}" if kind is Spec else f"known: {', '.join(sorted(near))}"
        hint = did_you_mean(name, near) or otherwise
        raise SpecError(f"no {kind.__name__.lower()} named {name!r}", where=text, hint=hint)
    if not preset:
        return name, classes[name]
    named = presets(classes[name])
    if preset not in named:
        hint = did_you_mean(preset, named) or f"presets: {', '.join(named) or 'none'}"
        raise SpecError(f"{name} has no preset {preset!r}", where=text, hint=hint)
    return f"{name}.{preset}", named[preset]


def _options(make: Any) -> dict[str, type[Spec]]:
    """The options of a class or preset, in order; each with the kind of specs that its annotation names."""
    annotated = make if isinstance(make, type) else make.__func__
    try:
        hints = typing.get_type_hints(annotated)
    except Exception:  # an annotation that only a type checker can resolve
        hints = {}
    return {name: _spec_in(hints.get(name)) for name in inspect.signature(make).parameters}


def _spec_in(hint: Any) -> type[Spec]:
    """The spec class that an annotation names, as in `tuple[Schedule, ...] | None`; `Spec` if it names none."""
    if isinstance(hint, type) and issubclass(hint, Spec):
        return hint
    inner = [_spec_in(each) for each in typing.get_args(hint)]
    return next((each for each in inner if each is not Spec), Spec)


def _construct(tree: ast.Name | ast.Call, text: str, kind: type[Spec]) -> Any:
    """A spec from its name or call."""
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    first, _, preset = ast.unparse(call.func).partition(".")
    name, make = _named(first, preset, text, kind)
    options = _options(make)
    kinds = [*options.values(), *[Spec] * len(call.args)]
    args = [value_of(each, text, kind) for each, kind in zip(call.args, kinds, strict=False)]
    kwargs = {}
    for keyword in call.keywords:
        option = str(keyword.arg)
        if option not in options:
            hint = did_you_mean(option, options) or f"options: {', '.join(options) or 'none'}"
            raise SpecError(f"{name} has no option {option!r}", where=text, hint=hint)
        kwargs[option] = value_of(keyword.value, text, options[option])
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        raise SpecError(
            f"cannot construct {name}: {error}", where=text, hint=f"options: {', '.join(options)}"
        ) from error
