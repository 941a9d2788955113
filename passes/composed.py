"""Layers whose kernel is composed of several parameters, a product or a sum, and the single kernel that they amount to.

A composed layer is one function of its input and its parameters, and so one node of a graph.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

Layer: TypeAlias = nn.Conv2d | nn.Linear
ConvOptions: TypeAlias = tuple[Any, Any, Any, int]  # stride, padding, dilation and groups
Options: TypeAlias = ConvOptions | None  # None of a linear layer


def options_of(layer: Layer) -> Options:
    """Return the options of a convolution; None of a linear layer."""
    return None if isinstance(layer, nn.Linear) else (layer.stride, layer.padding, layer.dilation, layer.groups)


def applied(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """Return the convolution of a map, or the linear function of tokens.

    Args:
        x: (B, I, H, W) or (..., I).
        weight, bias: (O, I / groups, h, w) or (O, I), and (O).
    Returns:
        (B, O, H', W') or (..., O).
    """
    return F.linear(x, weight, bias) if options is None else F.conv2d(x, weight, bias, *options)


class Product(nn.Module):
    """A layer between two square matrices over its channels, which are the identity initially.

    A linear layer has one of them, on its narrower side.

    Args:
        layer: the layer, whose parameters are used.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight, self.bias, self.options = layer.weight, layer.bias, options_of(layer)
        linear, groups = isinstance(layer, nn.Linear), 1 if isinstance(layer, nn.Linear) else layer.groups
        outputs, inputs = layer.weight.shape[0], layer.weight.shape[1] * groups
        self.first = None if linear and inputs > outputs else self._identity(inputs, groups)
        self.last = None if linear and inputs <= outputs else self._identity(outputs, groups)

    def _identity(self, channels: int, groups: int) -> nn.Parameter:
        matrix = torch.eye(channels // groups, dtype=self.weight.dtype, device=self.weight.device).repeat(groups, 1)
        return nn.Parameter(matrix if self.options is None else matrix[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.first, self.weight, self.last, self.bias, self.options)


def product(
    x: Tensor, first: Tensor | None, weight: Tensor, last: Tensor | None, bias: Tensor | None, options: Options
) -> Tensor:
    """Return a layer applied to the first matrix times `x`, times the last matrix.

    Only the whole has a bias. One before a convolution would be missing in the zeros that it pads with.

    Args:
        first, last: (I, I / groups, 1, 1) and (O, O / groups, 1, 1), or (I, I) and (O, O).
        x, weight, bias, options: see `applied`.
    """
    given = tuple(tensor for tensor in (x, first, weight, last, bias) if tensor is not None)
    if has_torch_function(given):
        return handle_torch_function(product, given, x, first, weight, last, bias, options)
    pointwise = None if options is None else (1, 0, 1, options[3])
    if first is not None:
        x = applied(x, first, None, pointwise)
    x = applied(x, weight, bias if last is None else None, options)
    return x if last is None else applied(x, last, bias, pointwise)


def multiplied(first: Tensor | None, weight: Tensor, last: Tensor | None, groups: int) -> Tensor:
    """Return the kernel of a `product`, computed in float32 at least; the shape of `weight`."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    kernel = weight.to(precise).reshape(groups, len(weight) // groups, weight.shape[1], -1)
    if first is not None:
        kernel = torch.einsum("goik,gij->gojk", kernel, first.to(precise).reshape(groups, -1, first.shape[1]))
    if last is not None:
        kernel = torch.einsum("gpo,goik->gpik", last.to(precise).reshape(groups, -1, last.shape[1]), kernel)
    return torch.empty_like(weight).copy_(kernel.reshape(weight.shape))  # laid out as `weight` is


class Branches(nn.Module):
    """A layer with a pointwise one beside it, and with its input, scaled by channel, where the shapes agree.

    Initially both are zero.

    Args:
        layer: the layer, whose parameters are used.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight, self.bias, self.options = layer.weight, layer.bias, options_of(layer)
        weight, kernel = layer.weight, layer.weight.shape[2:]
        self.point = nn.Parameter(torch.zeros_like(weight[:, :, :1, :1] if kernel else weight))
        straight = weight.shape[0] == (layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
        if isinstance(layer, nn.Conv2d):
            around = tuple(d * (k - 1) / 2 for d, k in zip(layer.dilation, kernel, strict=True))
            straight = straight and layer.stride == (1, 1) and layer.padding == around
        self.scale = nn.Parameter(torch.zeros_like(weight.flatten(1)[:, 0])) if straight else None

    def forward(self, x: Tensor) -> Tensor:
        return branches(x, self.weight, self.point, self.scale, self.bias, self.options)


def branches(
    x: Tensor, weight: Tensor, point: Tensor, scale: Tensor | None, bias: Tensor | None, options: Options
) -> Tensor:
    """Return a layer whose kernel has the pointwise one added to its centre, plus the scaled input.

    Kernels are added and not their results, which would take another convolution.

    Args:
        point: (O, I / groups, 1, 1) or (O, I).
        scale: (O), for as many inputs.
        x, weight, bias, options: see `applied`.
    """
    given = tuple(tensor for tensor in (x, weight, point, scale, bias) if tensor is not None)
    if has_torch_function(given):
        return handle_torch_function(branches, given, x, weight, point, scale, bias, options)
    result = applied(x, weight + _centred(point, weight), bias, options)
    return result if scale is None else result + (scale if options is None else scale[:, None, None]) * x


def summed(weight: Tensor, point: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    """Return the kernel of `branches`, computed in float32 at least; the shape of `weight`."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    point = point.to(precise)
    if scale is not None:
        own = torch.eye(point.shape[1], dtype=precise, device=point.device).repeat(groups, 1)
        point = point + (own * scale.to(precise)[:, None]).reshape(point.shape)
    return (weight.to(precise) + _centred(point, weight)).to(weight.dtype)


class LowRank(nn.Module):
    """A layer with an update of low rank beside it, which is zero initially.

    Args:
        layer: the layer without groups, whose parameters are used.
        rank: the rank of the update, at most that of the kernel as a matrix.
    """

    def __init__(self, layer: Layer, rank: int) -> None:
        super().__init__()
        self.weight, self.bias, self.options = layer.weight, layer.bias, options_of(layer)
        outputs, inputs = len(layer.weight), layer.weight[0].numel()
        rank = min(rank, outputs, inputs)
        draw = torch.Generator().manual_seed(0)
        down = torch.randn(rank, *layer.weight.shape[1:], generator=draw) / inputs**0.5
        self.down = nn.Parameter(down.to(layer.weight))
        self.up = nn.Parameter(layer.weight.new_zeros(outputs, rank, *(1 for _ in layer.weight.shape[2:])))

    def forward(self, x: Tensor) -> Tensor:
        return low_rank(x, self.weight, self.down, self.up, self.bias, self.options)


def low_rank(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """Return a layer plus its update of low rank, whose kernel is never formed.

    Args:
        down: (rank, I, h, w) or (rank, I).
        up: (O, rank, 1, 1) or (O, rank).
        x, weight, bias, options: see `applied`.
    """
    given = tuple(tensor for tensor in (x, weight, down, up, bias) if tensor is not None)
    if has_torch_function(given):
        return handle_torch_function(low_rank, given, x, weight, down, up, bias, options)
    update = applied(applied(x, down, None, options), up, None, None if options is None else (1, 0, 1, 1))
    return applied(x, weight, bias, options) + update


def updated(weight: Tensor, down: Tensor, up: Tensor, groups: int) -> Tensor:
    """Return the kernel of `low_rank`, computed in float32 at least; the shape of `weight`."""
    assert groups == 1
    precise = torch.promote_types(weight.dtype, torch.float32)
    kernel = weight.to(precise) + (up.to(precise).flatten(1) @ down.to(precise).flatten(1)).reshape(weight.shape)
    return torch.empty_like(weight).copy_(kernel)


def _centred(point: Tensor, weight: Tensor) -> Tensor:
    """Return a pointwise kernel with zeros around it, in the shape of `weight`."""
    sides = [side for size in reversed(weight.shape[2:]) for side in (size // 2, (size - 1) // 2)]
    return F.pad(point, sides) if sides else point
