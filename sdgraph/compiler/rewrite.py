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

from ..errors import SpecError
from ..graph import Graph
from ..ir.inputs import Dim
from ..ir.nodes import called, scope
from .base import Findings, Pass
from .report import NearMiss

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

        pattern(self, x, ...)   PyTorch code that returns one value; its parameters match anything. A function matches
                                modules without weights too that are nothing but a call of it: `F.silu(x)` is found in
                                `nn.SiLU`. A parameter annotated with a module class matches a leaf module of that
                                class, and is called.
        check(self, x, ...)     optional; raises `NoMatch(reason)`. Values are nodes of the graph (`node.meta` tells
                                their shapes), constants, or modules.
        replace(self, x, ...)   PyTorch code for what takes the place of the match.

    Places where more than the last operation matched, or where `check` declined, are reported as near-misses.

    Class attributes:
        by_weights: `check` reads the numbers of weights. What it says is then recorded; see `Graph.decide`.
        examples: code that it applies to, and code that it must leave alone.
    """

    by_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[Example, ...]] = ()

    def pattern(self, *values: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}.pattern")

    def check(self, *values: Any) -> None:
        """Every match is fine."""

    def replace(self, *values: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}.replace")

    def run(self, graph: Graph) -> Findings:
        pattern = _Pattern(self)
        edits: list[str] = []
        misses: list[NearMiss] = []
        for node in list(graph.fx.nodes):
            if node.op in ("placeholder", "output") or node._erased:
                continue
            match = _Match(graph, pattern)
            refused = self._refused(match, node)
            if refused is not None:
                if match.taken:
                    where = f"{scope(node) or '(top level)'}, node {node.name}"
                    misses.append(NearMiss(where, refused, len(match.taken)))
                continue
            made = graph.insert(self.replace, *match.arguments(), before=node.next, path=scope(node))
            graph.rewire(node, made)
            edits.append(f"{scope(node) or '(top level)'}: {node.name} -> {made.name}")
            for gone in match.taken:  # from the result backwards, so that users go first
                if not gone.users:
                    graph.erase(gone)
        if not edits:
            misses += _other_spelling(graph, pattern)
        return Findings(tuple(edits), tuple(sorted(misses, key=lambda m: -m.matched)))

    def _refused(self, match: _Match, node: fx.Node) -> str | None:
        """Why it does not apply with `node` as the result; None if it does."""
        try:
            match.at(node)
        except NoMatch as miss:
            return str(miss)
        if not self.by_weights:
            verdict = self._verdict(match)
        else:
            about = ": ".join(dict.fromkeys(filter(None, (scope(node), called(node)))))
            verdict = match.graph.decide(about, self._verdict, match)
        return None if verdict is True else str(verdict)

    def _verdict(self, match: _Match) -> bool | str:
        """What `check` says: true, or why not."""
        try:
            self.check(*match.arguments())
        except NoMatch as miss:
            return str(miss)
        return True


class _Pattern:
    """The pattern of a rewrite as a small graph."""

    def __init__(self, rewrite: Rewrite) -> None:
        method, name = rewrite.pattern, type(rewrite).__name__
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
            kind, target, found_args, found_kwargs = self._spelled(wanted, found, found_args, found_kwargs)
            if wanted.op != kind or SAME.get(wanted.target, wanted.target) != SAME.get(target, target):
                raise NoMatch(f"expected {called(wanted)}, found {called(found)}{self._hint(wanted, found)}")
            self.taken.append(found)
        if len(args) != len(found_args) or set(kwargs) != set(found_kwargs):
            raise NoMatch(f"{called(found)} is called with other arguments: {found.args} {found.kwargs}")
        commutes = SAME.get(wanted.target, wanted.target) in COMMUTE
        self._either(args, [found_args, found_args[::-1]] if commutes else [found_args])
        for key, value in kwargs.items():
            self._value(value, found_kwargs[key])

    def _spelled(
        self, wanted: fx.Node, found: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
        """Kind, target and arguments of a node: for a module, where a function is wanted, as a call of that."""
        if wanted.op == "call_function" and found.op == "call_module":
            function = _functional(self.graph.module(str(found.target)), found)
            if function is not None and not any(isinstance(v, torch.Tensor) for v in function[2].values()):
                return "call_function", *function
        return found.op, found.target, args, kwargs

    def _hint(self, wanted: fx.Node, found: fx.Node) -> str:
        if wanted.op != "call_function" or found.op != "call_module":
            return ""
        module = self.graph.module(str(found.target))
        function = _functional(module, found)
        if function is None or function[0] is not wanted.target:
            return f", a {type(module).__name__}"
        return f", {_annotate(module)}"

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


def _other_spelling(graph: Graph, pattern: _Pattern) -> list[NearMiss]:
    """Modules that compute what the pattern ends with, but cannot be matched as a function, for they have weights."""
    found: dict[type[nn.Module], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and pattern.root.op == "call_function":
            module = graph.module(str(node.target))
            function = _functional(module, node)
            if function is not None and function[0] is pattern.root.target:
                found.setdefault(type(module), []).append(node)
    return [
        NearMiss(str(nodes[0].target), f"{len(nodes)} of these: {_annotate(graph.module(str(nodes[0].target)))}")
        for nodes in found.values()
    ]


def _annotate(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"a module nn.{kind}, which has weights: call a parameter of the pattern that is annotated nn.{kind}"


class _Called:
    """Stands for a tensor, and answers any function of PyTorch with what was called."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function, args, kwargs or {}


def _functional(module: nn.Module, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The function that a leaf module is nothing but a call of, with the arguments of `node`, by name.

    None if it is more than that, or depends on the mode, as dropout does.
    """
    if len(node.args) != 1 or node.kwargs:
        return None
    try:
        function, args, kwargs = module.forward(_Called())
    except Exception:  # its code needs a real tensor, so it is more than one call
        return None
    bound = _bound(function, args, kwargs)
    if bound is None or any("training" in signature.parameters for signature in _signatures(function)):
        return None
    named = {k: node.args[0] if isinstance(v, _Called) else v for k, v in bound.items()}
    return function, (), {k: v for k, v in named.items() if not k.startswith("_")}  # such as softmax's _stacklevel


def _call(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by name and without those that are the defaults, where the signature is known."""
    if node.op == "call_function" and node.target not in SAME and node.target not in SAME.values():
        bound = _bound(node.target, node.args, node.kwargs)
        if bound is not None:
            return (), bound
    return tuple(node.args), dict(node.kwargs)


def _bound(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, without those that are the defaults; None if no signature of the function fits."""
    for signature in _signatures(target):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            continue
        default = {name: p.default for name, p in signature.parameters.items()}
        plain = (bool, int, float, str, tuple, type(None))
        return {k: v for k, v in bound.arguments.items() if not isinstance(v, plain) or v != default[k]}
    return None


@functools.cache
def _signatures(target: Any) -> tuple[inspect.Signature, ...]:
    try:
        found = [inspect.signature(target)]
    except (TypeError, ValueError):
        found = get_signature_for_torch_op(target) or []
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(s for s in found if not any(p.kind in loose for p in s.parameters.values()))
