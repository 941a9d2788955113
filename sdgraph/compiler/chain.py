"""Passes made of passes."""

from __future__ import annotations

from dataclasses import dataclass

from ..contract import Contract
from .base import Pass
from .parse import as_passes


@dataclass(frozen=True)
class Chain(Pass):
    """Passes in order, as one: it promises what the weakest of them promises, and fails as a whole.

    Args:
        passes: the passes; one that changes nothing is fine as long as another changes something.
        repeat: run them again until nothing changes any more, this many times at most.
    """

    passes: tuple[Pass, ...] = ()
    repeat: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", as_passes(self.passes))

    @property
    def contract(self) -> Contract:  # type: ignore[override]
        return Contract.weakest([p.contract for p in self.passes])

    @property
    def may_change_nothing(self) -> bool:  # type: ignore[override]
        return all(p.may_change_nothing for p in self.passes)


@dataclass(frozen=True)
class Fixpoint(Chain):
    """Passes run in order, again and again until nothing changes; more than `repeat` rounds is an error."""

    repeat: int = 10
