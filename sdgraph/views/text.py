"""A graph as text for people: folded by module, with values named in the order in which they appear."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx

from ..forecasts import REPEAT
from ..ir.inputs import Input
from ..ir.nodes import called, values, weights_read
from ..ir.regions import region_at
from ..ir.state import GraphState
from .format import format_count, format_macs, format_names, format_numbered

SHORT = {"scaled_dot_product_attention": "sdpa", "truediv": "div", "concat": "cat"}
DEFAULTS = "stride=1|bias=True|affine=True|elementwise_affine=True|eps=[^,]*|inplace=False"
STEMS = {4: "h", 3: "t", 2: "e", 1: "e"}  # maps, tokens, embeddings; everything else is a v
# What PyTorch would do anyway, and `cat` along the channels, which is what a UNet does with its skips.
USUAL = {
    ("sdpa", "dropout_p", 0.0),
    ("sdpa", "is_causal", False),
    ("sdpa", "enable_gqa", False),
    ("interpolate", "antialias", False),
    ("cat", "dim", 1),
}


def format_graph(graph: GraphState, depth: int = 3, within: str = "") -> str:
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
        listing = Listing(graph, depth)
        lines += ["", *format_rows(listing.rows, graph.macs), f"return {listing.notation.value(graph.output)}"]
        if any(re.search(r"/\d", row.shape) for row in listing.rows):
            lines[1] += "; H/2 is half of H, rounded up" if "H" in lines[1] else "; a/2 is half of a, rounded up"
    if graph.sites:
        lines += ["", "reused", *_reused(graph)]
    if graph.removed:
        width = max(map(len, graph.removed))
        lines += ["", "removed"]
        lines += [f"  {path.ljust(width)}  by {spec}{_left(graph, path)}" for path, spec in graph.removed.items()]
    return "\n".join(lines)


def _reused(graph: GraphState) -> list[str]:
    """Return a line for every schedule: its sites, and the cost of a call that reuses them."""
    groups: dict[str, list[str]] = {}
    for name, site in graph.sites.items():
        forecast = f", forecast {site.forecast}" if site.forecast != REPEAT else ""
        groups.setdefault(f"{site.schedule}{forecast}{', bypassed' * site.bypassed}", []).append(name)
    return [
        f"  {schedule}: {format_names(names)}; without: {graph.call_macs(names) / graph.macs:.1%} of the MACs"
        for schedule, names in groups.items()
    ]


# -- the parts of the text -----------------------------------------------------------------------------------


def _head(graph: GraphState) -> list[str]:
    name = graph.config.get("_class_name", "UNet2DConditionModel" if graph.config else "Graph")
    free = [s for s in graph.dims.symbols if any(_mentions(i, s.name) for i in graph.inputs)]
    sizes = ", ".join(f"{s.name}={s.nominal}" for s in free)
    total = sum(p.numel() for p in graph.parameters().values())
    sums = f"{len(graph.nodes)} nodes, {format_count(total)} parameters, {format_macs(graph.macs)}"
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
    return format_numbered([s.name for s in specs]), "as what they are added to" if len(specs) > 1 else "", note


def _region_text(graph: GraphState, path: str) -> str:
    region = region_at(graph, path)
    listing = Listing(graph, within=path)
    share = f"{100 * region.macs / graph.macs:.1f} % of " if graph.macs else ""
    total = sum(p.numel() for p in region.parameters.values())
    title = f"{path}: {region.source_class or 'inserted'}"
    sums = f"{len(region.nodes)} nodes, {format_count(total)} parameters, {share}{format_macs(graph.macs)}"
    lines = [f"{title}, {sums}", "", "inputs"]
    outside = [(listing.notation.value(n), shape_words(graph, n), _origin(n)) for n in listing.inputs]
    widths = [max((len(row[i]) for row in outside), default=0) for i in range(2)]
    lines += [f"  {n.ljust(widths[0])}  {s.ljust(widths[1])}  {w}".rstrip() for n, s, w in outside]
    returned = ", ".join(listing.notation.value(n) for n in region.outputs)
    return "\n".join([*lines, "", *format_rows(listing.rows, graph.macs), f"return {returned}"])


def _origin(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "an input of the graph"
    stack = list(node.meta.get("nn_module_stack", {}))
    return f"from {stack[-1]}" if stack else f"from {short_name(node)}"


def _left(graph: GraphState, path: str) -> str:
    """Return the modules of a removed region that are still there, such as a resnet's 1x1 shortcut."""
    own = [n for n in graph.fx.nodes if path in n.meta.get("nn_module_stack", {}) and n.op == "call_module"]
    return f" ({', '.join(relative(str(n.target), path) for n in own)} left)" if own else ""


