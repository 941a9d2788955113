"""Local rewrites: a pattern, a condition and a replacement, all three ordinary PyTorch code."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op

from .graph import Graph
from .inputs import Dim
from .pass_ import Findings, Pass
from .report import NearMiss
from .trace import called, scope

COMMUTE = (operator.add, operator.mul)
SAME: Mapping[Any, Any] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.div: operator.truediv,
}


class NoMatch(Exception):
    """Raised by a rewrite's `check`: why it does not apply here."""


@dataclass(frozen=True)
class Example:
    """Code a rewrite applies to, or, with `changes=False`, code it must leave alone. Documentation and test at once.

    Args:
        code: a function or an `nn.Module` of tensors.
        shapes: the shape of each of its arguments; sizes may be "B", "H", "W", "L".
        changes: whether the rewrite applies.
    """

    code: Callable[..., Any]
    shapes: Mapping[str, tuple[Dim, ...]]
    changes: bool = True


@dataclass(frozen=True)
class Rewrite(Pass):
    """A local rewrite. Subclasses define three methods over the same named values:

        pattern(self, x, ...)   PyTorch code; its parameters match anything. A parameter annotated with a module class
                                matches a leaf module of that class, and is called.
        check(self, x, ...)     optional; raises `NoMatch(reason)`. Values are nodes of the graph (`node.meta` tells
                                their shapes), constants, or modules.
        replace(self, x, ...)   PyTorch code for what takes the place of the match.

    Places where more than the last operation matched, or where `check` declined, are reported as near-misses.
    """

    examples: ClassVar[tuple[Example, ...]] = ()

    def pattern(self, *values: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}.pattern")

    def check(self, *values: Any) -> None:
        """Every match is fine."""

    def replace(self, *values: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}.replace")

    def run(self, graph: Graph) -> Findings:
        pattern = _Pattern(self.pattern)
        edits: list[str] = []
        misses: list[NearMiss] = []
        for node in list(graph.fx.nodes):
            if node.op in ("placeholder", "output") or node._erased:
                continue
            match = _Match(graph, pattern)
            try:
                match.at(node)
                self.check(*match.arguments())
            except NoMatch as miss:
                if match.taken:
                    where = f"{scope(node) or '(top level)'}, node {node.name}"
                    misses.append(NearMiss(where, str(miss), len(match.taken)))
                continue
            made = graph.insert(self.replace, *match.arguments(), before=node.next, path=scope(node))
            graph.rewire(node, made)
            edits.append(f"{scope(node) or '(top level)'}: {node.name} -> {made.name}")
            for gone in match.taken:  # from the result backwards, so that users go first
                if not gone.users:
                    graph.erase(gone)
        return Findings(tuple(edits), tuple(sorted(misses, key=lambda m: -m.matched)))


