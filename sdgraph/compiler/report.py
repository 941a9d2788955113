"""Reports: what passes did to a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..ir.decisions import Decision
from ..ir.edits import Edit
from ..ir.state import GraphState
from ..views.format import format_table


@dataclass(frozen=True)
class Size:
    """The size of a graph: nodes, parameters, and multiply-accumulates of a call at the nominal sizes."""

    nodes: int
    parameters: int
    macs: int

    @classmethod
    def of(cls, graph: GraphState) -> Size:
        """Return the size of a graph."""
        return cls(len(graph.fx.nodes), sum(p.numel() for p in graph.parameters().values()), graph.macs)


@dataclass(frozen=True)
class NearMiss:
    """A place where a pass almost applied.

    Args:
        where: the module path and node.
        reason: why the pass did not apply.
        matched: the number of operations that matched, by which near misses are ranked.
    """

    where: str
    reason: str
    matched: int = 0


@dataclass(frozen=True)
class PassReport:
    """The report of a pass.

    Args:
        spec: the pass as text.
        contract: its numeric contract as text.
        before: the size of the graph before.
        after: the size of the graph after.
        difference: the largest absolute difference of the output on random inputs; None if it was not verified.
        seconds: wall time in seconds, including verification.
        edits: the edits of the pass, which print as lines of text, in order.
        near_misses: places where the pass almost applied, best first.
        notes: further lines of text of the pass.
        children: the reports of the passes inside this one.
        decisions: decisions that depended on the values of weights, in order.
    """

    spec: str
    contract: str
    before: Size
    after: Size
    difference: float | None
    seconds: float
    edits: tuple[Edit, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    notes: tuple[str, ...] = ()
    children: tuple[PassReport, ...] = ()
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Report:
    """The report of an `apply`. It prints as a table.

    Args:
        passes: the reports of the passes, in order.
        notes: further lines of text.
    """

    passes: tuple[PassReport, ...]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        head = ("pass", "contract", "nodes", "parameters", "GMACs", "difference", "seconds")
        rows: list[tuple[str, ...]] = [head]
        for p in self.passes:
            rows += _rows(p, 0)
        decided = [_decided(p) for p in self.passes if p.decisions]
        found = [note for p in self.passes for note in p.notes]
        return "\n".join([format_table(rows), *decided, *found, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        from dataclasses import asdict

        return asdict(self)


def _rows(p: PassReport, depth: int) -> list[tuple[str, ...]]:
    def change(before: int, after: int, scale: float = 1.0, digits: int = 0) -> str:
        return f"{before / scale:.{digits}f} -> {after / scale:.{digits}f}"

    row = (
        "  " * depth + p.spec,
        p.contract,
        change(p.before.nodes, p.after.nodes),
        f"{change(p.before.parameters, p.after.parameters, 1e6, 2)} M",
        change(p.before.macs, p.after.macs, 1e9, 2),
        "-" if p.difference is None else f"{p.difference:.3g}",
        f"{p.seconds:.2f}",
    )
    return [row, *(r for child in p.children for r in _rows(child, depth + 1))]


def _decided(p: PassReport) -> str:
    """Return the first decisions of a pass as text."""
    shown = p.decisions[:4]
    rest = f", and {len(p.decisions) - len(shown)} more" if len(p.decisions) > len(shown) else ""
    return f"{p.spec} decided {', '.join(map(str, shown))}{rest}"
