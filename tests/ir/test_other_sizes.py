"""Numbers that code computes from the sizes of a call, compared with its graph at many sizes: the same, or refused.

A trace looks at two sizes. Whatever is equal at both by chance, such as the length of a slice with a constant bound, is
no number of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import sdgraph
from sdgraph.errors import TraceError
from sdgraph.ir.guards import satisfied

HEIGHTS = (1, 2, 3, 4, 5, 7, 16, 33, 64, 65, 99, 100, 101, 130, 300)

# x: (B, 4, H, W)
SAME: dict[str, Callable[[torch.Tensor], Any]] = {
    "bounds of a slice": lambda x: x[:, :, :4].shape[2],
    "far bounds of a slice": lambda x: x[:, :, :100].shape[2],
    "a slice from": lambda x: x[:, :, 100:].shape[2],
    "a slice from the end": lambda x: x[:, :, -4:].shape[2],
    "steps of a slice": lambda x: x[:, :, ::64].shape[2],
    "a view of it": lambda x: x[:, :, ::64].reshape(x.shape[0], 4, -1, x.shape[3]).shape[2],
    "strides": lambda x: x[:, :, ::64].contiguous().stride(1),
    "pooling": lambda x: F.max_pool2d(x, 16, ceil_mode=True).shape[2],
    "pooling what is padded": lambda x: F.avg_pool2d(F.pad(x, (0, 64, 0, 64)), 64).shape[2],
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, 4).shape[2],
    "interpolation": lambda x: F.interpolate(x, size=(8, 8)).shape[2],
    "padding": lambda x: F.pad(x, (0, 0, 0, x.shape[2] // 64)).shape[2],
    "zeros": lambda x: torch.zeros(x.shape[2] // 64 + 1).shape[0],
    "their sum": lambda x: torch.ones(x.shape[2] // 64 + 1).sum(),
    "arange": lambda x: torch.arange(0, x.shape[2], 100).shape[0],
    "linspace": lambda x: torch.linspace(0, 1, x.shape[2] // 64 + 1).shape[0],
    "unfolding": lambda x: x.unfold(2, 1, 64).shape[2],
    "columns": lambda x: F.unfold(x, 1, stride=64).shape[2],
    "products": lambda x: math.prod(x[:, :, ::64].shape[2:3]),
    "elements": lambda x: x.numel() // 100_000,
    "maximum": lambda x: max(x.shape[2], 4),
    "torch's minimum": lambda x: torch.sym_min(x.shape[2], 100),
    "division": lambda x: x.shape[2] // 1000,
    "division of": lambda x: 1000 // x.shape[2],
    "remainders": lambda x: x.shape[2] % 1000,
    "absolute values": lambda x: abs(x.shape[2] - 100),
    "comparison": lambda x: 2 if x.shape[2] >= 2 else 3,
    "equality": lambda x: 2 if x.shape[2] == 1 else 3,
    "membership": lambda x: x.shape[2] in (7, 33),
    "and": lambda x: x.shape[2] and 3,
    "channels that are split": lambda x: len(x.split(1, dim=1)),
}
REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "split": lambda x: torch.cat([part.flip(2) for part in x.split(100, dim=2)], 2),
    "chunk": lambda x: torch.cat([part.flip(2) for part in x.chunk(3, dim=2)], 2),
    "unbind": lambda x: torch.stack(x.unbind(2)[::-1], 2),
    "squeeze": lambda x: x.squeeze().ndim,
    "squeeze of a dimension": lambda x: x.squeeze(2).ndim,
}


@pytest.mark.parametrize("name", SAME)
def test_numbers_that_agree_at_both_sizes_of_a_trace(name: str) -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        return x * SAME[name](x)

    graph = sdgraph.trace_code(code, x=("B", 4, "H", "W"))
    module = fx.GraphModule(graph.weights, graph.fx)
    compared = 0
    for height in HEIGHTS:
        for batch in (1, 3):
            if not all(satisfied(guard, {"B": batch, "H": height, "W": 5, "L": 1}) for guard in graph.guards):
                continue  # refused
            x = torch.randn(batch, 4, height, 5)
            torch.testing.assert_close(module(x), code(x), equal_nan=True)
            compared += 1
    assert compared > len(HEIGHTS)


@pytest.mark.parametrize("name", REFUSED)
def test_how_many_results_there_are(name: str) -> None:
    with pytest.raises(TraceError, match="depends on the sizes"):
        sdgraph.trace_code(lambda x: x * REFUSED[name](x), x=("B", 4, "H", "W"))


def test_numbers_of_code_that_is_inserted(small: sdgraph.Graph) -> None:
    graph = small.copy()
    graph.insert_after(graph.region("conv_in").output, lambda x: x * x[:, :, :4].shape[2])
    assert any(node.target == "size" and node.meta["val"] == 4 for node in graph.nodes)