class _Pattern:
    """A pattern method as a small graph."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.names = list(inspect.signature(method).parameters)
        function = method.__func__  # type: ignore[attr-defined]
        self.classes = {
            name: hint
            for name, hint in get_type_hints(function).items()
            if inspect.isclass(hint) and issubclass(hint, nn.Module)
        }
        self.graph = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        wildcards = [fx.Proxy(self.graph.placeholder(name), tracer) for name in self.names]
        result = method(*wildcards)
        self.root: fx.Node = result.node


class _Match:
    """One attempt to match a pattern, from its result backwards."""

    def __init__(self, graph: Graph, pattern: _Pattern) -> None:
        self.graph, self.pattern = graph, pattern
        self.bound: dict[str, Any] = {}
        self.taken: list[fx.Node] = []

    def arguments(self) -> list[Any]:
        return [self.bound[name] for name in self.pattern.names]

    def at(self, node: fx.Node) -> None:
        """Match with `node` as the result, or raise NoMatch; `taken` is empty if not even the result fits."""
        self._node(self.pattern.root, node)
        inside = set(self.taken)
        for inner in self.taken:
            outside = [u.name for u in inner.users if u not in inside]
            if inner is not node and outside:
                raise NoMatch(f"{inner.name} is used elsewhere too, by {', '.join(outside[:3])}")

    def _value(self, wanted: Any, found: Any) -> None:
        if isinstance(wanted, fx.Node):
            self._node(wanted, found)
        elif isinstance(wanted, tuple | list):
            if not isinstance(found, tuple | list) or len(found) != len(wanted):
                raise NoMatch(f"expected {len(wanted)} values, found {found}")
            for w, f in zip(wanted, found, strict=True):
                self._value(w, f)
        elif wanted != found or isinstance(found, fx.Node):
            raise NoMatch(f"expected {wanted!r}, found {found}")

    def _node(self, wanted: fx.Node, found: Any) -> None:
        if wanted.op == "placeholder":
            self._bind(str(wanted.target), found)
            return
        if not isinstance(found, fx.Node):
            raise NoMatch(f"expected a value of {called(wanted)}, found the constant {found!r}")
        args, kwargs = _call(wanted)
        found_args, found_kwargs = _call(found)
        if wanted.op == "call_method" and wanted.target == "__call__":
            name = str(wanted.args[0])
            cls = self.pattern.classes.get(name, nn.Module)
            module = self.graph.module(str(found.target)) if found.op == "call_module" else None
            if not isinstance(module, cls):
                raise NoMatch(f"expected a {cls.__name__}, found {called(found)}")
            self.taken.append(found)
            self._bind(name, module)
            args = args[1:]
        else:
            targets = SAME.get(wanted.target, wanted.target), SAME.get(found.target, found.target)
            if wanted.op != found.op or targets[0] != targets[1]:
                raise NoMatch(f"expected {called(wanted)}, found {called(found)}")
            self.taken.append(found)
        if len(args) != len(found_args) or set(kwargs) != set(found_kwargs):
            raise NoMatch(f"{called(found)} is called with other arguments: {found.args} {found.kwargs}")
        commutes = SAME.get(wanted.target, wanted.target) in COMMUTE
        self._either(args, [found_args, found_args[::-1]] if commutes else [found_args])
        for key, value in kwargs.items():
            self._value(value, found_kwargs[key])

    def _either(self, args: tuple[Any, ...], orders: list[tuple[Any, ...]]) -> None:
        """Match arguments in one of several orders."""
        start = dict(self.bound), list(self.taken)
        failures: list[tuple[list[fx.Node], NoMatch]] = []
        for order in orders:
            try:
                for w, f in zip(args, order, strict=True):
                    self._value(w, f)
                return
            except NoMatch as failure:
                failures.append((self.taken, failure))
                self.bound, self.taken = dict(start[0]), list(start[1])
        self.taken, furthest = max(failures, key=lambda f: len(f[0]))  # that order tells the reason
        raise furthest

    def _bind(self, name: str, found: Any) -> None:
        if name in self.bound and self.bound[name] is not found and self.bound[name] != found:
            raise NoMatch(f"{name} would be both {self.bound[name]} and {found}")
        self.bound[name] = found


def _call(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by name and without those that are the defaults, where the signature is known."""
    if node.op == "call_function" and node.target not in SAME and node.target not in SAME.values():
        for signature in _signatures(node.target):
            try:
                bound = signature.bind(*node.args, **node.kwargs)
            except TypeError:
                continue
            default = {name: p.default for name, p in signature.parameters.items()}
            return (), {k: v for k, v in bound.arguments.items() if isinstance(v, fx.Node) or v != default[k]}
    return tuple(node.args), dict(node.kwargs)


@functools.cache
def _signatures(target: Any) -> tuple[inspect.Signature, ...]:
    try:
        found = [inspect.signature(target)]
    except (TypeError, ValueError):
        found = get_signature_for_torch_op(target) or []
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(s for s in found if not any(p.kind in loose for p in s.parameters.values()))
