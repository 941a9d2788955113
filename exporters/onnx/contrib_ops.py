"""ONNX Runtime's own operators for diffusion models (`com.microsoft`), as functions.

In eager they compute what the operator is documented to compute; when a graph is exported they become the operator.
ONNX Runtime has CUDA kernels for all of them. https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

# What the CUDA kernels are compiled for.
SPLIT_GELU_WIDTHS = (2560, 5120, 6144, 10240, 12288)


def _operator(code: Callable[..., Any]) -> Callable[..., Any]:
    """A function that stays one node when it is traced into a graph."""

    @wraps(code)
    def whole(*args: Any) -> Any:
        tensors = tuple(a for a in args if a is not None)
        if has_torch_function(tensors):
            return handle_torch_function(whole, tensors, *args)
        return code(*args)

    return whole


def _symbolic(name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"com.microsoft::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )
    return result


def _normalise(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float, silu: bool) -> Tensor:
    out = F.group_norm(x.movedim(3, 1), groups, gamma.to(x.dtype), beta.to(x.dtype), epsilon)
    return (F.silu(out) if silu else out).movedim(1, 3)


@_operator
def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float, silu: bool) -> Tensor:
    """GroupNorm: group normalisation, followed by SiLU if `silu`.

    Args:
        x: the input, (B, H, W, C).
        gamma: the scale, (C,) in float32.
        beta: the shift, (C,) in float32.
        groups: the number of groups.
        epsilon: the number that is added to the variance.
        silu: whether SiLU follows.
    """
    if torch.compiler.is_exporting():
        options = {"groups": groups, "epsilon": epsilon, "activation": int(silu), "channels_last": 1}
        return _symbolic("GroupNorm", (x, gamma, beta), options, x)
    return _normalise(x, gamma, beta, groups, epsilon, silu)


@_operator
def skip_group_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """SkipGroupNorm: `group_norm` of a sum, and the sum.

    Args:
        x: (B, H, W, C).
        skip: the same, or (B, C) for all positions.
        gamma, beta: (C,) in float32.
    """
    if torch.compiler.is_exporting():
        options: Any = {"groups": groups, "epsilon": epsilon, "activation": int(silu), "channels_last": 1}
        normed, total = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipGroupNorm",
            (x, gamma, beta, skip),
            options,
            dtypes=(x.dtype, x.dtype),
            shapes=(x.shape, x.shape),
            version=1,
        )
        return normed, total
    total = x + (skip[:, None, None] if skip.ndim == 2 else skip)
    return _normalise(total, gamma, beta, groups, epsilon, silu), total


@_operator
def skip_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """SkipLayerNormalization: layer normalisation of `x + skip + bias`, and the sum.

    Args:
        x, skip: (B, N, C).
        gamma, beta, bias: (C,).
    """
    if torch.compiler.is_exporting():
        given = (x, skip, gamma, beta) if bias is None else (x, skip, gamma, beta, bias)
        moments = (*x.shape[:2], 1)  # two outputs for training only
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipLayerNormalization",
            given,
            {"epsilon": epsilon},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, moments, moments, x.shape),
            version=1,
        )
        return normed, total
    total = x + skip if bias is None else x + bias + skip
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), total


@_operator
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None) -> Tensor:
    """MultiHeadAttention.

    Args:
        q, k, v: (B, N, heads·d), (B, M, heads·d) twice.
        scale: the factor of the logits; 1/√d by default.
    """
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():
        return _symbolic("MultiHeadAttention", (q, k, v), {"num_heads": heads, "scale": float(scale)}, q)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


@_operator
def bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """BiasSplitGelu: `a * gelu(b)` for the halves of `x + bias`, (B, N, 2·D) to (B, N, D)."""
    if torch.compiler.is_exporting():
        return _symbolic("BiasSplitGelu", (x, bias), {}, x[..., : x.shape[-1] // 2])
    a, b = (x + bias).chunk(2, dim=-1)
    return a * F.gelu(b)


@_operator
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """BiasAdd: `x + bias + skip`, (B, N, C)."""
    if torch.compiler.is_exporting():
        return _symbolic("BiasAdd", (x, bias, skip), {}, x)
    return x + bias + skip
