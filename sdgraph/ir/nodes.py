"""Nodes of a graph: their values, names and module paths, what they are computed from, and their cost."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def values(node: fx.Node) -> tuple[Any, Any]:
    """Return the two values of a node, as meta tensors or numbers: at the nominal and at the generic sizes."""
    return node.meta["val"], node.meta["probe"]


def called(node: fx.Node) -> str:
    """Return the name of the function, method, module or weight that a node calls or reads."""
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def weights_read(nodes: Iterable[fx.Node]) -> dict[str, None]:
    """Return the paths of the leaf modules that nodes call and the names of the tensors that they read, in order."""
    return {str(node.target): None for node in nodes if node.op in ("call_module", "get_attr")}


def residual_like(residual: fx.Node, value: fx.Node) -> None:
    """Give an optional residual the shape of the value that it is added to."""
    for key in ("val", "probe"):
        residual.meta[key] = torch.empty_like(value.meta[key])


def scope(node: fx.Node) -> str:
    """Return the path of the innermost source module that a node belongs to; "" is the model itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack)) if stack else ""


def ancestors(
    node: fx.Node, inputs: Callable[[fx.Node], list[fx.Node]] = lambda node: node.all_input_nodes
) -> Iterator[fx.Node]:
    """Yield a node and all nodes that its value is computed from, depth first.

    Args:
        inputs: returns those inputs of a node that are followed.
    """
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        sources = inputs(current)
        stack += [source for source in sources if source not in seen]
        seen.update(sources)


def eliminate_dead_code(nodes: fx.Graph, unneeded: Collection[fx.Node] = ()) -> None:
    """Remove the nodes that nothing uses.

    Args:
        unneeded: inputs that may be removed too; all other inputs stay.
    """
    for node in reversed(nodes.nodes):
        stays = node.op == "output" or (node.op == "placeholder" and node not in unneeded)
        if not node.users and not stays:
            nodes.erase_node(node)


# Views and element-wise operations multiply no matrices and are most of a graph, so the counter is not run on them.
VIEWS = {"view", "transpose", "permute", "unsqueeze", "reshape", "expand", "chunk", "flatten", "contiguous"}
ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.getitem, getattr),
    *(torch.cat, torch.sin, torch.cos, torch.exp, torch.arange, F.silu, F.gelu, F.interpolate),
}


def count_macs(node: fx.Node, module: nn.Module | None, run: Callable[[], object]) -> int:
    """Return the multiply-accumulates of convolutions and matrix products in a node, as PyTorch counts them.

    Args:
        module: the module that the node calls, if it calls one.
        run: evaluates the node at the nominal sizes.
    """
    if not isinstance(node.meta.get("val"), torch.Tensor) or not node.op.startswith("call_"):
        return 0
    if node.target in ELEMENTWISE or node.target in VIEWS or node.target == "to":
        return 0
    # What most graphs cost is counted here, because PyTorch's counter evaluates the node, which is slow.
    val = node.meta["val"]
    if isinstance(module, nn.Linear | nn.Conv2d):
        return int(val.numel() * module.weight[0].numel())
    match node.args:
        case (fx.Node() as query, fx.Node() as key, *_) if node.target is F.scaled_dot_product_attention:
            return int((query.meta["val"].numel() + val.numel()) * key.meta["val"].shape[-2])
    if module is not None and all(p.ndim < 2 for p in module.parameters()):
        return 0
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def written(node: fx.Node) -> int:
    """Return the bytes of the tensor that a node writes; views write none."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or node.op in ("placeholder", "get_attr") or node.target in VIEWS:
        return 0
    return val.numel() * val.element_size()
