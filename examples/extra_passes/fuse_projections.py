"""`FuseProjections`: one linear layer for several projections, whose weights are computed from theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sdgraph import Contract, Graph, Pass


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Fuse the projections of an attention that read the same tokens into one linear layer.

    These are q, k and v of self-attention, and k and v of cross-attention. The contract is CLOSE, because one large
    matrix product may be summed in another order than three small ones.
    """

    contract: ClassVar[Contract] = Contract.CLOSE

    def run(self, graph: Graph) -> None:
        for path, region in graph.regions().items():
            if region.source_class != "Attention":
                continue
            for tokens, projections in self.projections_by_tokens(graph, path).items():
                linear = StackedLinear([graph.module(str(node.target)) for node in projections])
                graph.replace(tuple(projections), linear, tokens, path=f"{path}.to_{len(projections)}")

    def projections_by_tokens(self, graph: Graph, path: str) -> dict[fx.Node, list[fx.Node]]:
        """Return the projections of an attention by the tokens that they read, where several read the same tokens."""
        projections: dict[Any, list[fx.Node]] = {}
        for node in graph.region(path).nodes:
            if node.target in [f"{path}.to_{name}" for name in "qkv"] and graph.module(str(node.target)).bias is None:
                projections.setdefault(node.args[0], []).append(node)
        return {tokens: nodes for tokens, nodes in projections.items() if len(nodes) > 1}


class StackedLinear(nn.Module):
    """Several linear layers without bias as one.

    Args:
        linears: the layers, with the same number of input features.
    """

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
        self.widths = [linear.out_features for linear in linears]

    def forward(self, tokens: Tensor) -> Any:
        return F.linear(tokens, self.weight).split(self.widths, dim=-1)
