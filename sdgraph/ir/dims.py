"""Sizes: which dimensions of a value depend on the call, and how.

Every value of a graph is known at two calls: the *nominal* call (batch 1, the model's own sample size), for which costs
are quoted, and the *generic* call, whose sizes are odd and pairwise different. A dimension is dynamic if its sizes at
the two calls differ. Its name is the expression in the call's symbols (`B`, `H`, `W`, `L` ...) that gives both sizes.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError

Probe = tuple[int, int]  # (nominal, generic)


@dataclass(frozen=True)
class Symbol:
    """A free size of a call, with its values at the nominal and at the generic call."""

    name: str
    nominal: int
    generic: int


Number = int | float | bool
LONGEST, DEEPEST, LARGEST = 2000, 50, 1 << 53  # of an expression: characters, levels, every number in it and of it

_ARITHMETIC: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> Any:
    """Return the value of an expression, such as `ceil(H/8)*ceil(W/8)`, for given sizes.

    Raises:
        SpecError: the text is no such expression, or a number in it or its value is out of bounds. Expressions may come
            from files that are not trusted.
    """
    try:
        return _value(_parsed(expression), sizes)
    except (ArithmeticError, LookupError, TypeError) as error:
        raise _no_size(expression, f"{type(error).__name__}: {error}") from error


@functools.lru_cache(4096)
def _parsed(expression: str) -> ast.expr:
    """Return the checked syntax tree of an expression."""
    if not isinstance(expression, str) or len(expression) > LONGEST:
        raise _no_size(expression, f"a text of at most {LONGEST} characters is expected")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _no_size(expression, type(error).__name__) from error
    _check(tree, expression, 1)
    return tree


def _check(tree: ast.expr, expression: str, level: int) -> None:
    """Refuse everything but numbers, names, `ceil(...)`, arithmetic and comparisons."""
    if level > DEEPEST:
        raise _no_size(expression, f"nested more than {DEEPEST} deep")
    parts: list[ast.expr] = []
    match tree:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) <= LARGEST:
            pass
        case ast.Name(id=name) if re.fullmatch(r"[A-Za-z]\w{0,15}", name):
            pass
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            parts = [left, right]
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            parts = [left, right]
        case ast.Call(func=ast.Name(id="ceil"), args=[inner], keywords=[]):
            parts = [inner]
        case _:
            raise _no_size(expression, f"it has a {type(tree).__name__}")
    for part in parts:
        _check(part, expression, level + 1)


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> Number:
    match tree:
        case ast.Constant(value=value):
            return value  # type: ignore[return-value]
        case ast.Name(id=name):
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right):
            number = _ARITHMETIC[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARISONS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(args=[inner]):
            number = math.ceil(_value(inner, sizes))
        case _:
            raise AssertionError(ast.dump(tree))
    if not abs(number) <= LARGEST:
        raise ArithmeticError(f"more than {LARGEST}")
    return number  # type: ignore[no-any-return]


def _no_size(expression: object, reason: str) -> SpecError:
    hint = "numbers, sizes of the call, ceil(...), + - * / // % and one comparison"
    return SpecError(f"{str(expression)[:80]!r} is no size ({reason})", where="size expression", hint=hint)


class Dims:
    """Names dimensions by the symbols of a call.

    Args:
        symbols: the free sizes.
        spatial: names of the sizes that are also divided by powers of two and rounded up, as strided convolutions do,
            and multiplied with each other, as the number of tokens of an attention is.
    """

    def __init__(self, symbols: tuple[Symbol, ...], spatial: tuple[str, ...] = ("H", "W")) -> None:
        self.symbols = symbols
        names: dict[Probe, str] = {}
        scaled: dict[str, list[tuple[str, Probe]]] = {}
        for symbol in symbols:
            for power in range(9 if symbol.name in spatial else 1):
                by = 2**power
                probe = (math.ceil(symbol.nominal / by), math.ceil(symbol.generic / by))
                name = symbol.name if power == 0 else f"ceil({symbol.name}/{by})"
                names.setdefault(probe, name)
                scaled.setdefault(symbol.name, []).append((name, probe))
        batches = [s for s in symbols if s.name == "B"]
        pairs = zip(*(scaled[s] for s in spatial if s in scaled), strict=True) if len(scaled) > 1 else ()
        for levels in pairs:
            product = "*".join(name for name, _ in levels)
            probe = (math.prod(p[0] for _, p in levels), math.prod(p[1] for _, p in levels))
            names.setdefault(probe, product)
            for b in batches:
                names.setdefault((b.nominal * probe[0], b.generic * probe[1]), f"B*{product}")
        for (a, (an, ag)), (b_, (bn, bg)) in itertools.combinations(
            [(s.name, (s.nominal, s.generic)) for s in symbols], 2
        ):
            names.setdefault((an * bn, ag * bg), f"{a}*{b_}")
        self._names = names

    def name(self, nominal: int, generic: int) -> str | None:
        """Return the expression of a dynamic dimension, the digits of a static one, or None if none is known."""
        return str(nominal) if nominal == generic else self._names.get((nominal, generic))

    def expressions(self, nominal: Any, generic: Any) -> tuple[int | str, ...]:
        """Return the shape of a value: numbers for static dimensions, expressions for dynamic ones, "?" if unknown."""
        pairs = zip(nominal.shape, generic.shape, strict=True)
        return tuple(n if n == g else self.name(n, g) or "?" for n, g in pairs)

    def shape(self, nominal: Any, generic: Any) -> str:
        """Return the shape of a value as text, such as `B×320×H/2×W/2`."""
        parts = []
        for n, g in zip(nominal.shape, generic.shape, strict=True):
            name = self.name(n, g) or f"({n}|{g})"
            parts.append(re.sub(r"ceil\((.*?)\)", r"\1", name).replace("*", "·"))
        return "×".join(parts) if parts else "scalar"
