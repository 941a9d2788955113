"""The graph as text, to be read: folded by module, its values named in the order they appear."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx

from ..ir.inputs import Input
from ..ir.nodes import called, values, weights_read
from ..ir.region import region_at
from ..ir.state import GraphState

STEMS = {4: "h", 3: "t", 2: "e", 1: "e"}  # maps, tokens, embeddings; everything else is a v
SHORT = {"scaled_dot_product_attention": "sdpa", "truediv": "div", "concat": "cat"}

DEFAULTS = "stride=1|bias=True|affine=True|elementwise_affine=True|eps=[^,]*|inplace=False"
IDLE = ("to", "float", "contiguous")

# What PyTorch would do anyway, and `cat` along the channels, which is what a UNet does with its skips.
USUAL = {
    ("sdpa", "dropout_p", 0.0),
    ("sdpa", "is_causal", False),
    ("sdpa", "enable_gqa", False),
    ("interpolate", "antialias", False),
    ("cat", "dim", 1),
}


def text(graph: GraphState, depth: int = 3, within: str = "") -> str:
    """Readable form of a graph. Graphs of the same structure give the same text.

    Args:
        depth: levels of nesting: 1 is the header, 2 the blocks, 3 their layers (resnets, attentions), 4 and
            more their parts. A region of nothing but single operations opens one level later than others.
        within: a module path, to see the single operations of that region instead.
    Raises:
        PathError: no such path in the graph.
    """
    if within:
        return _region_text(graph, within)
    lines = [*_head(graph), "", *_inputs(graph)]
    if depth > 1:
        sheet = _Sheet(graph, depth)
        lines += ["", *_columns(sheet.rows, graph.macs), f"return {sheet.value(graph.output)}"]
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
    """What is removed (-), added (+) or changed (both), region by region, with the blocks it happened in.

    Values' numbers and shares of the total, which move with every edit, are left out of the comparison.
    """
    sheets = [_Sheet(graph, depth) for graph in (before, after)]
    old, new = ([row.key() for row in sheet.rows] for sheet in sheets)
    shown: list[_Row] = []
    signs: list[str] = []
    pending: dict[int, _Row] = {}  # headers of the blocks we are in that are not shown yet, by indentation

    def show(sign: str, row: _Row) -> None:
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
    lines = _columns(shown, after.macs, shares=False)
    return "\n".join(f"{sign} {line}" for sign, line in zip(signs, lines, strict=True))


def _inherited(graph: GraphState) -> list[str]:
    """Sites by schedule, and what a call costs that inherits them."""
    groups: dict[str, list[str]] = {}
    for name, site in graph.sites.items():
        forecast = f", forecast {site.forecast}" if site.forecast else ""
        groups.setdefault(f"{site.schedule}{forecast}", []).append(name)
    return [
        f"  {schedule}: {several(names)}; without: {graph.step_macs(names) / graph.macs:.1%} of the MACs"
        for schedule, names in groups.items()
    ]


def several(names: Sequence[str]) -> str:
    """Names in one line."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


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
    """Required inputs one by one, residuals as one line per list."""
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
    return _span([s.name for s in specs]), "as what they are added to" if len(specs) > 1 else "", note


def _span(names: Sequence[str]) -> str:
    """`a_0, a_1, a_2` as `a_0…2`, and `a_0, a_2` as `a_0,2`."""
    stem = names[0].rpartition("_")[0]
    numbers = [name.removeprefix(f"{stem}_") for name in names]
    if len(names) == 1 or not all(n.isdigit() for n in numbers):
        return ", ".join(names)
    if int(numbers[-1]) - int(numbers[0]) == len(names) - 1:
        return f"{stem}_{numbers[0]}…{numbers[-1]}"
    return f"{stem}_{','.join(numbers)}"


def _region_text(graph: GraphState, path: str) -> str:
    region = region_at(graph, path)
    sheet = _Sheet(graph, within=path)
    share = f"{100 * region.macs / graph.macs:.1f} % of " if graph.macs else ""
    total = sum(p.numel() for p in region.parameters.values())
    title = f"{path}: {region.source_class or 'inserted'}"
    sums = f"{len(region.nodes)} nodes, {count(total)} parameters, {share}{cost(graph.macs)}"
    lines = [f"{title}, {sums}", "", "inputs"]
    outside = [(sheet.value(n), _shape(graph, n), _origin(n)) for n in sheet.given]
    widths = [max((len(row[i]) for row in outside), default=0) for i in range(2)]
    lines += [f"  {n.ljust(widths[0])}  {s.ljust(widths[1])}  {w}".rstrip() for n, s, w in outside]
    returned = ", ".join(sheet.value(n) for n in region.outputs)
    return "\n".join([*lines, "", *_columns(sheet.rows, graph.macs), f"return {returned}"])


