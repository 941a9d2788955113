"""Passes and their options as text: how they are printed, parsed, and looked up by name.

The text is a Python call with literal arguments: of a class, as in `PruneBlocks('bk-sdm-base')`, or of one of its
presets, as in `InheritFeatures.deep_cache(3)`. Parsing it executes nothing but that constructor.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import inspect
import logging
import math
import os
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from .errors import SdgraphError, SpecError, did_you_mean
from .options import Text, annotations_of, check, checked

log = logging.getLogger("sdgraph")

NUMBERS = {"inf": math.inf, "nan": math.nan}  # `repr` writes these floats as names, which are no literals


@dataclasses.dataclass(frozen=True)
class Spec:
    """The base class of passes and schedules: a frozen dataclass that prints as a call, which parses back to it.

    The constructor checks the options against their annotations, see `sdgraph.options`, and presets check their
    arguments. A `__post_init__` of a subclass runs afterwards, and only has to check combinations of options.

    Class attributes:
        refusal: the class of the error about a wrong option.
        has_text: whether every option must have a text, so that the spec can be saved.
        abstract: whether the class is a base or a combinator, which is not offered by name: `class Pass(Spec,
            abstract=True)`. It is not inherited.
    """

    refusal: ClassVar[type[SdgraphError]] = SpecError
    has_text: ClassVar[bool] = True
    abstract: ClassVar[bool] = False

    def __init_subclass__(cls, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.abstract = abstract
        for name, member in list(vars(cls).items()):
            if name == "__post_init__":
                setattr(cls, name, _after_check(member))
            elif isinstance(member, classmethod) and not name.startswith("_"):
                setattr(cls, name, classmethod(checked(cls.refusal, f"{cls.__name__}.{name}")(member.__func__)))

    def __post_init__(self) -> None:
        check(self, self.refusal, type(self).__name__)
        if self.has_text:
            for field in dataclasses.fields(self):
                if field.init and not _has_text(value := getattr(self, field.name)):
                    raise self.refusal(
                        f"{field.name} is {type(value).__name__}, which has no text to be saved and printed as",
                        where=type(self).__name__,
                        hint="options are numbers, text, None, tuples, lists and dicts of these, and other specs; a "
                        "function is best a method of the class, and a tensor the file that holds it",
                    )
        if not _ours(type(self)):
            _check_name(type(self).__name__, _ours)

    def __str__(self) -> str:
        parts = []
        fields = [field for field in dataclasses.fields(self) if field.init]
        for field in sorted(fields, key=lambda field: field.kw_only is True):
            value = getattr(self, field.name)
            if value != field.default:
                first = field is fields[0] and not field.kw_only
                parts.append(_text(value) if first else f"{field.name}={_text(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def specs(self) -> Iterator[Spec]:
        """Iterate over this spec and all specs among its options, to any depth.

        Returns:
            An iterator over specs, this one first.
        """
        yield self
        stack = [getattr(self, field.name) for field in dataclasses.fields(self)]
        while stack:
            value = stack.pop()
            if isinstance(value, Spec):
                yield from value.specs()
            elif isinstance(value, tuple):
                stack.extend(value)


def _after_check(own: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(own)
    def post_init(self: Any) -> None:
        Spec.__post_init__(self)
        own(self)

    return post_init


def _has_text(value: Any) -> bool:
    """Return whether the text of an option is a literal, or the call of a spec."""
    if isinstance(value, tuple | list | set):
        return all(map(_has_text, value))
    if isinstance(value, dict):
        return all(_has_text(part) for pair in value.items() for part in pair)
    return value is None or isinstance(value, Spec | str | bytes | bool | int | float | complex)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(map(_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value) if isinstance(value, Spec) else repr(value)


@checked()
def read(text: str, kind: type[Spec] = Spec) -> Spec:
    """Parse the text of one spec, such as a schedule.

    Args:
        text: a call, as `str` prints the spec.
        kind: the base class that the spec must have; by default any spec is accepted.
    Returns:
        The spec.
    Raises:
        SpecError: the text is not that of such a spec.
    Example:
        `read("Uniform(3)", Schedule)`
    """
    try:
        spec = value_of(ast.parse(text, mode="eval").body, text, kind)
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {error.msg}", hint="write a call, as in 'Uniform(3)'"
        ) from error
    if not isinstance(spec, Spec):
        raise SpecError(f"{text!r} is not a spec", hint="write a call, as in 'Uniform(3)'")
    return spec


def known(kind: type[Spec] = Spec) -> dict[str, type[Spec]]:
    """Return the spec classes that a text may name: those defined so far, and the entry points of installed packages.

    Args:
        kind: the base class of the classes to return, such as `Pass` or `Schedule`; by default all.
    Returns:
        The classes by name.
    """
    for point in importlib.metadata.entry_points(group="sdgraph.passes"):
        try:
            point.load()
        except Exception as error:  # one broken package must not hide the passes of all others
            log.warning("the pass %s (%s) cannot be loaded: %s", point.name, point.value, error)
    return {
        name: spec_class
        for name, spec_class in _defined().items()
        if issubclass(spec_class, kind) and spec_class is not kind and not spec_class.abstract
    }


@checked()
def import_module(name: Text) -> None:
    """Import a module that defines passes, so that they can be named in text. The current folder is searched too.

    Args:
        name: the name of the module, as in an `import` statement.
    Raises:
        SpecError: the module cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the code of the module raises
        raise SpecError(
            f"cannot import {name}: {type(error).__name__}: {error}",
            where=name,
            hint="name a module that is installed or in the current folder, as in an import statement, without .py",
        ) from error


