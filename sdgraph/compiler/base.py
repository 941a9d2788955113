"""What a pass is, and passes made of passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..contract import Contract
from ..graph import Graph
from ..spec import Spec
from .report import NearMiss


@dataclass(frozen=True)
class Pass(Spec):
    """A transformation of a graph. Subclass it as a frozen dataclass; fields are its options.

    A pass edits the graph it is given and nothing else; the runner hands it a copy, checks what comes out against
    `contract`, and drops the copy if anything fails.

    Class attributes:
        contract: what it promises about the numbers.
        may_change_nothing: a run without effect is fine; otherwise it is an error.
        requires: names of passes that must have run before.
        not_after: names of passes it must not follow, each with the reason.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    may_change_nothing: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    not_after: ClassVar[Mapping[str, str]] = {}

    def run(self, graph: Graph) -> Findings | None:
        """Edit the graph; docs/writing-a-pass.md shows how.

        What it decides by the numbers of weights it asks by `graph.decide`, and sizes that it needs it states by
        `graph.require`.

        Returns:
            what the report should tell, or None.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")


@dataclass(frozen=True)
class Findings:
    """What a pass tells about its run: its edits, one line each, and where it almost applied."""

    edits: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
