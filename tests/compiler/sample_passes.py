"""Passes that do little, or what they should not, for tests of the runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdgraph import Contract, Findings, Graph, Pass


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the output."""

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    by: float = 2.0

    def run(self, graph: Graph) -> Findings:
        out = graph.output
        graph.insert_after(out, lambda x: x * self.by)
        return Findings(notes=(f"scaled {out.name}",))


@dataclass(frozen=True)
class LyingScale(Scale):
    """Says EXACT, is not; in the middle of the graph."""

    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph: Graph) -> Findings:
        graph.insert_after(graph.region("mid_block.resnets.0").output, lambda x: x * self.by)
        return Findings()


@dataclass(frozen=True)
class Nothing(Pass):
    def run(self, graph: Graph) -> None:
        return None


@dataclass(frozen=True)
class NothingAndFine(Nothing):
    may_change_nothing: ClassVar[bool] = True
