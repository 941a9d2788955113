"""An ATen graph in the form that torch's translator to ONNX knows, and gets right."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
SORTABLE = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)  # by ONNX Runtime's TopK


def simplify(graph: fx.Graph) -> None:
    """Remove what computes nothing at inference; write the rest with operators that have a right translation."""
    for node in list(graph.nodes):
        rule = _RULES.get(node.target)
        if rule is not None:
            rule(graph, node)
    graph.lint()


def _cat(graph: fx.Graph, node: fx.Node) -> None:
    """Cast the parts of `cat` first: `torch.cat` promotes dtypes but ONNX `Concat` does not.

    The translator casts for elementwise operators.
    """
    parts: Any = node.args[0]
    for part in {*parts}:
        if part.meta["val"].dtype != node.meta["val"].dtype:
            node.replace_input_with(part, _cast(graph, node, part, node.meta["val"].dtype))


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    graph.erase_node(node)


def _to(graph: fx.Graph, node: fx.Node) -> None:
    dtype: Any = node.args[1]
    if not _skip(graph, node):
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": dtype}


def _div(graph: fx.Graph, node: fx.Node) -> None:
    if node.args[1] == 1.0:
        _skip(graph, node)


def _skip(graph: fx.Graph, node: fx.Node) -> bool:
    """Give the argument of a node to its users, if the node does not change it."""
    given: Any = node.args[0]
    if given.meta["val"].dtype != node.meta["val"].dtype:
        return False
    node.replace_all_uses_with(given)
    graph.erase_node(node)
    return True


def _floordiv(graph: fx.Graph, node: fx.Node) -> None:
    """Divide a multiple of the divisor, which ONNX and Python divide alike: otherwise ONNX rounds towards zero."""
    number, divisor = node.args
    if not any(map(_may_be_negative, node.args)):
        return
    with graph.inserting_before(node):
        rest = _size(graph, node, operator.mod, number, divisor)
        node.args = (_size(graph, node, operator.sub, number, rest), divisor)


def _may_be_negative(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return bool(value < 0)
    if value.target in (operator.neg, operator.sub):
        return True
    return value.target in (operator.add, operator.mul, operator.floordiv, operator.mod) and any(
        map(_may_be_negative, value.args)
    )


def _size(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Return a node that computes a size, in the scope of another node."""
    node = graph.call_function(target, args)
    value = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    node.meta = {**like.meta, "val": value}
    return node


def _sort(graph: fx.Graph, node: fx.Node) -> None:
    """Write sorts as ONNX's `TopK`, which is stable; `argsort` is its second output."""
    given = _arguments(node)
    values = given["self"]
    dtype = values.meta["val"].dtype
    if dtype not in SORTABLE and not dtype.is_floating_point:
        values = _cast(graph, node, values, torch.int64)
    with graph.inserting_before(node):
        both = new = graph.call_function(aten.sort.default, (values, given["dim"], given["descending"]))
        both.meta = {**node.meta, "val": torch.sort(values.meta["val"], given["dim"], given["descending"])}
        if node.target in (aten.argsort.default, aten.argsort.stable):
            new = graph.call_function(operator.getitem, (both, 1))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _scatter(graph: fx.Graph, node: fx.Node) -> None:
    """Scatter in float32, because ONNX Runtime has float16 kernels on CUDA only; write a mean as a sum over a count.

    `ScatterElements` has no mean, and the translator would silently keep the last value.
    """
    given = _arguments(node)
    own, index, source = given["self"], given["index"], given["src"]
    dtype = own.meta["val"].dtype
    half = dtype == torch.float16
    mean = given.get("reduce") == "mean"
    if not mean and not half:
        return
    if half:
        own, source = (_cast(graph, node, value, torch.float32) for value in (own, source))
    with graph.inserting_before(node):
        if mean:
            new = _mean(graph, own, given["dim"], index, source, given["include_self"])
        else:
            named = {name: value for name, value in given.items() if name not in ("self", "dim", "index", "src")}
            new = _call(graph, node.target, own, given["dim"], index, source, **named)
    if half:
        new = _cast(graph, node, new, dtype)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _mean(graph: fx.Graph, own: fx.Node, dim: int, index: fx.Node, source: fx.Node, include_self: bool) -> fx.Node:
    total, count = own, _call(graph, aten.ones_like.default, own)
    if not include_self:
        zero = _call(graph, aten.zeros_like.default, source)
        total, count = (_call(graph, aten.scatter.src, values, dim, index, zero) for values in (total, count))
    one = _call(graph, aten.ones_like.default, source)
    total = _call(graph, aten.scatter_add.default, total, dim, index, source)
    count = _call(graph, aten.scatter_add.default, count, dim, index, one)
    if own.meta["val"].is_floating_point():
        return _call(graph, aten.div.Tensor, total, count)
    return _call(graph, aten.div.Tensor_mode, total, count, rounding_mode="floor")


def _call(graph: fx.Graph, target: Any, like: fx.Node, *args: Any, **options: Any) -> fx.Node:
    """Return a node whose value has the shape and dtype of its first argument."""
    new = graph.call_function(target, (like, *args), options)
    new.meta = dict(like.meta)
    return new


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by their names in the operator's schema."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}


def _cast(graph: fx.Graph, node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
    new.meta = {**node.meta, "val": value.meta["val"].to(dtype)}
    return new


_RULES: dict[Any, Callable[[fx.Graph, fx.Node], object]] = {
    operator.floordiv: _floordiv,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten._assert_tensor_metadata.default: _erase,
    aten.dropout.default: _skip,
    aten.contiguous.default: _skip,
    aten.div.Tensor: _div,
    aten.to.dtype: _to,
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.argsort.default: _sort,
    aten.argsort.stable: _sort,
    aten.scatter_reduce.two: _scatter,
    aten.scatter_add.default: _scatter,
}
