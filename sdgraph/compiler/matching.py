"""Matching the pattern of a rewrite against the nodes of a graph, from its result backwards."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import fx, nn

from ..errors import SpecError
from ..graph import Graph
from ..ir.nodes import called
from .canonical_calls import SAME, arguments_of, as_function

COMMUTE = (operator.add, operator.mul)


class NoMatch(Exception):
    """The reason why a rewrite does not apply at a place, raised by its `check`."""


class Pattern:
    """The pattern of a rewrite as a small graph.

    Args:
        method: the rewrite's `pattern`.
        name: the name of the rewrite, for errors.
    Raises:
        SpecError: the pattern returns no single value of an operation, or does not use a parameter.
    """

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        self.names = list(inspect.signature(method).parameters)
        self.classes = {
            name: hint
            for name, hint in get_type_hints(method.__func__).items()  # type: ignore[attr-defined]
            if inspect.isclass(hint) and issubclass(hint, nn.Module)
        }
        self.graph = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        wildcards = [fx.Proxy(self.graph.placeholder(name), tracer) for name in self.names]
        result = method(*wildcards)
        if not isinstance(result, fx.Proxy) or result.node.op == "placeholder":
            what = "one of its parameters" if isinstance(result, fx.Proxy) else f"a {type(result).__name__}"
            raise SpecError(
                f"the pattern of {name} returns {what}",
                where=f"{name}.pattern",
                hint="return one value that an operation gives; to replace several, write a Pass with run",
            )
        self.root: fx.Node = result.node
        unused = [str(n.target) for n in self.graph.nodes if n.op == "placeholder" and not n.users]
        if unused:
            raise SpecError(
                f"the pattern of {name} does not use its parameter {unused[0]!r}",
                where=f"{name}.pattern",
                hint="use it, or leave it out of pattern, check and replace",
            )


class Match:
    """An attempt to match a pattern.

    `bound` holds the values of the pattern's parameters, `taken` the nodes that matched operations, result first.
    """

    def __init__(self, graph: Graph, pattern: Pattern) -> None:
        self.graph, self.pattern = graph, pattern
        self.bound: dict[str, Any] = {}
        self.taken: list[fx.Node] = []

    def arguments(self) -> list[Any]:
        """Return the values of the pattern's parameters, in order."""
        return [self.bound[name] for name in self.pattern.names]

    def at(self, node: fx.Node) -> None:
        """Match the pattern with `node` as its result.

        Raises:
            NoMatch: the pattern does not match; `taken` is empty if not even the result does.
        """
        self._node(self.pattern.root, node)
        inside = set(self.taken)
        for inner in self.taken:
            outside = [u.name for u in inner.users if u not in inside]
            if inner is not node and outside:
                raise NoMatch(f"{inner.name} is used elsewhere too, by {', '.join(outside[:3])}")

    def _value(self, wanted: Any, actual: Any) -> None:
        if isinstance(wanted, fx.Node):
            self._node(wanted, actual)
        elif isinstance(wanted, tuple | list):
            if not isinstance(actual, tuple | list) or len(actual) != len(wanted):
                raise NoMatch(f"expected {len(wanted)} values, found {actual}")
            for wanted_item, actual_item in zip(wanted, actual, strict=True):
                self._value(wanted_item, actual_item)
        elif wanted != actual or isinstance(actual, fx.Node):
            raise NoMatch(f"expected {wanted!r}, found {actual}")

    def _node(self, wanted: fx.Node, actual: Any) -> None:
        if wanted.op == "placeholder":
            self._bind(str(wanted.target), actual)
            return
        if not isinstance(actual, fx.Node):
            raise NoMatch(f"expected a value of {called(wanted)}, found the constant {actual!r}")
        args, kwargs = arguments_of(wanted)
        actual_args, actual_kwargs = arguments_of(actual)
        if wanted.op == "call_method" and wanted.target == "__call__":
            name = str(wanted.args[0])
            cls = self.pattern.classes.get(name, nn.Module)
            module = self.graph.module(str(actual.target)) if actual.op == "call_module" else None
            if not isinstance(module, cls):
                raise NoMatch(f"expected a {cls.__name__}, found {called(actual)}")
            self.taken.append(actual)
            self._bind(name, module)
            args = args[1:]
        else:
            kind, target, actual_args, actual_kwargs = self._spelled(wanted, actual, actual_args, actual_kwargs)
            if wanted.op != kind or SAME.get(wanted.target, wanted.target) != SAME.get(target, target):
                raise NoMatch(f"expected {called(wanted)}, found {called(actual)}{self._hint(wanted, actual)}")
            self.taken.append(actual)
        if len(args) != len(actual_args) or set(kwargs) != set(actual_kwargs):
            raise NoMatch(f"{called(actual)} is called with other arguments: {actual.args} {actual.kwargs}")
        commutes = SAME.get(wanted.target, wanted.target) in COMMUTE
        self._either(args, [actual_args, actual_args[::-1]] if commutes else [actual_args])
        for key, value in kwargs.items():
            self._value(value, actual_kwargs[key])

    def _spelled(
        self, wanted: fx.Node, actual: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
        """Return kind, target and arguments of a node; a module is spelled as a function if one is wanted."""
        if wanted.op == "call_function" and actual.op == "call_module":
            function = as_function(self.graph.module(str(actual.target)), actual)
            if function is not None and not any(isinstance(v, torch.Tensor) for v in function[2].values()):
                return "call_function", *function
        return actual.op, actual.target, args, kwargs

    def _hint(self, wanted: fx.Node, actual: fx.Node) -> str:
        if wanted.op != "call_function" or actual.op != "call_module":
            return ""
        module = self.graph.module(str(actual.target))
        function = as_function(module, actual)
        if function is None or function[0] is not wanted.target:
            return f", a {type(module).__name__}"
        return f", {needs_annotation(module)}"

    def _either(self, args: tuple[Any, ...], orders: list[tuple[Any, ...]]) -> None:
        """Match arguments in any of several orders."""
        start = dict(self.bound), list(self.taken)
        failures: list[tuple[list[fx.Node], NoMatch]] = []
        for order in orders:
            try:
                for wanted, actual in zip(args, order, strict=True):
                    self._value(wanted, actual)
                return
            except NoMatch as failure:
                failures.append((self.taken, failure))
                self.bound, self.taken = dict(start[0]), list(start[1])
        self.taken, furthest = max(failures, key=lambda f: len(f[0]))  # this order gives the reason
        raise furthest

    def _bind(self, name: str, actual: Any) -> None:
        if name in self.bound and self.bound[name] is not actual and self.bound[name] != actual:
            raise NoMatch(f"{name} would be both {self.bound[name]} and {actual}")
        self.bound[name] = actual


def needs_annotation(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"a module nn.{kind}, which has weights: call a parameter of the pattern that is annotated nn.{kind}"
