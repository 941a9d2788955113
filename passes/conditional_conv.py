"""Conditional convolutions, whose kernels are mixed from the kernels of experts at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from sdgraph import per_call

from .composed import ConvOptions, applied


class Mixture(nn.Module):
    """The sum of experts that is added to the kernel and the bias of a convolution.

    Args:
        convs: the convolution itself, which is expert 0, and other experts. Missing experts are parts of it.
        experts: the number of experts, E.
    """

    def __init__(self, convs: Sequence[Any], experts: int) -> None:
        super().__init__()
        self.weight = _others([conv.weight.detach() for conv in convs], experts)
        self.bias = None if convs[0].bias is None else _others([conv.bias.detach() for conv in convs], experts)

    def forward(self, gates: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the sums for the kernel and for the bias.

        Args:
            gates: (B, E).
            weight, bias: the parameters of the convolution, (O, I / groups, h, w) and (O).
        Returns:
            (B, O, I / groups, h, w) and (B, O).
        """
        kernels = summed(gates, weight, self.weight)
        return kernels, None if bias is None or self.bias is None else summed(gates, bias, self.bias)


def _others(values: Sequence[Tensor], experts: int) -> nn.Parameter:
    """Return the kernels or biases of the experts but the first, flattened: (E - 1, size of an expert).

    A missing expert has the first one's values for a share of the outputs. Were it a copy, gates that sum to zero
    would have no gradient, and the experts would stay copies.
    """
    first, *others = values
    missing = experts - len(values)
    share = torch.arange(len(first), device=first.device).reshape(-1, *[1] * (first.ndim - 1)) % (missing + 1)
    parts = [first * (share == number) for number in range(1, missing + 1)]
    return nn.Parameter(torch.stack([value.to(first).flatten() for value in (*others, *parts)]))


def summed(gates: Tensor, first: Tensor, others: Tensor) -> Tensor:
    """Return the sum of experts for every row of gates.

    Args:
        gates: (B, E).
        first: the first expert, of any shape.
        others: the other experts, flattened: (E - 1, size of an expert).
    Returns:
        (B, *shape of an expert).
    """
    return (gates[:, :1] * first.flatten() + gates[:, 1:] @ others).reshape(-1, *first.shape)


class Routed(nn.Module):
    """A convolution with experts whose gates are computed at every call, and are zero initially, in every precision.

    Args:
        conv: the convolution, whose parameters are used.
        experts: the number of experts, E.
        width: the number of features that the gates are computed from.
        gate, temperature: see `MECondConv`.
    """

    def __init__(self, conv: Any, experts: int, width: int, gate: str, temperature: float) -> None:
        super().__init__()
        like = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        self.weight, self.bias = conv.weight, conv.bias
        self.options: ConvOptions = conv.stride, conv.padding, conv.dilation, conv.groups
        self.routing = nn.Linear(width, experts, **like)
        nn.init.zeros_(self.routing.weight)
        nn.init.zeros_(self.routing.bias)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(temperature, **like))
        self.experts, self.gate = experts, gate

    def gates(self, features: Tensor) -> Tensor:
        """Return the gates, (B, E), from features, (B, width)."""
        z = self.routing(features) / self.temperature
        return F.softmax(z, 1) - 1 / self.experts if self.gate == "softmax" else torch.sigmoid(z) - 0.5