# -- rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the text: a statement, and facts about the nodes that it stands for.

    Args:
        indent: the level of nesting.
        statement: an operation or a call of a region, with the names of its results.
        source: the class of the region or module.
        shape: the shapes of the results.
        parameters: the number of parameters that no earlier row counts.
        macs: the multiply-accumulates.
    """

    indent: int
    statement: str
    source: str
    shape: str
    parameters: int
    macs: int


def format_rows(rows: Sequence[Row], total: int) -> list[str]:
    """Return rows as lines of text, in columns.

    Args:
        rows: the rows.
        total: the multiply-accumulates of the graph, for the column of shares.
    """
    cells = []
    for row in rows:
        share = f"{100 * row.macs / total:.1f} %" if row.macs else ""
        parameters = format_count(row.parameters) if row.parameters else ""
        cells.append(("  " * row.indent + row.statement, row.source, row.shape, parameters, share))
    full = [c for c in cells if any(c[1:])]
    widths = [max((len(c[i]) for c in full), default=0) for i in range(5)]
    lines = []
    for statement, source, shape, parameters, share in cells:
        line = f"{statement.ljust(widths[0])}  {source.ljust(widths[1])}  {shape.ljust(widths[2])}"
        lines.append(f"{line}  {parameters.rjust(widths[3])}  {share.rjust(widths[4])}".rstrip())
    return lines


class Listing:
    """The rows of a graph, whose values are named as they appear.

    Args:
        graph: the graph to lay out.
        depth: the levels of regions that are opened.
        within: the path of a region whose single operations are laid out instead.
    """

    def __init__(self, graph: GraphState, depth: int = 3, within: str = "") -> None:
        self.graph, self.depth, self.within = graph, depth, within
        self.notation = Notation(graph, within)
        self.parameter_counts = _parameter_counts(graph)
        self.rows: list[Row] = []
        self.seen: set[str] = set()  # weights are counted where they appear first
        self.begun: set[str] = set()  # a pass may have put other nodes between those of a region
        nodes = region_at(graph, within).nodes if within else graph.fx.nodes
        shown = [n for n in nodes if n.op not in ("placeholder", "output") and is_line(n)]
        self.inputs = inputs_of(shown)
        self.leaves, self.flat = _simple_paths(graph)
        if within:
            for node in self.inputs:
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
            self._add(level, f"{callee}:", source, inside)
            self.seen = seen
            self._lay_out(inside, level + 1, path)
            return
        arguments = ", ".join(self.notation.value(n) for n in inputs_of(inside))
        results = outputs_of(inside)
        names = ", ".join(self.notation.name(n) for n in results)
        shape = ", ".join(dict.fromkeys(shape_words(self.graph, n) for n in results))
        self._add(level, f"{names} = {callee}({arguments})", source, inside, shape)

    def _optional(self, inside: list[fx.Node], level: int) -> None:
        """Add a row for the additions of optional residuals; those of a list share a row."""
        if len(inside) == 1:
            self._operation(inside[0], level)
            return
        added = [n for node in inside for n in node.all_input_nodes if n.name in self.notation.optional]
        names = ", ".join(self.notation.name(node) for node in inside)
        self._add(level, f"{names} = each + {format_numbered([n.name for n in added])}", "", inside)

    def _operation(self, node: fx.Node, level: int) -> None:
        expression = self.notation.expression(node)
        source = module_words(self.graph, node) if node.op == "call_module" else ""
        self._add(level, f"{self.notation.name(node)} = {expression}", source, [node], shape_words(self.graph, node))

    def _add(self, level: int, statement: str, source: str, inside: list[fx.Node], shape: str = "") -> None:
        new = self._targets(inside) - self.seen
        self.seen |= new
        parameters = sum(self.parameter_counts.get(path, 0) for path in new)
        macs = sum(map(self.graph.macs_of, inside))
        self.rows.append(Row(level, statement, source, shape, parameters, macs))

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


# -- values and operations -------------------------------------------------------------------------------------


class Notation:
    """The notation of the values and operations of a graph, which names values as they are first written.

    Args:
        graph: the graph whose nodes are written.
        within: the region whose single operations are written; by default whole regions are.
    """

    def __init__(self, graph: GraphState, within: str) -> None:
        self.within = within
        self.names: dict[fx.Node, str] = {n: n.name for n in graph.fx.nodes if n.op == "placeholder"}
        self.optional = {i.name: str(i.place[0]) for i in graph.inputs if i.shape is None}
        self.counts: dict[str, int] = {}

    def value(self, node: fx.Node) -> str:
        """Return a value as it is written in another line."""
        if node in self.names:
            return self.names[node]
        if node.op == "get_attr":
            return relative(str(node.target), self.within)
        source: Any = node.args[0] if node.args else None
        if node.op == "call_function" and node.target is getattr:
            return f"{self.value(source)}.{node.args[1]}"
        if node.target is operator.getitem and is_tuple(source):
            return f"{self.value(source)}[{node.args[1]}]"
        size = node.meta.get("size")
        return _readable(str(size)) if size is not None else "…"

    def name(self, node: fx.Node) -> str:
        """Return the name of a value, and give it one if it has none: `h'` is `h` with an optional residual added."""
        residual = self.residual(node)
        if node in self.names:
            return self.names[node]
        if residual is not None and residual[0] in self.names and not self.within:
            name = f"{self.names[residual[0]]}'"
            while name in self.names.values():
                name += "'"
            self.names[node] = name
        else:
            val = node.meta["val"]
            stem = STEMS.get(val.ndim, "v") if isinstance(val, torch.Tensor) else "v"
            self.names[node] = self.fresh("%" if self.within else stem)
        return self.names[node]

    def fresh(self, stem: str) -> str:
        """Return a name that no value has: the stem with a number."""
        self.counts[stem] = self.counts.get(stem, -1) + 1
        name = f"{stem}{self.counts[stem]}"
        return name if name not in self.names.values() else self.fresh(stem)  # an input may be called h0

    def _written(self, arg: Any) -> str:
        """Return an argument of an operation as text."""
        if isinstance(arg, fx.Node):
            return self.value(arg)
        if isinstance(arg, slice):
            ends = (arg.start, arg.stop) if arg.step is None else (arg.start, arg.stop, arg.step)
            return ":".join("" if a is None else self._written(a) for a in ends)
        if isinstance(arg, tuple | list):
            return f"({', '.join(map(self._written, arg))})"
        return str(arg).removeprefix("torch.") if isinstance(arg, torch.dtype) else repr(arg)

    def expression(self, node: fx.Node) -> str:
        """Return an operation as the text of a call."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            index = self._written(node.args[1])
            return f"{self.value(node.args[0])}[{index[1:-1] if index.startswith('(') else index}]"
        callee = self.callee(node)
        args = list(node.args[0]) if callee in ("cat", "stack") and isinstance(node.args[0], list) else []
        args += list(node.args[1:] if args else node.args)
        parts = [self._written(a) for a in args]
        for key, value in node.kwargs.items():
            usual = not isinstance(value, fx.Node | tuple | list) and (callee, key, value) in USUAL
            if value is not None and not usual:
                parts.append(f"{key}={self._written(value)}")
        return f"{callee}({', '.join(parts)})"

    def callee(self, node: fx.Node) -> str:
        """Return the name of the function, method or module that an operation calls."""
        return relative(str(node.target), self.within) if node.op == "call_module" else short_name(node)

    def residual(self, node: fx.Node) -> tuple[fx.Node, str] | None:
        """Return the other side of an addition of an optional residual, and the argument that holds the residual.

        None for any other node.
        """
        if node.target not in (operator.add, torch.add) or len(node.all_input_nodes) != 2:
            return None
        base, added = node.all_input_nodes
        if base.name in self.optional:
            base, added = added, base
        return (base, self.optional[added.name]) if added.name in self.optional else None


