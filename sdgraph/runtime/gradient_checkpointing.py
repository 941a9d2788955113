"""Gradient checkpointing: the blocks of a graph are recomputed in the backward pass instead of being kept."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from ..ir.nodes import scope

BLOCK = re.compile(r"down_blocks\.\d+|mid_block|up_blocks\.\d+")


class Checkpointed(nn.Module):
    """A part of a graph, of which only the inputs are kept for the backward pass."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.part, *inputs, use_reentrant=False)


def checkpoint_blocks(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module over the same weights that recomputes its blocks in the backward pass.

    Args:
        module: the straight-line code, whose nodes know the module paths that they come from.
    """
    parts: dict[fx.Node, int] = {}
    blocks: set[int] = set()
    number, before = -1, None
    for node in module.graph.nodes:
        match = BLOCK.match(scope(node))
        block = match[0] if match else ""
        if block != before:
            number, before = number + 1, block
        if block:
            blocks.add(number)
        parts[node] = number
    split = split_module(module, module, lambda node: parts[node])
    for name, part in list(split.named_children()):
        if name.startswith("submod_") and int(name.removeprefix("submod_")) in blocks:
            setattr(split, name, Checkpointed(part))
    return split
