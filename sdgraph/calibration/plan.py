"""Plans of a search: what each call of a generation leaves out, and how what it leaves out is forecast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, pi, sin

from ..forecasts import DAMPING

STEP = 0.25  # by which a damping is moved

# Of a share of the refreshes, the share of the calls that they are among.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "even": lambda share: share,
    "early": lambda share: share**1.4,  # the power of DeepCache's DenseEarly
    "ends": lambda share: share - 0.6 / (2 * pi) * sin(2 * pi * share),
}


@dataclass(frozen=True)
class Call:
    """One call of a plan.

    Args:
        stale: the numbers of the candidates that it inherits or bypasses; without any, everything is computed.
        damping: of the line through the last two refreshes, for what it inherits.
    """

    stale: frozenset[int] = frozenset()
    damping: float = 0.0

    def __str__(self) -> str:
        return f"{'+'.join(map(str, sorted(self.stale)))}:{self.damping:g}" if self.stale else "*"


@dataclass(frozen=True)
class Plan:
    """The calls of a generation, the first of which computes everything. Prints as text that `read` reads."""

    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.calls))

    @classmethod
    def read(cls, text: str) -> Plan:
        """Return the plan of a text."""
        calls = []
        for word in text.split():
            stale, _, damping = word.partition(":")
            calls.append(Call() if word == "*" else Call(frozenset(map(int, stale.split("+"))), float(damping)))
        return cls(tuple(calls))

    @classmethod
    def spaced(cls, calls: int, refreshes: int, stale: frozenset[int], damping: float, shape: str = "even") -> Plan:
        """Return a plan with some calls that compute everything, spaced by one of `SHAPES`.

        An even spacing is that of `Uniform(n)` if that has as many.
        """
        at = {ceil(calls * SHAPES[shape](i / refreshes) - 1e-9) for i in range(refreshes)}
        uniform = set(range(0, calls, -(-calls // refreshes)))
        if shape == "even" and len(uniform) == refreshes:
            at = uniform
        return cls(tuple(Call() if n in at else Call(stale, damping) for n in range(calls)))

    def changed(self, number: int, call: Call) -> Plan:
        """Return the plan with another call in the place of one."""
        return Plan((*self.calls[:number], call, *self.calls[number + 1 :]))

    def neighbours(self, kinds: Collection[frozenset[int]]) -> Iterator[Plan]:
        """Yield the plans that differ by one move: two neighbouring calls change places, one call leaves out something
        else, or one damping is moved.

        Args:
            kinds: what a call may leave out.
        """
        dampings = [call.damping for call in self.calls if call.stale]
        usual = sorted(dampings)[len(dampings) // 2] if dampings else 0.0
        for number, call in enumerate(self.calls[1:], 1):
            before = self.calls[number - 1]
            if number > 1 and before.stale != call.stale:
                yield self.changed(number - 1, call).changed(number, before)
            for kind in kinds:
                if kind != call.stale:
                    yield self.changed(number, Call(kind, call.damping if call.stale else usual) if kind else Call())
            if call.stale:
                for damping in (call.damping - STEP, call.damping + STEP):
                    if damping in DAMPING:
                        yield self.changed(number, replace(call, damping=round(damping, 4)))
