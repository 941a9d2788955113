"""The contract of a pass: its promise about the outputs of the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from .errors import SpecError
from .options import NotNegative, check

Kind = Literal["exact", "close", "approximate"]


@dataclass(frozen=True)
class Contract:
    """A numeric promise: EXACT (bit for bit), CLOSE (within bounds) or APPROXIMATE (finite, another model on purpose).

    Use the three constants. A call of CLOSE sets other bounds.

    Args:
        kind: "exact", "close" or "approximate".
        rtol: the relative bound of CLOSE, as in `torch.allclose`.
        atol: the absolute bound of CLOSE, as in `torch.allclose`.
    Raises:
        SpecError: the kind is not one of these, or a bound is negative.
    Example:
        `contract = Contract.CLOSE(rtol=1e-3)`, in the class of a pass
    """

    kind: Kind
    rtol: NotNegative = 0.0
    atol: NotNegative = 0.0

    EXACT: ClassVar[Contract]
    CLOSE: ClassVar[Contract]
    APPROXIMATE: ClassVar[Contract]

    def __post_init__(self) -> None:
        check(self, SpecError, "Contract")

    def __call__(self, *, rtol: float | None = None, atol: float | None = None) -> Contract:
        if self.kind != "close":
            raise TypeError(f"{self} has no bounds to set: only CLOSE has bounds")
        return replace(self, rtol=self.rtol if rtol is None else rtol, atol=self.atol if atol is None else atol)

    def __str__(self) -> str:
        return f"CLOSE(rtol={self.rtol:g}, atol={self.atol:g})" if self.kind == "close" else self.kind.upper()

    def holds(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Return whether the contract allows an output to change.

        Args:
            before: the output before the pass, of any shape.
            after: the output after it.
        """
        if before.shape != after.shape or before.dtype != after.dtype:
            return False
        if self.kind == "exact":
            return torch.equal(before, after) or bool(((before == after) | (before.isnan() & after.isnan())).all())
        if self.kind == "close":
            return torch.allclose(before, after, rtol=self.rtol, atol=self.atol)
        return bool(after.isfinite().all()) or not bool(before.isfinite().all())

    @staticmethod
    def weakest(contracts: list[Contract]) -> Contract:
        """Return the promise of a sequence of passes: the weakest kind, with the sums of the bounds.

        Args:
            contracts: the contracts of the passes; without any the promise is EXACT.
        """
        rank: list[Kind] = ["exact", "close", "approximate"]
        kind = max((c.kind for c in contracts), key=rank.index, default=rank[0])
        close = [c for c in contracts if c.kind == "close"]
        if kind != "close":
            return Contract(kind)
        return Contract(kind, sum(c.rtol for c in close), sum(c.atol for c in close))


Contract.EXACT = Contract("exact")
Contract.CLOSE = Contract("close", rtol=1e-4, atol=1e-5)
Contract.APPROXIMATE = Contract("approximate")