class ConditionalConv2d(Routed):
    """A convolution with a sum of experts added to its kernel and bias.

    Initially the sum is zero, so that the kernel is the convolution's own, bit for bit.

    Args:
        convs: see `Mixture`.
        experts, width, gate, temperature: see `Routed`.
    """

    def __init__(self, convs: Sequence[Any], experts: int, width: int, gate: str, temperature: float) -> None:
        super().__init__(convs[0], experts, width, gate, temperature)
        self.mix = Mixture(convs, experts)

    def forward(self, x: Tensor, embedding: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """Return the convolution of `x`.

        Args:
            x: (B, I, H, W).
            embedding, timestep: (B, D), and (1,) or (B,), for gates by timestep; by default they depend on `x`.
        Returns:
            (B, O, H', W').
        """
        if embedding is not None and timestep is not None:
            gates = self.gates(F.silu(per_call(embedding, timestep)))
            kernels, biases = self.mix(gates, self.weight, self.bias)
            return convolve(x, self.weight, self.bias, kernels, biases, self.options)
        gates = self.gates(x.mean((2, 3)))
        return conditional_conv2d(x, gates, self.weight, self.bias, self.mix.weight, self.mix.bias, self.options)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Tensor, biases: Tensor | None, options: ConvOptions
) -> Tensor:
    """Return a convolution with kernels added to its own: one for all samples, or one for every sample.

    Kernels for every sample are convolved with separately, and the results are added. A convolution with more groups
    rounds differently, and this must not show where the added kernels are zero.

    Args:
        x: (B, I, H, W).
        weight, bias: (O, I / groups, h, w) and (O).
        kernels, biases: the added kernels and biases, (1 or B, O, I / groups, h, w) and (1 or B, O).
        options: stride, padding, dilation and groups.
    Returns:
        (B, O, H', W').
    """
    given = tuple(tensor for tensor in (x, weight, bias, kernels, biases) if tensor is not None)
    if has_torch_function(given):
        return handle_torch_function(convolve, given, x, weight, bias, kernels, biases, options)
    if kernels.shape[0] > 1:
        return applied(x, weight, bias, options) + by_sample(x, kernels, biases, options)
    mixed = None if bias is None or biases is None else bias + biases[0]
    return applied(x, weight + kernels[0], mixed, options)  # laid out as `weight` is


def by_sample(x: Tensor, kernels: Tensor, biases: Tensor | None, options: ConvOptions) -> Tensor:
    """Return the convolution with a kernel for every sample, computed as one convolution with more groups.

    Args:
        x: (B, I, H, W).
        kernels, biases: (B, O, I / groups, h, w) and (B, O).
        options: stride, padding, dilation and groups.
    Returns:
        (B, O, H', W').
    """
    B, (*spatial, groups) = x.shape[0], options
    flat = None if biases is None else biases.flatten()
    out = applied(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), flat, (*spatial, B * groups))
    return out.reshape(B, -1, *out.shape[2:])


def conditional_conv2d(
    x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None, others: Tensor, biases: Tensor | None,
    options: ConvOptions,
) -> Tensor:  # fmt: skip
    """Return the convolution with a kernel for every sample: `weight` and the sum of experts.

    Args:
        x: (B, I, H, W).
        gates: (B, E).
        weight, bias: the first expert, (O, I / groups, h, w) and (O).
        others, biases: the other experts, (E - 1, O * I / groups * h * w) and (E - 1, O).
        options: stride, padding, dilation and groups.
    Returns:
        (B, O, H', W').
    """
    given = tuple(tensor for tensor in (x, gates, weight, bias, others, biases) if tensor is not None)
    if has_torch_function(given):
        return handle_torch_function(conditional_conv2d, given, x, gates, weight, bias, others, biases, options)
    if not torch.compiler.is_exporting():
        kernels = weight + summed(gates, weight, others)
        mixed = None if bias is None or biases is None else bias + summed(gates, bias, biases)
        return by_sample(x, kernels, mixed, options)
    # ONNX fixes the number of groups in the graph, so exported graphs convolve with every expert.
    count, channels, groups = len(others), len(weight), options[3]

    def within_groups(experts: Tensor) -> Tensor:
        return experts.reshape(count, groups, -1, *experts.shape[2:]).transpose(0, 1).flatten(0, 2)

    flat = None if biases is None else within_groups(biases)
    every = applied(x, within_groups(others.reshape(count, *weight.shape)), flat, options)
    every = every.reshape(-1, groups, count, channels // groups, *every.shape[2:])
    added = (every * gates[:, None, 1:, None, None, None]).sum(2).flatten(1, 2)
    return applied(x, weight, bias, options) * (1 + gates[:, :1, None, None]) + added
