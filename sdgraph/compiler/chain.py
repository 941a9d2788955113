"""Passes made of passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ..contract import Contract
from ..options import Count
from .base import Pass
from .parse import as_passes


@dataclass(frozen=True)
class Chain(Pass):
    """A pass that runs other passes in order. Its contract is the weakest of theirs, and it fails as a whole.

    Args:
        passes: the passes. Some may change nothing as long as another changes something.
        repeat: the largest number of rounds; rounds end when nothing changes any more.
    """

    passes: Annotated[tuple[Pass, ...], Any] = ()  # texts too, see `as_passes`
    repeat: Count = 1

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
    """A chain that repeats its passes until nothing changes. More than `repeat` rounds are an error."""

    repeat: Count = 10
