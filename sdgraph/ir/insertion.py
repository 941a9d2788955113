"""Ordinary PyTorch code becomes nodes of a graph that is there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import EditError, SdgraphError, ShapeError, TraceError
from .interception import tracing
from .nodes import values, weights_read
from .paths import above
from .state import GraphState
from .tracer import Tracer


def insert(
    graph: GraphState,
    code: Callable[..., Any] | nn.Module,
    args: Sequence[Any],
    before: fx.Node | None,
    path: str,
    leaving: Iterable[fx.Node],
) -> Any:
    """Trace code into a graph; see `Graph.insert`."""
    is_module = isinstance(code, nn.Module)
    if is_module and not path:
        raise EditError("a module is inserted without a path", hint="pass path=, where it is registered")
    tracer = Tracer(graph, code if isinstance(code, nn.Module) else None, prefix=path, leaving=leaving)
    tracer.module_stack = module_stack(graph, path.rpartition(".")[0] if is_module else path)
    nodes_before = set(graph.fx.nodes)
    try:
        with graph.fx.inserting_before(before or _earliest_place(graph, args)), tracing(tracer):
            result = code(*[tracer.proxy(a) if isinstance(a, fx.Node) else a for a in args])
            new_value = tracer.create_arg(result)
    except BaseException as error:
        for node in reversed([n for n in graph.fx.nodes if n not in nodes_before]):
            graph.fx.erase_node(node)
        for name, displaced in reversed(tracer.displaced.items()):
            if displaced is not None:
                graph._put(name, displaced)
        graph.weights.keep_only(weights_read(graph.fx.nodes))
        # within a pass the error is that of the pass, which names its line
        if graph._editor or isinstance(error, SdgraphError) or not isinstance(error, Exception):
            raise
        raise TraceError(
            f"the code that is inserted failed while being traced: {type(error).__name__}: {error}",
            where=path or tracer.failed_at,
            hint="it is called with values of the graph, whose sizes are free; check that it runs on tensors",
        ) from error
    graph.guards = tuple(dict.fromkeys((*graph.guards, *tracer.guards)))
    return new_value


def _earliest_place(graph: GraphState, args: Sequence[Any]) -> fx.Node:
    """The first operation before which all arguments exist."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    nodes = [a for a in args if isinstance(a, fx.Node) and a.op != "placeholder"]
    if not nodes:
        return first_operation(graph)
    last = max(nodes, key=lambda n: order[n])
    return last.next


def first_operation(graph: GraphState) -> fx.Node:
    """The first node that is no input."""
    first: fx.Node = next(n for n in graph.fx.nodes if n.op != "placeholder")
    return first


def module_stack(graph: GraphState, path: str) -> dict[str, Any]:
    """The module stack of a path: that of a node already there, or one made from its parts."""
    for node in graph.fx.nodes:
        stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
        if path in stack:
            return {p: stack[p] for p in list(stack)[: list(stack).index(path) + 1]}
    holders = [p for p in reversed(list(above(path))) if p in graph.classes]
    return {p: (p, graph.classes.get(p, "")) for p in (*holders, path) if p}


def check_same_shape(graph: GraphState, old: fx.Node, new: Any, path: str) -> None:
    """Refuse a new value that has another shape or dtype than the old one, at either call.

    Args:
        path: where it is, for the error.
    """
    if not isinstance(new, fx.Node) or not isinstance(new.meta["val"], torch.Tensor):
        raise EditError("the code must return one tensor", where=path, hint="return the new value alone")
    for was, now in zip(values(old), values(new), strict=True):
        if was.shape != now.shape or was.dtype != now.dtype:
            raise ShapeError(
                f"the new value is {graph.shape(new)} {now.dtype}, the old one is {graph.shape(old)} {was.dtype}",
                where=path,
                hint="return a tensor of the old shape and dtype, at every size and model dtype",
            )
