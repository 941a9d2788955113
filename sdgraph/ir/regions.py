"""Regions, the nodes under one module path, and patterns of paths. Block, layer and unit are regions."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from ..errors import EditError, PathError, ShapeError, did_you_mean
from .nodes import ancestors, scope, values, weights_read, written
from .state import GraphState


@dataclass(frozen=True)
class Region:
    """The nodes of a graph under one module path.

    Args:
        graph: the graph.
        path: the module path, such as `down_blocks.0.resnets.1`.
        nodes: the nodes, in graph order.
    """

    graph: GraphState
    path: str
    nodes: tuple[fx.Node, ...]

    @property
    def source_class(self) -> str:
        """The class name of the source module."""
        return self.graph.classes.get(self.path, "")

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors from outside that the region reads, in graph order."""
        inside = set(self.nodes)
        read = {n for node in self.nodes for n in node.all_input_nodes if n not in inside}
        return tuple(n for n in self.graph.fx.nodes if n in read and isinstance(n.meta["val"], torch.Tensor))

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The tensors of the region that are read outside, in graph order."""
        inside = set(self.nodes)
        return tuple(
            n
            for n in self.nodes
            if isinstance(n.meta["val"], torch.Tensor) and any(user not in inside for user in n.users)
        )

    @property
    def output(self) -> fx.Node:
        """The only output.

        Raises:
            EditError: the region has another number of outputs.
        """
        if len(self.outputs) != 1:
            raise EditError(
                f"the region has {len(self.outputs)} outputs", where=self.path, hint="take a smaller region"
            )
        return self.outputs[0]

    @cached_property
    def main_input(self) -> fx.Node | None:
        """The hidden state: the last computed of the inputs that have the rank of the last output."""
        rank = self.outputs[-1].meta["val"].ndim
        candidates = [n for n in self.inputs if n.meta["val"].ndim == rank]
        return candidates[-1] if candidates else None

    @property
    def branch(self) -> fx.Node | None:
        """The value that the region adds to the main flow, None if it does not end in such an addition.

        The addition may be inside the region (a resnet) or outside (an attention or feed-forward unit).
        """
        if len(self.outputs) != 1:
            return None
        last = self.output
        if self._residual(last) is not None:
            return last
        while last.target is operator.truediv and isinstance(last.args[0], fx.Node):  # a resnet's scale factor
            last = last.args[0]
        if last.target is not operator.add or last not in self.nodes:
            return None
        branches = [
            side
            for side in last.args
            if isinstance(side, fx.Node) and side is not self.main_input and side is not self._shortcut
        ]
        return branches[0] if len(branches) == 1 else None

    @property
    def _shortcut(self) -> fx.Node | None:
        """The 1x1 convolution of a resnet that bypasses its other layers, or what a pass has made of it."""
        shortcut = f"{self.path}.conv_shortcut"  # which may use the weights of another one
        return next((n for n in reversed(self.nodes) if n.op != "get_attr" and scope(n) == shortcut), None)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters by full name."""
        read = weights_read(self.nodes)
        return {
            name: p for name, p in self.graph.parameters().items() if name in read or name.rpartition(".")[0] in read
        }

    @property
    def macs(self) -> int:
        """Multiply-accumulates at the nominal sizes."""
        return sum(map(self.graph.macs_of, self.nodes))

    @property
    def bytes(self) -> int:
        """Bytes of the parameters, and of the tensors that are written at the nominal sizes."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values()) + sum(map(written, self.nodes))

    def stand_in(self, output: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the value that is replaced when the region is removed, and the value that replaces it.

        See `Graph.bypass`.

        Args:
            output: the output of the region that is replaced.
        Raises:
            ShapeError: no value has the right shape.
        """
        residual = self._residual(output)
        if residual is not None:
            return residual
        entry = self.main_input
        if entry is not None:
            if entry.target is torch.cat:
                parts: Any = entry.args[0]
                if _channels(parts[0]) == _channels(output):
                    return output, parts[0]
            if _channels(entry) == _channels(output):
                return output, entry
        if self._shortcut is not None:
            return next(iter(self._shortcut.users)), self._shortcut
        stand_in = self.graph.shape(entry) if entry is not None else "nothing"
        raise ShapeError(
            f"without {self.path!r} its output {self.graph.shape(output)} would be replaced by {stand_in}",
            where=self.path,
            hint="remove what changes the channels along with it, or only parts of it",
        )

    def _residual(self, output: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return the addition that joins a residual branch to the main flow, and the value on its other side."""
        users = list(output.users)
        if len(users) != 1 or users[0] in self.nodes or users[0].target is not operator.add:
            return None
        others = [a for a in users[0].args if a is not output]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        return (users[0], others[0]) if others[0] in ancestors(output) else None


def region_at(graph: GraphState, path: str) -> Region:
    """Return the region at a module path.

    Raises:
        PathError: there is none; the error names the nearest paths, or the pass that removed the region.
    """
    nodes = [n for n in graph.fx.nodes if path in n.meta.get("nn_module_stack", {})]
    if nodes:
        return Region(graph, path, tuple(nodes))
    removed = graph.removed
    outer = next((p for p in (path, *above(path)) if p in removed), None)
    if outer is not None:
        raise PathError(f"{path!r} is no longer in the graph", where=outer, hint=f"it was removed by {removed[outer]}")
    hint = did_you_mean(path, graph.paths()) or "print(graph) lists the paths"
    raise PathError(f"no module {path!r} in the graph", where=path, hint=hint)


def regions_of(graph: GraphState) -> dict[str, Region]:
    """Return all regions by path, in graph order, outer before inner."""
    nodes_by_path: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        for path in node.meta.get("nn_module_stack", {}):
            nodes_by_path.setdefault(path, []).append(node)
    return {path: Region(graph, path, tuple(nodes)) for path, nodes in nodes_by_path.items()}


def _channels(node: fx.Node) -> tuple[int, ...]:
    """Return the rank and the number of channels: dimension 1 of a map, the last dimension of tokens."""
    val, _ = values(node)
    return val.ndim, val.shape[1 if val.ndim == 4 else -1]


def matching(patterns: str | Iterable[str], known: Sequence[str], check: Callable[[str], object]) -> list[str]:
    """Return the paths that patterns name, in the order of `known`; see `sdgraph.Graph.matching`.

    Args:
        check: called with every path that is spelled out; raises an error if there is no such path.
    Raises:
        PathError: a pattern names nothing; the error names the nearest paths.
    """
    named: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise PathError(f"{pattern!r} is no module path", hint="pass text, or several texts")
        choices = [counted for choice in _expanded(pattern) for counted in _counted(choice, known)]
        if len(choices) == 1 and "*" not in choices[0]:
            check(choices[0])
            named.add(choices[0])
            continue
        regex = re.compile("|".join(map(_regex, choices)))
        matches = [path for path in known if regex.fullmatch(path)]
        if not matches:
            hint = did_you_mean(pattern, known) or "print(graph) lists the paths"
            raise PathError(f"no module matches {pattern!r}", where=pattern, hint=hint)
        named.update(matches)
    return sorted(named, key=known.index)


def above(path: str) -> Iterator[str]:
    """Yield the paths of the modules that contain a module, from the inside out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _expanded(pattern: str) -> list[str]:
    """Return the patterns that a pattern with braces stands for."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inner, _, after = rest.partition("}")
    return [expanded for choice in inner.split(",") for expanded in _expanded(before + choice + after)]


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*?)", pattern)
    return "".join({"*": r"[^.]*", "**": r".*"}.get(part, re.escape(part)) for part in parts)


def _counted(pattern: str, known: Sequence[str]) -> list[str]:
    """Return the pattern with its negative numbers replaced, once for every parent, because last children differ.

    A pattern that counts beyond the first sibling is returned as it is.
    """
    names = pattern.split(".")
    at = next((i for i, name in enumerate(names) if re.fullmatch(r"-\d+", name)), None)
    if at is None:
        return [pattern]
    parent = re.compile(_regex(".".join(names[:at])))
    children: dict[str, set[int]] = {}
    for path in known:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit() and parent.fullmatch(above_it := ".".join(parts[:i])):
                children.setdefault(above_it, set()).add(int(part))
    counted = [
        ".".join([holder, str(sorted(numbers)[int(names[at])]), *names[at + 1 :]])
        for holder, numbers in children.items()
        if -int(names[at]) <= len(numbers)
    ]
    return [full for partial in counted for full in _counted(partial, known)] or [pattern]
