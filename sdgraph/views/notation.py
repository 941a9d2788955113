"""The notation of the text: values have names, which are given as they appear, and operations are calls."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from ..ir.state import GraphState
from .lines import is_tuple
from .words import relative, short_name

STEMS = {4: "h", 3: "t", 2: "e", 1: "e"}  # maps, tokens, embeddings; everything else is a v
# What PyTorch would do anyway, and `cat` along the channels, which is what a UNet does with its skips.
USUAL = {
    ("sdpa", "dropout_p", 0.0),
    ("sdpa", "is_causal", False),
    ("sdpa", "enable_gqa", False),
    ("interpolate", "antialias", False),
    ("cat", "dim", 1),
}


class Notation:
    """Writes the values and operations of a graph, and names its values as they are first written.

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
