"""What a pass is, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..contract import Contract
from ..graph import Graph
from ..spec import Spec
from .report import NearMiss


@dataclass(frozen=True)
class Pass(Spec):
    """A transformation of a graph. Subclass it as a frozen dataclass; fields are its options.

    A pass edits the graph that it is given and nothing else. The runner gives it a copy, checks the edited copy against
    `contract`, and drops the copy if anything fails.

    Class attributes:
        contract: what the pass promises about the numbers.
        may_change_nothing: whether a run may have no effect; otherwise that is an error.
        requires: names of passes that must have run before.
        not_after: names of passes that must not have run before, with the reasons.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    may_change_nothing: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    not_after: ClassVar[Mapping[str, str]] = {}

    def run(self, graph: Graph) -> Findings | None:
        """Edit the graph; docs/writing-a-pass.md shows how.

        Decisions that depend on the values of weights go through `graph.decide`, and conditions on the sizes of calls
        through `graph.require`.

        Returns:
            The findings for the report, or None.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")

    def stages(self, graph: Graph) -> Sequence[Pass]:
        """Return passes that do the same one after another, and whose changes can be trained apart; see `incubate`.

        Args:
            graph: the graph that the pass would be applied to. It is not changed.
        Returns:
            The pass itself, where a pass does not say more.
        """
        return (self,)


@dataclass(frozen=True)
class Findings:
    """What a pass reports about its run.

    Args:
        edits: its edits, a line of text for each.
        near_misses: places where it almost applied.
    """

    edits: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
