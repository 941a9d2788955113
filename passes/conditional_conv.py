"""Conditional convolutions: a kernel that is mixed from those of experts at each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from sdgraph import per_call


class Mixture(nn.Module):
    """What experts add to the kernel and the bias of a convolution.

    Args:
        convs: the convolution itself, which is expert 0, and the others; it is used again for those that lack.
        experts: how many, E.
    """

    def __init__(self, convs: Sequence[Any], experts: int) -> None:
        super().__init__()
        first = convs[0]
        others = [*convs[1:], *[first] * (experts - len(convs))]
        self.weight = nn.Parameter(torch.stack([one.weight.detach().to(first.weight).flatten() for one in others]))
        self.bias = (
            None
            if first.bias is None
            else nn.Parameter(torch.stack([one.bias.detach().to(first.bias) for one in others]))
        )

    def forward(self, gates: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, E), (O, I / groups, h, w) and (O) to (B, O, I / groups, h, w) and (B, O)."""
        kernels = summed(gates, weight, self.weight)
        return kernels, None if bias is None or self.bias is None else summed(gates, bias, self.bias)


def summed(gates: Tensor, first: Tensor, others: Tensor) -> Tensor:
    """The sum of experts for each row of gates: (B, E), the shape of an expert, and (E - 1, its size), to (B, ...)."""
    return (gates[:, :1] * first.flatten() + gates[:, 1:] @ others).reshape(-1, *first.shape)


class ConditionalConv2d(nn.Module):
    """A convolution to whose kernel and bias a sum of experts' is added, with gates computed at each call.

    The sum is zero at first, in every precision, so that the kernel is the convolution's own, bit for bit.

    Args:
        convs, experts: see `Mixture`.
        width: features that are routed by.
    """

    def __init__(self, convs: Sequence[Any], experts: int, width: int, gate: str, temperature: float) -> None:
        super().__init__()
        first = convs[0]
        like = {"dtype": first.weight.dtype, "device": first.weight.device}
        self.weight, self.bias = first.weight, first.bias
        self.mix = Mixture(convs, experts)
        self.routing = nn.Linear(width, experts, **like)
        nn.init.zeros_(self.routing.weight)
        nn.init.zeros_(self.routing.bias)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(temperature, **like))
        self.experts, self.gate = experts, gate
        self.options = (first.stride, first.padding, first.dilation, first.groups)

    def forward(self, x: Tensor, embedding: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        if embedding is not None and timestep is not None:
            gates = self._gates(F.silu(per_call(embedding, timestep)))
            kernels, biases = self.mix(gates, self.weight, self.bias)
            return convolve(x, self.weight, self.bias, kernels, biases, *self.options)
        gates = self._gates(x.mean((2, 3)))
        return conditional_conv2d(x, gates, self.weight, self.bias, self.mix.weight, self.mix.bias, *self.options)

    def _gates(self, features: Tensor) -> Tensor:
        z = self.routing(features) / self.temperature
        return F.softmax(z, 1) - 1 / self.experts if self.gate == "softmax" else torch.sigmoid(z) - 0.5


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernels: Tensor,
    biases: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Convolution with a kernel to which others are added: one for all samples, or one for each sample.

    Those for each sample are convolved with alone, and the results added: a convolution with more groups rounds
    otherwise, and where it convolves with zeros that must not be seen.

    Args:
        x: (B, I, H, W).
        weight, bias: (O, I / groups, h, w) and (O).
        kernels, biases: what is added, (1 or B, O, I / groups, h, w) and (1 or B, O).
    """
    given = tuple(one for one in (x, weight, bias, kernels, biases) if one is not None)
    if has_torch_function(given):
        return handle_torch_function(
            convolve, given, x, weight, bias, kernels, biases, stride, padding, dilation, groups
        )
    if kernels.shape[0] > 1:
        plain = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return plain + by_sample(x, kernels, biases, stride, padding, dilation, groups)
    mixed = None if bias is None or biases is None else bias + biases[0]
    return F.conv2d(x, weight + kernels[0], mixed, stride, padding, dilation, groups)  # laid out as `weight` is


def by_sample(
    x: Tensor, kernels: Tensor, biases: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """Convolution with a kernel for each sample, as a convolution with more groups.

    Args:
        x: (B, I, H, W).
        kernels, biases: (B, O, I / groups, h, w) and (B, O).
    """
    B = x.shape[0]
    flat = None if biases is None else biases.flatten()
    out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), flat, stride, padding, dilation, B * groups)
    return out.reshape(B, -1, *out.shape[2:])


def conditional_conv2d(
    x: Tensor,
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    others: Tensor,
    biases: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Convolution with a kernel for each sample: `weight`, and the sum of experts, of which it is the first.

    Args:
        x: (B, I, H, W).
        gates: of the experts, (B, E).
        weight, bias: (O, I / groups, h, w) and (O).
        others, biases: (E - 1, O * I / groups * h * w) and (E - 1, O).
    """
    given = tuple(one for one in (x, gates, weight, bias, others, biases) if one is not None)
    if has_torch_function(given):
        return handle_torch_function(
            conditional_conv2d, given, x, gates, weight, bias, others, biases, stride, padding, dilation, groups
        )
    if not torch.compiler.is_exporting():
        kernels = weight + summed(gates, weight, others)
        mixed = None if bias is None or biases is None else bias + summed(gates, bias, biases)
        return by_sample(x, kernels, mixed, stride, padding, dilation, groups)
    # ONNX fixes the number of groups in the graph, so there every expert is convolved with
    count, channels = len(others), len(weight)

    def within_groups(each: Tensor) -> Tensor:
        return each.reshape(count, groups, -1, *each.shape[2:]).transpose(0, 1).flatten(0, 2)

    flat = None if biases is None else within_groups(biases)
    kernels = within_groups(others.reshape(count, *weight.shape))
    every = F.conv2d(x, kernels, flat, stride, padding, dilation, groups)
    every = every.reshape(-1, groups, count, channels // groups, *every.shape[2:])
    added = (every * gates[:, None, 1:, None, None, None]).sum(2).flatten(1, 2)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups) * (1 + gates[:, :1, None, None]) + added
