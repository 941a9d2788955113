"""What a node costs at the nominal sizes."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from .graph import Graph

# Views and element-wise operations: known to multiply no matrices, and most of a graph, so not worth counting.
VIEWS = {"view", "transpose", "permute", "unsqueeze", "reshape", "expand", "chunk", "flatten", "contiguous"}
ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.getitem, getattr),
    *(torch.cat, torch.sin, torch.cos, torch.exp, torch.arange, F.silu, F.gelu, F.interpolate),
}


def macs(graph: Graph, node: fx.Node) -> int:
    """Multiply-accumulates of convolutions and matrix products, as PyTorch's own counter sees them."""
    if "macs" not in node.meta:
        node.meta["macs"] = _count(graph, node)
    return int(node.meta["macs"])


def _count(graph: Graph, node: fx.Node) -> int:
    if not isinstance(node.meta.get("val"), torch.Tensor) or not node.op.startswith("call_"):
        return 0
    if node.target in ELEMENTWISE or node.target in VIEWS or node.target == "to":
        return 0
    if node.op == "call_module" and all(p.ndim < 2 for p in graph.module(str(node.target)).parameters()):
        return 0
    with FlopCounterMode(display=False) as counter:
        graph._evaluate(node, "val")
    return int(counter.get_total_flops()) // 2


def written(node: fx.Node) -> int:
    """Bytes of the tensor a node makes; views count as nothing."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or node.op in ("placeholder", "get_attr") or node.target in VIEWS:
        return 0
    return val.numel() * val.element_size()