def _readable(size: str) -> str:
    """`(ceil(H/2) * ceil(W/2))` as `H/2·W/2`, as shapes are written."""
    size = re.sub(r"ceil\((\w+/\d+)\)", r"\1", size).replace(" * ", "·")
    return size[1:-1] if re.fullmatch(r"\([^()]*\)", size) else size


# -- the nodes that have a line --------------------------------------------------------------------------------


def is_line(node: fx.Node) -> bool:
    """Return whether a node has a line; sizes, dtypes, parameters and items of tuples are written inside lines."""
    val = node.meta.get("val")
    if node.op == "get_attr" or (node.target is operator.getitem and is_tuple(node.args[0])):
        return False
    if isinstance(val, int | float):
        return node.meta.get("size") is None
    return isinstance(val, torch.Tensor | tuple | list)


def is_tuple(arg: Any) -> bool:
    """Return whether an argument is a node whose value is a tuple."""
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), tuple | list)


def _read_lines(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the lines that a node's arguments come from; an item of a tuple comes from the tuple."""
    for arg in node.all_input_nodes:
        if arg.target is operator.getitem and is_tuple(arg.args[0]):
            yield arg.args[0]  # type: ignore[misc]
        elif arg.op == "placeholder" or is_line(arg):
            yield arg


def inputs_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes outside of a run of lines that it reads, in the order of use."""
    known = set(inside)
    return list(dict.fromkeys(arg for node in inside for arg in _read_lines(node) if arg not in known))


def outputs_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes of a run of lines that are read outside; the last node if none is."""
    known = set(inside)

    def is_read(node: fx.Node) -> bool:
        users = [u for user in node.users for u in (user.users if _is_item(user, node) else (user,))]
        return any(u not in known and (u.op == "output" or is_line(u)) for u in users)

    return [node for node in inside if is_read(node)] or [inside[-1]]


def _is_item(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[0] is node and is_tuple(node)


# -- nodes in words --------------------------------------------------------------------------------------------


def short_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, in short form if there is one."""
    return SHORT.get(called(node), called(node))


def relative(path: str, base: str) -> str:
    """Return a module path as it is written inside the module `base`."""
    if path == base:
        return path.rpartition(".")[2]
    return path.removeprefix(f"{base}.") if base else path


def module_words(graph: GraphState, node: fx.Node) -> str:
    """Return a leaf module with its options without defaults, such as `Conv2d(4, 320, kernel_size=3, padding=1)`."""
    module = graph.module(str(node.target))
    options = re.sub(r"\((\d+), \1\)", r"\1", module.extra_repr())
    options = re.sub(rf", ({DEFAULTS})(?=,|$)", "", options)
    options = options.replace("in_features=", "").replace("out_features=", "")
    return f"{type(module).__name__}({options})" if options else type(module).__name__


def shape_words(graph: GraphState, node: fx.Node) -> str:
    """Return the shape of a node's value; of a tuple, the different shapes of its items."""
    nominal, generic = values(node)
    if isinstance(nominal, tuple | list):
        parts = [graph.dims.shape(n, g) for n, g in zip(nominal, generic, strict=True)]
        return ", ".join(dict.fromkeys(parts))
    return graph.shape(node)