def _classes() -> Iterator[type[Spec]]:
    """Iterate over the public spec classes that are defined so far, subclasses after their bases."""
    stack = [Spec]
    while stack:
        for spec_class in stack.pop().__subclasses__():
            stack.append(spec_class)
            if not spec_class.__name__.startswith("_"):
                yield spec_class


def _defined() -> dict[str, type[Spec]]:
    """Return these classes by name; of a class that is defined again, as in a notebook, the newest."""
    return {spec_class.__name__: spec_class for spec_class in _classes()}


def _ours(spec_class: type[Spec]) -> bool:
    return spec_class.__module__.partition(".")[0] == __package__


@functools.cache
def _declared() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return the entry points of installed packages by the names of their classes, read once."""
    points: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group="sdgraph.passes"):
        points.setdefault(point.attr, []).append(point)
    return points


def _check_name(name: str, concerns: Callable[[type[Spec]], bool] = lambda _: True) -> None:
    """Refuse a name that several classes have, whichever was defined first: a text would mean any of them.

    A class that is defined again, in a cell of a notebook or by reloading its module, is the same class.

    Args:
        name: the name.
        concerns: a predicate that at least one of the classes must meet for a conflict.
    Raises:
        SpecError: several classes have the name; the message names their modules.
    """
    for point in _declared().get(name, ()):
        try:
            point.load()
        except Exception as error:  # a package that cannot be loaded has no class of the name
            log.warning("the pass %s (%s) cannot be loaded: %s", point.name, point.value, error)
    if len(_places(name, concerns)) < 2:
        return
    gc.collect()  # a deleted class lives until the next collection
    where = _places(name, concerns)
    if len(where) < 2:
        return
    raise SpecError(
        f"{len(where)} classes are named {name}: {' and '.join(where)}",
        where=name,
        hint="give yours another name, and delete the class of the old name or start Python anew",
    )


def _places(name: str, concerns: Callable[[type[Spec]], bool]) -> list[str]:
    """Return the places where classes of a name are defined, if the predicate holds for one of them."""
    named = {_origin(c): c for c in _classes() if c.__name__ == name}
    concerned = any(map(concerns, named.values()))
    return sorted(f"{c.__module__}.{c.__qualname__}" for c in named.values()) if concerned else []


def _origin(spec_class: type[Spec]) -> tuple[str, str]:
    """Return the file, or the module without a file, that defines a class, and its name there."""
    module = sys.modules.get(spec_class.__module__)
    return getattr(module, "__file__", None) or spec_class.__module__, spec_class.__qualname__


def value_of(tree: ast.expr, text: str, kind: type[Spec]) -> Any:
    """Return the value of a part of a spec's text.

    Args:
        tree: the syntax tree of the part.
        text: the whole text, for error messages.
        kind: the base class of the specs that are allowed here.
    Raises:
        SpecError: the part is neither a literal nor a call of a known spec class or preset.
    """
    if isinstance(tree, ast.Tuple | ast.List):
        return tuple(value_of(item, text, kind) for item in tree.elts)
    if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name):
        return _construct(tree, text, kind)  # a preset with its default options
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


def presets(spec_class: type[Spec]) -> dict[str, Any]:
    """Return the presets of a spec class by name: class methods that construct it with well-known options."""
    names = (name for name in dir(spec_class) if not name.startswith("_"))
    return {
        name: getattr(spec_class, name)
        for name in names
        if isinstance(inspect.getattr_static(spec_class, name), classmethod)
    }


def _named(name: str, preset: str, text: str, kind: type[Spec]) -> tuple[str, Any]:
    """Return the full name of a class or a preset, and its constructor."""
    _check_name(name)
    classes = _defined()
    if name not in classes:
        known()  # loads what installed packages declare
        classes = _defined()
    if name not in classes:
        names = known(kind)
        otherwise = f"write text in quotes: {name!r}" if kind is Spec else f"known: {', '.join(sorted(names))}"
        hint = did_you_mean(name, names) or otherwise
        raise SpecError(f"there is no {kind.__name__.lower()} named {name!r}", where=text, hint=hint)
    if not preset:
        return name, classes[name]
    constructors = presets(classes[name])
    if preset not in constructors:
        hint = did_you_mean(preset, constructors) or f"presets: {', '.join(constructors) or 'none'}"
        raise SpecError(f"{name} has no preset {preset!r}", where=text, hint=hint)
    return f"{name}.{preset}", constructors[preset]


def _options(constructor: Any) -> dict[str, type[Spec]]:
    """Return the options of a class or a preset in order, with the spec class that each annotation names."""
    hints = annotations_of(constructor if isinstance(constructor, type) else constructor.__func__)
    return {name: _spec_in(hints.get(name)) for name in inspect.signature(constructor).parameters}


def _spec_in(hint: Any) -> type[Spec]:
    """Return the spec class that an annotation names, as in `tuple[Schedule, ...] | None`, else `Spec`."""
    if isinstance(hint, type) and issubclass(hint, Spec):
        return hint
    inner = (_spec_in(argument) for argument in typing.get_args(hint))
    return next((spec_class for spec_class in inner if spec_class is not Spec), Spec)


def _construct(tree: ast.Name | ast.Attribute | ast.Call, text: str, kind: type[Spec]) -> Any:
    """Construct a spec from its name or call."""
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    first, _, preset = ast.unparse(call.func).partition(".")
    name, constructor = _named(first, preset, text, kind)
    options = _options(constructor)
    kinds = [*options.values(), *[Spec] * len(call.args)]  # too many arguments are refused below
    args = [value_of(argument, text, kind) for argument, kind in zip(call.args, kinds, strict=False)]
    kwargs = {}
    for keyword in call.keywords:
        option = str(keyword.arg)
        if option not in options:
            hint = did_you_mean(option, options) or f"options: {', '.join(options) or 'none'}"
            raise SpecError(f"{name} has no option {option!r}", where=text, hint=hint)
        kwargs[option] = value_of(keyword.value, text, options[option])
    try:
        return constructor(*args, **kwargs)
    except TypeError as error:
        raise SpecError(
            f"cannot construct {name}: {error}", where=text, hint=f"options: {', '.join(options)}"
        ) from error
