"""What happened to a graph, pass by pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..ir.decisions import Decision
from ..views.format import columns


@dataclass(frozen=True)
class Size:
    """Size of a graph: nodes, parameters, and multiply-accumulates of one call at the nominal sizes."""

    nodes: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class NearMiss:
    """A place where a rewrite almost applied, and why it did not."""

    where: str
    reason: str
    matched: int = 0


@dataclass(frozen=True)
class PassReport:
    """One pass: what it promised, what it did, what it measured.

    Args:
        spec: the pass as text.
        contract: its numeric contract.
        before: sizes of the graph.
        after: the same, of the new graph.
        difference: largest absolute difference of the output on random inputs; None if not verified.
        seconds: wall time, verification included.
        edits: what it says it did, one line each.
        near_misses: where it almost applied, best first.
        children: reports of the passes inside it.
        decisions: what it decided by the numbers of weights, in order.
    """

    spec: str
    contract: str
    before: Size
    after: Size
    difference: float | None
    seconds: float
    edits: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    children: tuple[PassReport, ...] = ()
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Report:
    """All passes of an `apply`, in order. Prints as a table; `as_dict()` is plain data."""

    passes: tuple[PassReport, ...]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        head = ("pass", "contract", "nodes", "parameters", "GMACs", "difference", "seconds")
        rows: list[tuple[str, ...]] = [head]
        for p in self.passes:
            rows += _rows(p, 0)
        decided = [_decided(p) for p in self.passes if p.decisions]
        return "\n".join([columns(rows), *decided, *self.notes])

    def as_dict(self) -> dict[str, Any]:
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
    """The first decisions of a pass."""
    shown = p.decisions[:4]
    rest = f", and {len(p.decisions) - len(shown)} more" if len(p.decisions) > len(shown) else ""
    return f"{p.spec} decided {', '.join(map(str, shown))}{rest}"
