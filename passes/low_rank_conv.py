"""Conditional convolutions whose experts differ from the convolution by kernels of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composed import applied
from .conditional_conv import Routed


class LowRankConv2d(Routed):
    """A convolution with the kernel W + Σ a_k B_k A_k, where a_k is the gate of an expert, and B_k A_k of low rank.

    The kernel is never formed. A, which is all A_k one below the other, maps the input to few channels. The gates scale
    these, and B maps them to the output. Initially the gates are zero, so that the result is the convolution's own,
    bit for bit.

    Args:
        convs: the convolution itself, without groups, and other experts. Experts that are missing begin as further
            parts of its kernel, the largest first.
        rank: the rank of every B_k A_k, r; E - 1 times r is at most the rank of the kernel as a matrix.
        experts, width, gate, temperature: see `Routed`.
    """

    def __init__(
        self, convs: Sequence[Any], experts: int, width: int, gate: str, temperature: float, rank: int
    ) -> None:
        super().__init__(convs[0], experts, width, gate, temperature)
        self.rank = rank
        kernels = [conv.weight.detach().to(self.weight).float().flatten(1) for conv in convs]
        parts = [truncated(kernel - kernels[0], rank) for kernel in kernels[1:]]
        missing = experts - len(convs)
        if missing:
            parts.append(truncated(kernels[0], rank * missing))
        up, down = torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
        self.down = nn.Parameter(down.to(self.weight).reshape(-1, *self.weight.shape[1:]))
        self.up = nn.Parameter(up.to(self.weight)[:, :, None, None])

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Return the convolution of `x`.

        Args:
            x: (B, I, H, W).
            embedding: (B, D), for gates by timestep; by default they depend on `x`.
        Returns:
            (B, O, H', W').
        """
        gates = self.gates(x.mean((2, 3)) if embedding is None else F.silu(embedding))
        scales = gates[:, 1:, None].expand(-1, -1, self.rank).flatten(1)[:, :, None, None]
        few = applied(x, self.down, None, self.options) * scales
        return applied(x, self.weight, self.bias, self.options) + F.conv2d(few, self.up)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (O, rank) and (rank, I) of the best approximation of a matrix (O, I), the largest part first.

    The first has orthonormal columns. They are eigenvectors of the small matrix M·Mᵀ, because a singular value
    decomposition of a kernel takes far longer.
    """
    up = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(1)[:, :rank]
    return up, up.mT @ matrix
