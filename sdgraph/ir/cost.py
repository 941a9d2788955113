"""The cost of a node at the nominal sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

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
