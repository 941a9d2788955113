"""What a node costs at the nominal sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from .graph import Graph


def macs(graph: Graph, node: fx.Node) -> int:
    """Multiply-accumulates of convolutions and matrix products, as PyTorch's own counter sees them."""
    if "macs" not in node.meta:
        node.meta["macs"] = 0
        if node.op.startswith("call_") and isinstance(node.meta.get("val"), torch.Tensor):
            with FlopCounterMode(display=False) as counter:
                graph._evaluate(node, "val")
            node.meta["macs"] = counter.get_total_flops() // 2
    return int(node.meta["macs"])


def written(node: fx.Node) -> int:
    """Bytes of the tensor a node makes; views count as nothing."""
    val = node.meta.get("val")
    views = ("view", "transpose", "permute", "unsqueeze", "reshape", "expand", "chunk")
    if not isinstance(val, torch.Tensor) or node.op in ("placeholder", "get_attr") or node.target in views:
        return 0
    return val.numel() * val.element_size()
