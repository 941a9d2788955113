"""A graph as text for people: folded by module, with values named in the order in which they appear."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import groupby

from torch import fx

from ..forecasts import REPEAT
from ..ir.inputs import Input
from ..ir.regions import region_at
from ..ir.state import GraphState
from .format import cost, count, several, span
from .sheet import Row, Sheet, aligned
from .words import relative, shape_words, short_name


def text(graph: GraphState, depth: int = 3, within: str = "") -> str:
    """Return a graph as text. Graphs of the same structure have the same text.

    Args:
        depth: levels of nesting that are shown: 1 is the header, 2 the blocks, 3 their layers (resnets, attentions), 4
            and more their parts. A region that holds only single operations opens one level later than others.
        within: the path of a region whose single operations are shown instead.
    Raises:
        PathError: there is no such path in the graph.
    """
    if within:
        return _region_text(graph, within)
    lines = [*_head(graph), "", *_inputs(graph)]
    if depth > 1:
        sheet = Sheet(graph, depth)
        lines += ["", *aligned(sheet.rows, graph.macs), f"return {sheet.notation.value(graph.output)}"]
        if any(re.search(r"/\d", row.shape) for row in sheet.rows):
            lines[1] += "; H/2 is half of H, rounded up" if "H" in lines[1] else "; a/2 is half of a, rounded up"
    if graph.sites:
        lines += ["", "inherited", *_inherited(graph)]
    if graph.removed:
        width = max(map(len, graph.removed))
        lines += ["", "removed"]
        lines += [f"  {path.ljust(width)}  by {spec}{_left(graph, path)}" for path, spec in graph.removed.items()]
    return "\n".join(lines)


def diff(before: GraphState, after: GraphState, depth: int = 3) -> str:
    """Return the regions that were removed (-), added (+) or changed (both), with the blocks that hold them.

    The numbers in names of values and the shares of the total are not compared, because every edit changes them.
    """
    sheets = [Sheet(graph, depth) for graph in (before, after)]
    old, new = ([row.key() for row in sheet.rows] for sheet in sheets)
    shown: list[Row] = []
    signs: list[str] = []
    pending: dict[int, Row] = {}  # headers of the current blocks that are not shown yet, by indentation

    def show(sign: str, row: Row) -> None:
        for indent in sorted(k for k in pending if k < row.indent):
            shown.append(pending.pop(indent))
            signs.append(" ")
        shown.append(row)
        signs.append(sign)

    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for row in sheets[1].rows[c:d] if tag == "equal" else ():
            pending = {k: v for k, v in pending.items() if k < row.indent}
            if row.opens:
                pending[row.indent] = row
        if tag != "equal":
            for sign, rows in (("-", sheets[0].rows[a:b]), ("+", sheets[1].rows[c:d])):
                for row in rows:
                    show(sign, row)
    lines = aligned(shown, after.macs, shares=False)
    return "\n".join(f"{sign} {line}" for sign, line in zip(signs, lines, strict=True))


def _inherited(graph: GraphState) -> list[str]:
    """Return a line for every schedule: its sites, and the cost of a call that inherits them."""
    groups: dict[str, list[str]] = {}
    for name, site in graph.sites.items():
        forecast = f", forecast {site.forecast}" if site.forecast != REPEAT else ""
        groups.setdefault(f"{site.schedule}{forecast}{', bypassed' * site.bypassed}", []).append(name)
    return [
        f"  {schedule}: {several(names)}; without: {graph.call_macs(names) / graph.macs:.1%} of the MACs"
        for schedule, names in groups.items()
    ]


# -- the parts of the text -----------------------------------------------------------------------------------


def _head(graph: GraphState) -> list[str]:
    name = graph.config.get("_class_name", "UNet2DConditionModel" if graph.config else "Graph")
    free = [s for s in graph.dims.symbols if any(_mentions(i, s.name) for i in graph.inputs)]
    sizes = ", ".join(f"{s.name}={s.nominal}" for s in free)
    total = sum(p.numel() for p in graph.parameters().values())
    sums = f"{len(graph.nodes)} nodes, {count(total)} parameters, {cost(graph.macs)}"
    lines = [f"{name}: {sums}" + (f" at {sizes}" if sizes else "")]
    lines.append("free sizes: " + (", ".join(s.name for s in free) or "none"))
    if graph.passes:
        lines.append(f"passes: {', '.join(map(str, graph.passes))}")
    return lines


def _mentions(spec: Input, symbol: str) -> bool:
    return any(re.search(rf"\b{symbol}\b", str(d)) for d in spec.shape or ())


def _inputs(graph: GraphState) -> list[str]:
    """Return a line for every input; the residuals of a list share a line."""
    placeholders = {n.name: n for n in graph.fx.nodes if n.op == "placeholder"}
    rows = []
    for (_, folds), group in groupby(graph.inputs, key=lambda i: (i.place[0], i.shape is None)):
        specs = [spec for spec in group if spec.name in placeholders]
        if folds:
            rows += [_residuals(specs, placeholders)] if specs else []
            continue
        for spec in specs:
            node = placeholders[spec.name]
            notes = ["optional"] * spec.optional + ["1 serves the batch"] * spec.broadcast
            notes += ["unused"] * (not node.users)
            rows.append((spec.name, graph.shape(node), ", ".join(notes)))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [
        "inputs",
        *(f"  {n.ljust(widths[0])}  {s.ljust(widths[1])}  {note}".rstrip() for n, s, note in rows),
    ]


def _residuals(specs: Sequence[Input], placeholders: dict[str, fx.Node]) -> tuple[str, str, str]:
    unused = sum(not placeholders[spec.name].users for spec in specs)
    note = "optional" + (f", {unused} unused" if 0 < unused < len(specs) else ", unused" if unused else "")
    return span([s.name for s in specs]), "as what they are added to" if len(specs) > 1 else "", note


def _region_text(graph: GraphState, path: str) -> str:
    region = region_at(graph, path)
    sheet = Sheet(graph, within=path)
    share = f"{100 * region.macs / graph.macs:.1f} % of " if graph.macs else ""
    total = sum(p.numel() for p in region.parameters.values())
    title = f"{path}: {region.source_class or 'inserted'}"
    sums = f"{len(region.nodes)} nodes, {count(total)} parameters, {share}{cost(graph.macs)}"
    lines = [f"{title}, {sums}", "", "inputs"]
    outside = [(sheet.notation.value(n), shape_words(graph, n), _origin(n)) for n in sheet.given]
    widths = [max((len(row[i]) for row in outside), default=0) for i in range(2)]
    lines += [f"  {n.ljust(widths[0])}  {s.ljust(widths[1])}  {w}".rstrip() for n, s, w in outside]
    returned = ", ".join(sheet.notation.value(n) for n in region.outputs)
    return "\n".join([*lines, "", *aligned(sheet.rows, graph.macs), f"return {returned}"])


def _origin(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "an input of the graph"
    stack = list(node.meta.get("nn_module_stack", {}))
    return f"from {stack[-1]}" if stack else f"from {short_name(node)}"


def _left(graph: GraphState, path: str) -> str:
    """Return the modules of a removed region that are still there, such as a resnet's 1x1 shortcut."""
    own = [n for n in graph.fx.nodes if path in n.meta.get("nn_module_stack", {}) and n.op == "call_module"]
    return f" ({', '.join(relative(str(n.target), path) for n in own)} left)" if own else ""
