"""Sizes: which dimensions of a value move with the call, and how.

Every value of a graph is known at two calls: the *nominal* one (batch 1, the model's own sample size), which costs are
quoted for, and the *generic* one, whose sizes are odd and pairwise different. A dimension is dynamic exactly where the
two differ; its name is the expression in the call's own symbols (`B`, `H`, `W`, `L` ...) that gives both.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Probe = tuple[int, int]  # (nominal, generic)


@dataclass(frozen=True)
class Symbol:
    """One free size of a call, with its two probe values."""

    name: str
    nominal: int
    generic: int


def evaluate(expression: str, sizes: Mapping[str, int]) -> Any:
    """Value of an expression of this module, such as `ceil(H/8)*ceil(W/8)`, for given sizes."""
    return eval(expression, {"__builtins__": {}, "ceil": math.ceil}, dict(sizes))


class Dims:
    """Names dimensions by the symbols of a call.

    Args:
        symbols: the free sizes; those named in `spatial` are also tried divided by powers of two, rounded up
            (what a strided convolution makes of them), and multiplied with one another (tokens of an attention).
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
        """Expression of a dynamic dimension, the digits of a static one, None where no expression is known."""
        return str(nominal) if nominal == generic else self._names.get((nominal, generic))

    def expressions(self, nominal: Any, generic: Any) -> tuple[int | str, ...]:
        """The shape of a value: numbers where it is fixed, expressions where it moves, "?" where none is known."""
        pairs = zip(nominal.shape, generic.shape, strict=True)
        return tuple(n if n == g else self.name(n, g) or "?" for n, g in pairs)

    def shape(self, nominal: Any, generic: Any) -> str:
        """Readable shape of a value, e.g. `B×320×H/2×W/2`."""
        parts = []
        for n, g in zip(nominal.shape, generic.shape, strict=True):
            name = self.name(n, g) or f"({n}|{g})"
            parts.append(re.sub(r"ceil\((.*?)\)", r"\1", name).replace("*", "·"))
        return "×".join(parts) if parts else "scalar"
