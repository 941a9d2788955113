"""Reading a node of a graph: its values, its name for people, its place among the modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


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
