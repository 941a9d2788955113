"""The rows of a graph's text: a row is a region, or an operation of a region that is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from ..ir.nodes import weights_read
from ..ir.regions import region_at
from ..ir.state import GraphState
from .format import count, span
from .lines import inputs_of, is_line, outputs_of
from .notation import Notation
from .words import module_words, relative, shape_words, substance


@dataclass(frozen=True)
class Row:
    """A line of the text: a statement, and facts about the nodes that it stands for."""

    indent: int
    statement: str
    callee: str
    source: str = ""
    shape: str = ""
    parameters: int = 0
    macs: int = 0
    does: tuple[str, ...] = ()
    opens: bool = False

    def key(self) -> tuple[Any, ...]:
        """A key that is equal for rows that do the same, regardless of the names of values."""
        if self.opens:  # its rows tell what changed inside
            return (self.indent, self.callee, self.source)
        return (self.indent, self.callee, self.source, self.shape, self.parameters, self.macs, self.does)


def aligned(rows: Sequence[Row], total: int, shares: bool = True) -> list[str]:
    """Rows as lines of text, in columns.

    Args:
        total: multiply-accumulates of the graph, which shares are of.
        shares: add a column of them.
    """
    cells = []
    for row in rows:
        share = f"{100 * row.macs / total:.1f} %" if shares and row.macs else ""
        parameters = count(row.parameters) if row.parameters else ""
        cells.append(("  " * row.indent + row.statement, row.source, row.shape, parameters, share))
    full = [c for c in cells if any(c[1:])]
    widths = [max((len(c[i]) for c in full), default=0) for i in range(5)]
    lines = []
    for statement, source, shape, parameters, share in cells:
        line = f"{statement.ljust(widths[0])}  {source.ljust(widths[1])}  {shape.ljust(widths[2])}"
        lines.append(f"{line}  {parameters.rjust(widths[3])}  {share.rjust(widths[4])}".rstrip())
    return lines


class Sheet:
    """Lays a graph out in rows, and names its values as they appear.

    Args:
        graph: the graph to lay out.
        depth: the levels of regions that are opened.
        within: the path of a region whose single operations are laid out instead.
    """

    def __init__(self, graph: GraphState, depth: int = 3, within: str = "") -> None:
        self.graph, self.depth, self.within = graph, depth, within
        self.notation = Notation(graph, within)
        self.held = _parameter_counts(graph)
        self.rows: list[Row] = []
        self.seen: set[str] = set()  # weights are counted where they appear first
        self.begun: set[str] = set()  # a pass may have put other nodes between those of a region
        nodes = region_at(graph, within).nodes if within else graph.fx.nodes
        shown = [n for n in nodes if n.op not in ("placeholder", "output") and is_line(n)]
        self.given = inputs_of(shown)
        self.leaves, self.flat = _simple_paths(graph)
        if within:
            for node in self.given:
                self.notation.names.setdefault(node, self.notation.fresh("%"))
            for node in shown:
                self._operation(node, 0)
        else:
            self._lay_out(shown, 0, "")

    def _lay_out(self, nodes: Iterable[fx.Node], level: int, parent: str) -> None:
        for (kind, key), run in groupby(nodes, key=lambda n: self._item(n, level)):
            inside = list(run)
            if kind == "region":
                self._region(key, inside, level, parent)
            elif kind == "optional":
                self._optional(inside, level)
            else:
                self._operation(inside[0], level)

    def _item(self, node: fx.Node, level: int) -> tuple[str, str]:
        stack = list(node.meta.get("nn_module_stack", {}))
        if len(stack) > level:
            return "region", stack[level]
        residual = self.notation.residual(node)
        return ("optional", residual[1]) if residual is not None else ("node", node.name)

    def _region(self, path: str, inside: list[fx.Node], level: int, parent: str) -> None:
        callee, source = relative(path, parent), self.graph.classes.get(path, "inserted")
        if path in self.begun and path not in self.leaves:
            source = "continued"
        self.begun.add(path)
        if path not in self.leaves and level + 3 + (path in self.flat) <= self.depth:
            seen = set(self.seen)
            self._add(level, f"{callee}:", callee, source, inside, opens=True)
            self.seen = seen
            self._lay_out(inside, level + 1, path)
            return
        given = ", ".join(self.notation.value(n) for n in inputs_of(inside))
        results = outputs_of(inside)
        names = ", ".join(self.notation.name(n) for n in results)
        shape = ", ".join(dict.fromkeys(shape_words(self.graph, n) for n in results))
        self._add(level, f"{names} = {callee}({given})", callee, source, inside, shape)

    def _optional(self, inside: list[fx.Node], level: int) -> None:
        """Add a row for the additions of optional residuals; those of a list share a row."""
        if len(inside) == 1:
            self._operation(inside[0], level)
            return
        added = [n for node in inside for n in node.all_input_nodes if n.name in self.notation.optional]
        names = ", ".join(self.notation.name(node) for node in inside)
        residuals = span([n.name for n in added])
        self._add(level, f"{names} = each + {residuals}", f"+ {residuals}", "", inside)

    def _operation(self, node: fx.Node, level: int) -> None:
        expression = self.notation.expression(node)
        source = module_words(self.graph, node) if node.op == "call_module" else ""
        callee = self.notation.callee(node)
        self._add(
            level, f"{self.notation.name(node)} = {expression}", callee, source, [node], shape_words(self.graph, node)
        )

    def _add(
        self,
        level: int,
        statement: str,
        callee: str,
        source: str,
        inside: list[fx.Node],
        shape: str = "",
        opens: bool = False,
    ) -> None:
        new = self._targets(inside) - self.seen
        self.seen |= new
        work = sum(map(self.graph.macs_of, inside))
        held = sum(self.held.get(t, 0) for t in new)
        self.rows.append(Row(level, statement, callee, source, shape, held, work, substance(self.graph, inside), opens))

    def _targets(self, inside: list[fx.Node]) -> set[str]:
        reads = {n for node in inside for n in node.all_input_nodes if n.op == "get_attr"}
        return set(weights_read((*inside, *reads)))


def _simple_paths(graph: GraphState) -> tuple[set[str], set[str]]:
    """Return the paths of PyTorch's modules, and the paths of regions that hold only such modules."""
    stacks = [(list(n.meta.get("nn_module_stack", {})), n) for n in graph.fx.nodes]
    others = {s[-1] for s, n in stacks if s and not (n.op == "call_module" and n.target == s[-1])}
    paths = {path for stack, _ in stacks for path in stack}
    outer = {path for stack, _ in stacks for path in stack[:-1]}
    leaves = paths - others - outer
    deep = {path for stack, _ in stacks for i, path in enumerate(stack) if set(stack[i + 1 :]) - leaves}
    return leaves, paths - leaves - deep


def _parameter_counts(graph: GraphState) -> dict[str, int]:
    """Return the number of parameters of every tensor and every module, by path."""
    held: dict[str, int] = {}
    for name, parameter in graph.parameters().items():
        held[name] = parameter.numel()
        owner = name.rpartition(".")[0]
        held[owner] = held.get(owner, 0) + parameter.numel()
    return held
