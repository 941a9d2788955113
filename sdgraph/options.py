"""Options: values that are checked against their annotations once, when an object is made from them.

The range of an option is part of its annotation: `Annotated[int, Bounds(ge=1)]`, or `Count` for short. Specs check all
their options this way, without further code. An option whose values no annotation describes is annotated `Any`, or
`Annotated[tuple[Layer, ...], Any]` for a type checker.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, ParamSpec, TypeAlias, TypeVar, Union

from .errors import SdgraphError, SpecError, did_you_mean

__all__ = [
    "Bounds",
    "Budget",
    "Count",
    "Finite",
    "Index",
    "Misfit",
    "Neighbours",
    "NotNegative",
    "Number",
    "Paths",
    "Positive",
    "Seed",
    "Share",
    "Text",
    "annotations_of",
    "check",
    "checked",
    "described",
    "fitted",
]


def __dir__() -> list[str]:
    return __all__


P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of an option, as part of its annotation.

    Args:
        ge: the smallest number allowed.
        gt: the exclusive lower bound.
        le: the largest number allowed.
        lt: the exclusive upper bound.
        length: the smallest length of a text or a tuple.
        ascending: whether no number of a tuple is below the one before it.
    Example:
        `ratio: Annotated[float, Bounds(gt=0, le=0.5)] = 0.5`
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    length: int = 0
    ascending: bool = False

    def __contains__(self, value: Any) -> bool:
        """Return whether a value is in the range; nan is in no range."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (not self.length or len(value) >= self.length)
            and (not self.ascending or list(value) == sorted(value))
        )

    def __str__(self) -> str:
        low = "" if self.gt is None else f"above {self.gt:g}" if self.gt > -math.inf else ""
        low = low if self.ge is None else f"of at least {self.ge:g}" if self.ge > -math.inf else ""
        high = "" if self.le is None or self.le == math.inf else f"at most {self.le:g}"
        high = high if self.lt is None else f"below {self.lt:g}" if self.lt < math.inf else ""
        if low.startswith("of") and high.startswith("at"):
            return f"from {self.ge:g} to {self.le:g}"
        return " and ".join(filter(None, (low, high, "in ascending order" * self.ascending)))


Count = Annotated[int, Bounds(ge=1)]
Index = Annotated[int, Bounds(ge=0)]
Number = Annotated[float, Bounds(ge=-math.inf, le=math.inf)]  # and not nan
Finite = Annotated[float, Bounds(gt=-math.inf, lt=math.inf)]
Positive = Annotated[float, Bounds(gt=0, lt=math.inf)]
NotNegative = Annotated[float, Bounds(ge=0, lt=math.inf)]
Share = Annotated[float, Bounds(ge=0, le=1)]
Budget = Annotated[float, Bounds(gt=0, le=1)]
Neighbours: TypeAlias = Annotated[tuple[Count, Count], Bounds(ascending=True)]
Seed = Annotated[int, Bounds(ge=0, lt=2**63)]
Text = Annotated[str, Bounds(length=1)]
Paths: TypeAlias = Text | Annotated[tuple[Text, ...], Bounds(length=1)]

_SHOWN = 80  # characters of a value in a message
_resolved: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


class Misfit(ValueError):
    """A value is not what an annotation describes."""


def fitted(value: Any, kind: Any) -> Any:
    """Return a value as an annotation describes it.

    A list becomes a tuple, and a scalar of NumPy or PyTorch one of Python, so that options print as literals. `Any` and
    protocols accept every value.

    Args:
        value: the value.
        kind: the annotation.
    Raises:
        Misfit: the value has another type, or is out of range.
    Example:
        `fitted([0, 2], tuple[int, ...])` is `(0, 2)`
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str | os.PathLike) and "\0" in str(value):  # no file name may contain it
        raise Misfit(f"{described(kind)} without the character 0")
    if origin is Annotated:
        if Any in arguments[1:]:
            return value
        result = fitted(value, arguments[0])
        if not all(result in bounds for bounds in arguments[1:] if isinstance(bounds, Bounds)):
            raise Misfit(described(kind))
        return result
    if origin in (Union, types.UnionType):
        for member in arguments:
            try:
                return fitted(value, member)
            except Misfit:
                continue
        raise Misfit(described(kind))
    if origin is Literal:
        plain = _plain(value)
        if not any(type(plain) is type(known) and plain == known for known in arguments):
            raise Misfit(did_you_mean(plain, map(str, arguments)) if isinstance(plain, str) else "")
        return plain
    if kind is Any:
        return value
    if kind in (None, type(None)):
        if value is not None:
            raise Misfit(described(kind))
        return None
    if kind in (bool, int, float, str):
        plain = _plain(value)
        if type(plain) is not kind and not (kind is float and type(plain) is int and abs(plain) < sys.float_info.max):
            raise Misfit(described(kind))
        return plain
    return _contained(value, kind, origin or kind, arguments)


def _contained(value: Any, kind: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a value of another class, and of a container with fitted elements."""
    if origin is tuple and not isinstance(value, tuple):
        try:
            given = value.tolist() if hasattr(value, "tolist") else value
        except (RuntimeError, TypeError):  # a tensor without values
            raise Misfit(described(kind)) from None
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | set | frozenset):
            raise Misfit(described(kind))
        value = tuple(given)
    if not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return value
    if not isinstance(value, origin) or (isinstance(value, str | bytes) and arguments):  # text is no sequence of texts
        raise Misfit(described(kind))
    if origin.__module__ == "collections.abc" and getattr(value, "ndim", 1) == 0:  # a scalar has __iter__, and refuses
        raise Misfit(described(kind))
    if not arguments:
        return value
    elements: Any = value
    if isinstance(elements, Mapping) and len(arguments) == 2:
        return {fitted(key, arguments[0]): fitted(item, arguments[1]) for key, item in elements.items()}
    if isinstance(elements, tuple):
        kinds = arguments if origin is tuple and arguments[-1] is not ... else arguments[:1] * len(elements)
        if len(kinds) != len(elements):
            raise Misfit(described(kind))
        return tuple(map(fitted, elements, kinds))
    if isinstance(elements, list | set | frozenset):
        return type(elements)(fitted(item, arguments[0]) for item in elements)
    if isinstance(elements, range):  # whose numbers lie between its ends
        for end in (*elements[:1], *elements[-1:]):
            fitted(end, arguments[0])
    return value


