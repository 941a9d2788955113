"""`FuseProjections`: the projections of an attention as one, whose weights are made of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sdgraph import Contract, Findings, Graph, Pass


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Compute what attention projects from the same tokens by one linear layer: q, k and v of self-attention, k and v
    of cross-attention. One larger product may be summed in another order than three, so it is CLOSE."""

    contract: ClassVar[Contract] = Contract.CLOSE

    def run(self, graph: Graph) -> Findings:
        edits = []
        for path, region in graph.regions().items():
            if region.source_class != "Attention":
                continue
            for tokens, nodes in self.together(graph, path).items():
                fused = Stacked([graph.module(str(node.target)) for node in nodes])
                made = graph.insert(fused, tokens, path=f"{path}.to_{len(nodes)}")
                for node, new in zip(nodes, made, strict=True):
                    graph.rewire(node, new)
                edits.append(f"{path}: {len(nodes)} projections are one")
        return Findings(tuple(edits))

    def together(self, graph: Graph, path: str) -> dict[fx.Node, list[fx.Node]]:
        """The projections of an attention, by the tokens that they read, where several read the same."""
        found: dict[Any, list[fx.Node]] = {}
        for node in graph.region(path).nodes:
            if node.target in [f"{path}.to_{name}" for name in "qkv"] and graph.module(str(node.target)).bias is None:
                found.setdefault(node.args[0], []).append(node)
        return {tokens: nodes for tokens, nodes in found.items() if len(nodes) > 1}


class Stacked(nn.Module):
    """Linear layers without bias, as one."""

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
        self.widths = [linear.out_features for linear in linears]

    def forward(self, tokens: Tensor) -> Any:
        return F.linear(tokens, self.weight).split(self.widths, dim=-1)
