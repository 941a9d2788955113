"""The values of nodes: computed on the meta device at the nominal and at the generic sizes, and anew after edits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..errors import EditError, SdgraphError, ShapeError
from .dims import Dims
from .inputs import Input
from .nodes import called, residual_like, scope, values
from .weights import meta_like, on_meta

SIGNS: Mapping[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
}


class Evaluated(Protocol):
    """What evaluation reads of a graph; see `GraphState`, which is one."""

    fx: torch.fx.Graph
    inputs: tuple[Input, ...]
    dims: Dims
    _meta: dict[tuple[str, str], nn.Module]

    def module(self, path: str) -> nn.Module: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def shape(self, node: torch.fx.Node) -> str: ...

    def probe_dtype(self, key: str) -> torch.dtype: ...


@dataclass(frozen=True)
class Operation:
    """What a node does. As long as this and the values of its inputs stay the same, so do the node's values.

    The operation that the values of a node were computed by is in its `meta["evaluated"]`.
    """

    op: str
    target: Any
    args: str
    kwargs: str

    @classmethod
    def of(cls, node: fx.Node) -> Operation:
        return cls(node.op, node.target, repr(node.args), repr(node.kwargs))


def infer(graph: Evaluated, node: fx.Node) -> None:
    """Compute both values of a node; see `GraphState.infer`."""
    node.meta.pop("macs", None)
    node.meta["evaluated"] = Operation.of(node)
    versions = _versions(node)
    for key in ("val", "probe"):
        try:
            node.meta[key] = computed(*_call(graph, node, key))
        except SdgraphError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{n.name}: {graph.shape(n)}" for n in node.all_input_nodes)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ShapeError(
                f"{called(node)} cannot take {shapes or 'its arguments'}: {reason}",
                where=f"{scope(node) or '(top level)'}, node {node.name}",
                hint="the shapes on both sides must agree at every size of the call",
            ) from error
    if _versions(node) != versions:
        raise EditError(
            f"{called(node)} edits a tensor in place",
            where=f"{scope(node) or '(top level)'}, node {node.name}",
            hint="use the form that returns a new tensor",
        )
    nominal, generic = values(node)
    if isinstance(nominal, int | float) and not isinstance(nominal, bool):
        node.meta["size"] = _size(graph, node, nominal, generic)


def _versions(node: fx.Node) -> list[int]:
    """Return how often each tensor that a node reads has been edited in place."""
    read = [v for n in node.all_input_nodes for v in values(n) if isinstance(v, torch.Tensor)]
    return [v._version for v in read if not v.is_inference()]


def evaluate(graph: Evaluated, node: fx.Node, key: str) -> Any:
    """The value of a node, computed from the values of its inputs.

    Args:
        key: "val" for the nominal sizes, "probe" for the generic ones.
    """
    code, args, kwargs = _call(graph, node, key)
    with torch.no_grad():
        return code(*args, **kwargs)


def elsewhere(graph: Evaluated, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """The value of a node at sizes that are neither the nominal nor the generic ones; None if it has none there.

    Args:
        value: returns the values of its inputs there, which are not None.
    """
    try:
        return computed(*_call(graph, node, "val", value))
    except Exception:  # whatever an operation raises at sizes that it does not take
        return None


def _call(
    graph: Evaluated, node: fx.Node, key: str, value: Callable[[fx.Node], Any] | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return the callable of a node and its arguments, the values of its inputs by a key or as `value` returns them."""
    given = (lambda n: n.meta[key]) if value is None else value
    args, kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
    if node.op == "call_module":
        return _meta_module(graph, str(node.target), key).forward, args, kwargs
    if node.op == "call_function":
        return node.target, args, kwargs  # type: ignore[return-value]
    if node.op == "call_method":
        return getattr(args[0], str(node.target)), args[1:], kwargs
    if node.op == "get_attr":
        return meta_like, (graph.tensor(str(node.target)), graph.probe_dtype(key)), {}
    raise EditError(f"a {node.op} node cannot be evaluated", where=node.name)


def propagate(graph: Evaluated, anew: bool) -> None:
    """Compute the values that edits have changed; see `GraphState.propagate`."""
    changed: set[fx.Node] = set()
    residuals = {i.name for i in graph.inputs if i.shape is None}
    shaped: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op in ("placeholder", "output"):
            continue
        for arg in node.all_input_nodes:
            if arg.op == "placeholder" and arg.name in residuals and arg not in shaped:
                # Shaped anew, for what it is added to may have changed.
                other = next(n for n in node.all_input_nodes if n is not arg)
                shaped.add(arg)
                if arg.meta["val"] is None or _kinds(arg) != _kinds(other):
                    changed.add(arg)
                    residual_like(arg, other)
        current = not anew and node.meta.get("evaluated") == Operation.of(node)
        if current and changed.isdisjoint(node.all_input_nodes):
            continue
        before = _kinds(node) if "val" in node.meta else None
        infer(graph, node)
        if before != _kinds(node):
            changed.add(node)


def _size(graph: Evaluated, node: fx.Node, nominal: Any, generic: Any) -> str | None:
    """A number as an expression in the call's sizes: sizes are recognised, arithmetic is composed."""
    if node.op == "call_method":
        return graph.dims.name(nominal, generic)
    sides = [a.meta.get("size") if isinstance(a, fx.Node) else repr(a) for a in node.args]
    if node.target not in SIGNS or None in sides:
        return None
    return f"({sides[0]} {SIGNS[node.target]} {sides[1]})"


def _meta_module(graph: Evaluated, path: str, key: str) -> nn.Module:
    if (path, key) not in graph._meta:
        graph._meta[path, key] = on_meta(graph.module(path), graph.probe_dtype(key))
    return graph._meta[path, key]


def _kinds(node: fx.Node) -> list[Any]:
    """Shape and dtype of each tensor among a node's two values, and whatever else is among them."""
    kinds: list[Any] = []
    for value in values(node):
        for item in value if isinstance(value, tuple | list) else (value,):
            kinds.append((item.shape, item.dtype) if isinstance(item, torch.Tensor) else item)
    return kinds


# What the result depends on besides the arguments is in `extra_repr` and the weights; the result shares no memory.
MODULES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
FUNCTIONS = (F.scaled_dot_product_attention, F.gelu, operator.add, operator.truediv)

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_known: dict[tuple[Any, ...], Layout] = {}


def computed(code: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return `code(*args, **kwargs)` for tensors on the meta device.

    Args:
        code: a function, or a method such as the `forward` of a module.
    """
    module: Any = getattr(code, "__self__", None)
    with torch.no_grad():
        about: tuple[Any, ...]
        if type(module) in MODULES:
            about = (type(module), module.extra_repr(), *map(_layout, module.parameters()))
        elif code in FUNCTIONS and isinstance(args[0], torch.Tensor):
            about = (code,)
        else:
            return code(*args, **kwargs)
        key = (*about, *map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items()))
        if key not in _known:
            _known[key] = _layout(code(*args, **kwargs))
        shape, stride, dtype = _known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return repr(value)
