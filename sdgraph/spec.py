"""Passes and their options as text: printed, parsed back, found by name.

The text is that of a Python call with literal arguments, of a class, `PruneBlocks('bk-sdm-base')`, or of one of its
presets, `InheritFeatures.deep_cache(3)`; nothing else of it is executed.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from .pass_ import Pass

log = logging.getLogger("sdgraph")


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


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(map(_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value) if isinstance(value, Spec) else repr(value)


def parse(text: str) -> tuple[Pass, ...]:
    """Passes from text: one or more calls separated by commas, such as `"CleanUp, PruneBlocks('bk-sdm-base')"`.

    Raises:
        SpecError: at what was not understood, with the nearest known name.
    """
    try:
        tree = ast.parse(f"({text},)" if text.strip() else "()", mode="eval").body
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {error.msg}", cure="write calls: \"CleanUp(), PruneBlocks('bk-sdm-base')\""
        ) from error
    assert isinstance(tree, ast.Tuple)
    return tuple(_as_pass(_value(item, text), text) for item in tree.elts)


def read(text: str) -> Spec:
    """One spec of any kind, such as a schedule, from the text that `str` made of it.

    Raises:
        SpecError: it is something else.
    """
    try:
        found = _value(ast.parse(text, mode="eval").body, text)
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {error.msg}", cure="write a call, as in 'Uniform(3)'"
        ) from error
    if not isinstance(found, Spec):
        raise SpecError(f"{text!r} is no spec", cure="write a call, as in 'Uniform(3)'")
    return found


def as_passes(passes: Any) -> tuple[Pass, ...]:
    """Passes from what `apply` takes: a pass, a spec, or an iterable of both.

    Raises:
        SpecError: something else is among them.
    """
    from .pass_ import Pass

    if isinstance(passes, str):
        return parse(passes)
    if isinstance(passes, Pass):
        return (passes,)
    if isinstance(passes, type) or not isinstance(passes, Iterable):
        raise _not_a_pass(passes)
    found: list[Pass] = []
    for item in passes:
        found += parse(item) if isinstance(item, str) else [_as_pass(item, "")]
    return tuple(found)


def _as_pass(value: Any, text: str) -> Pass:
    from .pass_ import Pass

    if not isinstance(value, Pass):
        raise _not_a_pass(value, text)
    return value


def _not_a_pass(value: Any, text: str = "") -> SpecError:
    if isinstance(value, type) and issubclass(value, Spec):
        cure = f"construct it: {value.__name__}(...)"
    else:
        cure = "pass objects of sdgraph.Pass or text specs"
    return SpecError(f"{value!r} is not a pass", where=text, cure=cure)


def known() -> dict[str, type[Spec]]:
    """Every spec class that can be named: those defined so far and those of installed packages' entry points."""
    for point in importlib.metadata.entry_points(group="sdgraph.passes"):
        try:
            point.load()
        except Exception as error:  # one broken package must not take all others' passes along
            log.warning("the pass %s (%s) cannot be loaded: %s", point.name, point.value, error)
    found: dict[str, type[Spec]] = {}
    stack = [Spec]
    while stack:
        for one in stack.pop().__subclasses__():
            found[one.__name__] = one  # a class defined again, as in a notebook, is the newest
            stack.append(one)
    return {name: one for name, one in found.items() if not name.startswith("_")}


def _value(tree: ast.expr, text: str) -> Any:
    if isinstance(tree, ast.Tuple | ast.List):
        return tuple(_value(item, text) for item in tree.elts)
    if isinstance(tree, ast.Name):
        return _construct(tree.id, (), {}, text)
    if isinstance(tree, ast.Call) and all(k.arg for k in tree.keywords):
        name, dot, preset = ast.unparse(tree.func).partition(".")
        if name.isidentifier() and (preset.isidentifier() or not dot):
            args = tuple(_value(a, text) for a in tree.args)
            kwargs = {str(k.arg): _value(k.value, text) for k in tree.keywords}
            return _construct(name, args, kwargs, text, preset)
    try:
        return ast.literal_eval(tree)
    except ValueError as error:
        raise SpecError(
            f"{ast.unparse(tree)!r} is neither a literal nor a call", where=text, cure="use literal arguments"
        ) from error


def presets(one: type[Spec]) -> dict[str, Any]:
    """The class methods of a spec class that construct it with options of some fame."""
    names = (n for n in dir(one) if not n.startswith("_") and isinstance(inspect.getattr_static(one, n), classmethod))
    return {name: getattr(one, name) for name in names}


def _construct(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], text: str, preset: str = "") -> Any:
    classes = known()
    if name not in classes:
        cure = did_you_mean(name, classes) or f"known: {', '.join(sorted(classes))}"
        raise SpecError(f"no pass named {name!r}", where=text, cure=cure)
    make: Any = classes[name]
    if preset:
        named = presets(classes[name])
        if preset not in named:
            cure = did_you_mean(preset, named) or f"presets: {', '.join(named) or 'none'}"
            raise SpecError(f"{name} has no preset {preset!r}", where=text, cure=cure)
        make, name = named[preset], f"{name}.{preset}"
    options = list(inspect.signature(make).parameters)
    for option in kwargs:
        if option not in options:
            cure = did_you_mean(option, options) or f"options: {', '.join(options) or 'none'}"
            raise SpecError(f"{name} has no option {option!r}", where=text, cure=cure)
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        raise SpecError(
            f"cannot construct {name}: {error}", where=text, cure=f"options: {', '.join(options)}"
        ) from error