def _plain(value: Any) -> Any:
    """Return a scalar of NumPy or PyTorch, or of a subclass of Python's, as Python's own."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, TypeError):  # a tensor without values
            return value
    for kind in (int, float, str):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind.__str__(value) if kind is str else kind(value)
    return value


def described(kind: Any) -> str:
    """Return the values that an annotation accepts, in words.

    Args:
        kind: the annotation.
    Example:
        `described(Count)` is `"a whole number of at least 1"`
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        text = described(arguments[0])
        for bounds in (one for one in arguments[1:] if isinstance(one, Bounds)):
            noun = text.split(",")[0]
            text = text.replace(noun, f"{noun} that is not empty" if bounds.length else noun, 1)
            text = text.replace("a number", "a finite number") if bounds.lt == math.inf else text
            text = f"{text} {bounds}".strip()
        return text
    if origin in (Union, types.UnionType):
        return ", or ".join(map(described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    names: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    names |= {None: "None", type(None): "None", Any: "anything"}
    if kind in names:
        return names[kind]
    if origin is tuple and arguments and arguments[-1] is ...:
        return f"a tuple, of which each is {described(arguments[0])}"
    if origin is tuple:
        return f"a tuple of {len(arguments)}: {'; '.join(map(described, arguments))}"
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        return f"a mapping from {described(arguments[0])} to {described(arguments[1])}"
    if isinstance(origin, type) and issubclass(origin, Iterable) and arguments:
        return f"a {origin.__name__.lower()}, of which each is {described(arguments[0])}"
    name = getattr(origin or kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def annotations_of(owner: Any) -> dict[str, Any]:
    """Return the annotations of a class or a function by name, except those that only a type checker can resolve.

    Args:
        owner: the class, including the annotations of its bases, or the function.
    Example:
        `annotations_of(Uniform)["interval"]` is `Count`
    """
    if owner in _resolved:
        return _resolved[owner]
    found: dict[str, Any] = {}
    whole = True
    for part in reversed(owner.__mro__) if isinstance(owner, type) else (inspect.unwrap(owner),):
        names = vars(sys.modules.get(part.__module__, typing))
        for name, text in vars(part).get("__annotations__", getattr(part, "__annotations__", {})).items():
            try:
                one = types.SimpleNamespace(__annotations__={name: text})
                hints = typing.get_type_hints(one, names, dict(vars(part)), include_extras=True)
            except Exception:  # whatever the text of an annotation raises
                whole = False
                found.pop(name, None)
            else:
                found |= hints
    if whole:  # otherwise a module may still be importing a name that it annotates with
        _resolved[owner] = found
    return found


def check(instance: Any, refusal: type[SdgraphError] = SpecError, where: str = "") -> None:
    """Check the fields of a dataclass against their annotations, and replace them by the values of `fitted`.

    Args:
        instance: the object, which may be frozen.
        refusal: the class of the error.
        where: the place that the error names; by default the name of the field.
    Raises:
        SdgraphError: a field has another type than it is annotated with, or is out of range.
    Example:
        `check(self, ScheduleError)`, in the `__post_init__` of a dataclass
    """
    hints = annotations_of(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name, None)
        implied = value is None and field.default is None  # `size: int = None` allows None
        if field.init and field.name in hints and not implied:
            object.__setattr__(instance, field.name, _option(field.name, value, hints[field.name], refusal, where))


def checked(
    refusal: type[SdgraphError] = SpecError, where: str = "", options: Callable[[Iterable[str]], None] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of functions that checks the arguments of calls against their annotations.

    Args:
        refusal: the class of the error.
        where: the place that the error names; by default the name of the argument.
        options: a function that refuses the unknown ones among names of `**options`, before Python finds that another
            argument is missing.
    Raises:
        SdgraphError: at a call, an argument has another type or is out of range.
    Example:
        `@checked(TuningError)`
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if options is not None:
                options([name for name in kwargs if name not in signature.parameters])
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # raises Python's own message about the call
            hints = annotations_of(function)
            for name, value in bound.arguments.items():
                parameter = signature.parameters[name]
                implied = value is None and parameter.default is None
                if name in hints and not implied and "VAR_" not in parameter.kind.name:
                    bound.arguments[name] = _option(name, value, hints[name], refusal, where)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _option(name: str, value: Any, kind: Any, refusal: type[SdgraphError], where: str) -> Any:
    try:
        return fitted(value, kind)
    except Misfit as misfit:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        meant = str(misfit) if str(misfit).startswith("did you mean") else ""
        hint = f"{meant} {name} is {described(kind)}".strip()
        if isinstance(value, type) and isinstance(kind, type) and issubclass(value, kind):
            hint = f"construct it: {value.__name__}(...)"
        raise refusal(f"{name} is {shown}", where=where or name, hint=hint) from None