def _origin(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "an input of the graph"
    stack = list(node.meta.get("nn_module_stack", {}))
    return f"from {stack[-1]}" if stack else f"from {_short(node)}"


def _left(graph: GraphState, path: str) -> str:
    """What a removed region has left behind, such as a resnet's 1x1 shortcut."""
    own = [n for n in graph.fx.nodes if path in n.meta.get("nn_module_stack", {}) and n.op == "call_module"]
    return f" ({', '.join(_relative(str(n.target), path) for n in own)} left)" if own else ""


# -- rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One line: a statement, and what it is about."""

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
        """Equal for rows that do the same, whatever their values are numbered."""
        if self.opens:  # its rows tell what changed inside
            return (self.indent, self.callee, self.source)
        return (self.indent, self.callee, self.source, self.shape, self.parameters, self.macs, self.does)


def _columns(rows: Sequence[_Row], total: int, shares: bool = True) -> list[str]:
    cells = []
    for row in rows:
        share = f"{100 * row.macs / total:.1f} %" if shares and row.macs else ""
        parameters = count(row.parameters) if row.parameters else ""
        cells.append(("  " * row.indent + row.statement, row.source, row.shape, parameters, share))
    aligned = [c for c in cells if any(c[1:])]
    widths = [max((len(c[i]) for c in aligned), default=0) for i in range(5)]
    lines = []
    for statement, source, shape, parameters, share in cells:
        line = f"{statement.ljust(widths[0])}  {source.ljust(widths[1])}  {shape.ljust(widths[2])}"
        lines.append(f"{line}  {parameters.rjust(widths[3])}  {share.rjust(widths[4])}".rstrip())
    return lines


class _Sheet:
    """Lays a graph out in rows, and names its values as they appear.

    Args:
        graph: what to lay out.
        depth: levels of regions to open.
        within: lay out the single operations of this region instead.
    """

    def __init__(self, graph: GraphState, depth: int = 3, within: str = "") -> None:
        self.graph, self.depth, self.within = graph, depth, within
        self.names: dict[fx.Node, str] = {n: n.name for n in graph.fx.nodes if n.op == "placeholder"}
        self.optional = {i.name: str(i.place[0]) for i in graph.inputs if i.shape is None}
        self.held = _held(graph)
        self.rows: list[_Row] = []
        self.counts: dict[str, int] = {}
        self.seen: set[str] = set()  # weights are counted where they appear first
        self.begun: set[str] = set()  # a pass may have put other nodes between those of a region
        nodes = region_at(graph, within).nodes if within else graph.fx.nodes
        shown = [n for n in nodes if n.op not in ("placeholder", "output") and _is_line(n)]
        self.given = _inputs_of(shown)
        self.leaves, self.flat = _simple(graph)
        if within:
            for node in self.given:
                self.names.setdefault(node, self._fresh("%"))
            for node in shown:
                self._operation(node, 0)
        else:
            self._lay_out(shown, 0, "")

    # -- names and expressions -------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> str:
        """A value as it is written in another line."""
        if node in self.names:
            return self.names[node]
        if node.op == "get_attr":
            return _relative(str(node.target), self.within)
        source: Any = node.args[0] if node.args else None
        if node.op == "call_function" and node.target is getattr:
            return f"{self.value(source)}.{node.args[1]}"
        if node.target is operator.getitem and _is_tuple(source):
            return f"{self.value(source)}[{node.args[1]}]"
        size = node.meta.get("size")
        return _readable(str(size)) if size is not None else "…"

    def _name(self, node: fx.Node) -> str:
        residual = self._residual(node)
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
            self.names[node] = self._fresh("%" if self.within else stem)
        return self.names[node]

    def _fresh(self, stem: str) -> str:
        self.counts[stem] = self.counts.get(stem, -1) + 1
        name = f"{stem}{self.counts[stem]}"
        return name if name not in self.names.values() else self._fresh(stem)  # an input may be called h0

    def _written(self, arg: Any) -> str:
        """An argument of an operation."""
        if isinstance(arg, fx.Node):
            return self.value(arg)
        if isinstance(arg, slice):
            ends = (arg.start, arg.stop) if arg.step is None else (arg.start, arg.stop, arg.step)
            return ":".join("" if a is None else self._written(a) for a in ends)
        if isinstance(arg, tuple | list):
            return f"({', '.join(map(self._written, arg))})"
        return str(arg).removeprefix("torch.") if isinstance(arg, torch.dtype) else repr(arg)

    def _expression(self, node: fx.Node) -> str:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            index = self._written(node.args[1])
            return f"{self.value(node.args[0])}[{index[1:-1] if index.startswith('(') else index}]"
        callee = self._callee(node)
        args = list(node.args[0]) if callee in ("cat", "stack") and isinstance(node.args[0], list) else []
        args += list(node.args[1:] if args else node.args)
        parts = [self._written(a) for a in args]
        for key, value in node.kwargs.items():
            usual = not isinstance(value, fx.Node | tuple | list) and (callee, key, value) in USUAL
            if value is not None and not usual:
                parts.append(f"{key}={self._written(value)}")
        return f"{callee}({', '.join(parts)})"

    def _callee(self, node: fx.Node) -> str:
        return _relative(str(node.target), self.within) if node.op == "call_module" else _short(node)

    # -- rows ------------------------------------------------------------------------------------------------

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
        residual = self._residual(node)
        return ("optional", residual[1]) if residual is not None else ("node", node.name)

    def _region(self, path: str, inside: list[fx.Node], level: int, parent: str) -> None:
        callee, source = _relative(path, parent), self.graph.classes.get(path, "inserted")
        if path in self.begun and path not in self.leaves:
            source = "continued"
        self.begun.add(path)
        if path not in self.leaves and level + 3 + (path in self.flat) <= self.depth:
            seen = set(self.seen)
            self._add(level, f"{callee}:", callee, source, inside, opens=True)
            self.seen = seen
            self._lay_out(inside, level + 1, path)
            return
        given = ", ".join(self.value(n) for n in _inputs_of(inside))
        results = _outputs_of(inside)
        names = ", ".join(self._name(n) for n in results)
        shape = ", ".join(dict.fromkeys(_shape(self.graph, n) for n in results))
        self._add(level, f"{names} = {callee}({given})", callee, source, inside, shape)

    def _optional(self, inside: list[fx.Node], level: int) -> None:
        """Additions of residuals that a call may leave out, all those of one list in one line."""
        if len(inside) == 1:
            self._operation(inside[0], level)
            return
        added = [n for node in inside for n in node.all_input_nodes if n.name in self.optional]
        names = ", ".join(self._name(node) for node in inside)
        span = _span([n.name for n in added])
        self._add(level, f"{names} = each + {span}", f"+ {span}", "", inside)

    def _operation(self, node: fx.Node, level: int) -> None:
        expression = self._expression(node)
        source = _module(self.graph, node) if node.op == "call_module" else ""
        callee = self._callee(node)
        self._add(level, f"{self._name(node)} = {expression}", callee, source, [node], _shape(self.graph, node))

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
        self.rows.append(
            _Row(level, statement, callee, source, shape, held, work, substance(self.graph, inside), opens)
        )

    def _targets(self, inside: list[fx.Node]) -> set[str]:
        reads = {n for node in inside for n in node.all_input_nodes if n.op == "get_attr"}
        return set(weights_read((*inside, *reads)))

    def _residual(self, node: fx.Node) -> tuple[fx.Node, str] | None:
        """For an addition of an optional residual: the other side, and the argument the residual comes in."""
        if node.target not in (operator.add, torch.add) or len(node.all_input_nodes) != 2:
            return None
        one, two = node.all_input_nodes
        if one.name in self.optional:
            one, two = two, one
        return (one, self.optional[two.name]) if two.name in self.optional else None


def substance(graph: GraphState, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """What nodes do, in order: operations and modules with their options, without those that change no value.

    Regions of equal substance differ at most in what a clean-up removes: dropout, casts, divisions by one.
    """
    words = []
    for node in nodes:
        idle = (node.target in (operator.mul, operator.truediv) and 1 in node.args) or _short(node) in IDLE
        if idle or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        word = _module(graph, node) if node.op == "call_module" else _short(node)
        if not word.startswith(("Dropout", "Identity")):
            words.append(word)
    return tuple(words)


# -- nodes ---------------------------------------------------------------------------------------------------


def _is_line(node: fx.Node) -> bool:
    """Sizes, dtypes, parameters and items of tuples are written where they are used."""
    val = node.meta.get("val")
    if node.op == "get_attr" or (node.target is operator.getitem and _is_tuple(node.args[0])):
        return False
    if isinstance(val, int | float):
        return node.meta.get("size") is None
    return isinstance(val, torch.Tensor | tuple | list)


def _is_tuple(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), tuple | list)


def _through(node: fx.Node) -> Iterator[fx.Node]:
    """The lines a node's arguments come from: items of tuples stand for the tuple."""
    for arg in node.all_input_nodes:
        if arg.target is operator.getitem and _is_tuple(arg.args[0]):
            yield arg.args[0]  # type: ignore[misc]
        elif arg.op == "placeholder" or _is_line(arg):
            yield arg


def _inputs_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """What a run of lines reads from outside, in the order of use."""
    known = set(inside)
    return list(dict.fromkeys(arg for node in inside for arg in _through(node) if arg not in known))


def _outputs_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """What a run of lines hands on; the last one where nobody reads any."""
    known = set(inside)

    def is_read(node: fx.Node) -> bool:
        users = [u for user in node.users for u in (user.users if _is_item(user, node) else (user,))]
        return any(u not in known and (u.op == "output" or _is_line(u)) for u in users)

    return [node for node in inside if is_read(node)] or [inside[-1]]


def _is_item(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[0] is node and _is_tuple(node)


def _simple(graph: GraphState) -> tuple[set[str], set[str]]:
    """Paths that are one of PyTorch's modules, and paths of regions that hold nothing but such modules."""
    stacks = [(list(n.meta.get("nn_module_stack", {})), n) for n in graph.fx.nodes]
    others = {s[-1] for s, n in stacks if s and not (n.op == "call_module" and n.target == s[-1])}
    paths = {path for stack, _ in stacks for path in stack}
    outer = {path for stack, _ in stacks for path in stack[:-1]}
    leaves = paths - others - outer
    deep = {path for stack, _ in stacks for i, path in enumerate(stack) if set(stack[i + 1 :]) - leaves}
    return leaves, paths - leaves - deep


def _held(graph: GraphState) -> dict[str, int]:
    """Parameters by what a node reads: a tensor, or a module with its own tensors."""
    held: dict[str, int] = {}
    for name, parameter in graph.parameters().items():
        held[name] = parameter.numel()
        owner = name.rpartition(".")[0]
        held[owner] = held.get(owner, 0) + parameter.numel()
    return held


# -- words ---------------------------------------------------------------------------------------------------


def _short(node: fx.Node) -> str:
    return SHORT.get(called(node), called(node))


def _relative(path: str, base: str) -> str:
    if path == base:
        return path.rpartition(".")[2]
    return path.removeprefix(f"{base}.") if base else path


def _module(graph: GraphState, node: fx.Node) -> str:
    """A leaf module with the options not at their defaults: `Conv2d(4, 320, kernel_size=3, padding=1)`."""
    module = graph.module(str(node.target))
    options = re.sub(r"\((\d+), \1\)", r"\1", module.extra_repr())
    options = re.sub(rf", ({DEFAULTS})(?=,|$)", "", options)
    options = options.replace("in_features=", "").replace("out_features=", "")
    return f"{type(module).__name__}({options})" if options else type(module).__name__


def _shape(graph: GraphState, node: fx.Node) -> str:
    nominal, generic = values(node)
    if isinstance(nominal, tuple | list):
        parts = [graph.dims.shape(n, g) for n, g in zip(nominal, generic, strict=True)]
        return ", ".join(dict.fromkeys(parts))
    return graph.shape(node)


def _readable(size: str) -> str:
    """`(ceil(H/2) * ceil(W/2))` as `H/2·W/2`, as shapes are written."""
    size = re.sub(r"ceil\((\w+/\d+)\)", r"\1", size).replace(" * ", "·")
    return size[1:-1] if re.fullmatch(r"\([^()]*\)", size) else size


def cost(number: int) -> str:
    """A number of multiply-accumulates, in the unit they are quoted in."""
    return f"{number / 1e9:.4g} GMACs" if number >= 1e7 else f"{count(number)} MACs"


def count(number: int) -> str:
    """A number in three digits: `860 M`."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:.0f} {unit}"
    return str(number)
