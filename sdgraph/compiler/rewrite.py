"""Local rewrites: a pattern, a condition and a replacement, all three ordinary PyTorch code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from ..graph import Graph
from ..ir.inputs import Dim
from ..ir.nodes import called, scope
from .canonical_calls import as_function
from .matching import Match, NoMatch, Pattern, needs_annotation
from .passes import Findings, Pass
from .report import NearMiss


@dataclass(frozen=True)
class Example:
    """Code that a rewrite applies to or must leave alone. It is documentation and test at once.

    Args:
        code: a function or an `nn.Module` of tensors.
        shapes: the shapes of its arguments by name; sizes may be "B", "H", "W", "L".
        changes: whether the rewrite applies to the code.
    """

    code: Callable[..., Any]
    shapes: Mapping[str, tuple[Dim, ...]]
    changes: bool = True


@dataclass(frozen=True)
class Rewrite(Pass, abstract=True):
    """A local rewrite. Subclasses define three methods over the same named values:

        pattern(self, x, ...)   PyTorch code that returns one value; its parameters match anything. A function matches
                                modules without weights too that are nothing but a call of it: `F.silu(x)` is found in
                                `nn.SiLU`. A parameter annotated with a module class matches a leaf module of that
                                class, and is called.
        check(self, x, ...)     optional; raises `NoMatch(reason)`. Values are nodes of the graph (`node.meta` tells
                                their shapes), constants, or modules.
        replace(self, x, ...)   PyTorch code for what takes the place of the match.

    Places where at least the last operation matched are reported as near misses, with the reason.

    Class attributes:
        by_weights: whether `check` reads the values of weights. Its results are then recorded; see `Graph.decide`.
        examples: code that the rewrite applies to, and code that it must leave alone.
    """

    by_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[Example, ...]] = ()

    def pattern(self, *values: Any) -> Any:
        """Compute the value to find, as PyTorch code.

        Args:
            values: the inputs of the pattern; each parameter matches one value.
        Returns:
            The value of an operation.
        """
        raise NotImplementedError(f"{type(self).__name__}.pattern")

    def check(self, *values: Any) -> None:
        """Raise `NoMatch` for a match that the rewrite does not apply to.

        Args:
            values: the matched values, with `meta` that holds shape and dtype.
        """

    def replace(self, *values: Any) -> Any:
        """Compute the value that replaces a match, as PyTorch code.

        Args:
            values: the inputs of the pattern.
        Returns:
            A value of the same shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__}.replace")

    def run(self, graph: Graph) -> Findings:
        pattern = Pattern(self.pattern, type(self).__name__)
        found = False
        misses: list[NearMiss] = []
        for node in list(graph.fx.nodes):
            if node.op in ("placeholder", "output") or node._erased:
                continue
            match = Match(graph, pattern)
            refused = self._refused(match, node)
            if refused is not None:
                if match.taken:
                    where = f"{scope(node) or '(top level)'}, node {node.name}"
                    misses.append(NearMiss(where, refused, len(match.taken)))
                continue
            graph.replace(node, self.replace, *match.arguments(), path=scope(node))
            found = True
        if not found:
            misses += _other_spelling(graph, pattern)
        return Findings(tuple(sorted(misses, key=lambda m: -m.matched)))

    def _refused(self, match: Match, node: fx.Node) -> str | None:
        """Return why the rewrite does not apply with `node` as the result; None if it does."""
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

    def _verdict(self, match: Match) -> bool | str:
        """Return true if `check` accepts the match, and its reason otherwise."""
        try:
            self.check(*match.arguments())
        except NoMatch as miss:
            return str(miss)
        return True


def _other_spelling(graph: Graph, pattern: Pattern) -> list[NearMiss]:
    """Return modules that compute what the pattern ends with, but do not match because they have weights."""
    nodes_by_class: dict[type[nn.Module], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and pattern.root.op == "call_function":
            module = graph.module(str(node.target))
            function = as_function(module, node)
            if function is not None and function[0] is pattern.root.target:
                nodes_by_class.setdefault(type(module), []).append(node)
    return [
        NearMiss(str(nodes[0].target), f"{len(nodes)} of these: {needs_annotation(graph.module(str(nodes[0].target)))}")
        for nodes in nodes_by_class.values()
    ]
