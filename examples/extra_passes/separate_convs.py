"""`SeparateConvs`: depthwise and pointwise convolutions, whose ranks depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgraph import Contract, Findings, Graph, NearMiss, Pass
from sdgraph.options import Bounds, Paths


@dataclass(frozen=True)
class SeparateConvs(Pass):
    """Replace convolutions by depthwise-separable ones, by a truncated SVD for each input channel.

    The kernels that read one of the I input channels form a matrix (O, h·w) of output channels times positions. At
    rank r, r depthwise kernels per input channel and a pointwise convolution of r·I channels replace it, at about
    r/(h·w) of the cost.

    Args:
        energy: the share of the squared singular values to keep, above 0 and below 1.
        where: module paths or patterns of convolutions.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    energy: Annotated[float, Bounds(gt=0, lt=1)] = 0.9
    where: Paths = "**.{conv1,conv2}"

    def run(self, graph: Graph) -> Findings:
        misses, notes = [], []
        for path in graph.matching(self.where):
            conv = graph.module(path)
            rank = graph.decide(path, self.rank, conv)
            before = graph.region(path).macs
            if rank * (conv.out_channels + conv.weight[0, 0].numel()) >= conv.weight[:, 0].numel():
                misses.append(NearMiss(path, f"rank {rank} would cost more"))
                continue
            graph.replace(path, Separable(conv, rank))
            notes.append(f"{path}: rank {rank}, {graph.region(path).macs / before:.0%} of the multiply-accumulates")
        return Findings(tuple(misses), tuple(notes))

    def rank(self, conv: Any) -> int:
        """Return the smallest rank that keeps the energy."""
        kept = singular(conv)[1].square().sum(0).cumsum(0)  # over all input channels
        return 1 + int((kept < self.energy * kept[-1]).sum())


class Separable(nn.Module):
    """A convolution as a depthwise and a pointwise one.

    Args:
        conv: the convolution, without groups.
        rank: the number of depthwise kernels per input channel, at most the number of positions h·w of the kernel.
    """

    def __init__(self, conv: Any, rank: int) -> None:
        super().__init__()
        channels = conv.in_channels
        u, s, v = singular(conv)
        u, v = (u * s[:, None])[:, :, :rank].transpose(0, 1), v[:, :rank]
        self.depthwise = nn.Parameter(v.reshape(channels * rank, 1, *conv.kernel_size).to(conv.weight.dtype))
        self.pointwise = nn.Parameter(u.reshape(-1, channels * rank, 1, 1).to(conv.weight.dtype))
        self.bias = conv.bias
        self.options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": channels}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.depthwise, **self.options), self.pointwise, self.bias)


def singular(conv: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of the kernels by input channel, (I, O, h·w), of shapes (I, O, n), (I, n) and (I, n, h·w)."""
    u, s, v = torch.linalg.svd(conv.weight.detach().float().flatten(2).transpose(0, 1), full_matrices=False)
    return u, s, v
