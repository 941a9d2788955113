"""Standard-ONNX definitions of the `com.microsoft` operators, with which "cuda" models run on all providers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnxscript import opset20, script
from onnxscript.values import Opset

from ..bundle.untrusted import nodes_of

DOMAIN = "sdgraph.reference"  # ONNX Runtime allows no definitions in its own domain
_own = Opset(DOMAIN, 1)
op: Any = opset20  # its types know each operator's operands, which Python's operators do not

# onnxscript compiles the functions below from a subset of Python without other functions and conditional expressions.


@script(_own, default_opset=op)
def GroupNorm(X, gamma, beta, groups: int, epsilon: float, activation: int, channels_last: int):  # type: ignore  # noqa: N802
    x = op.Cast(op.Transpose(X, perm=[0, 3, 1, 2]), to=1)
    count = op.Reshape(op.Constant(value_int=groups), op.Constant(value_ints=[1]))
    split = op.Concat(op.Shape(x, start=0, end=1), count, op.Constant(value_ints=[-1]), axis=0)
    y = op.Reshape(x, split)
    d = y - op.ReduceMean(y, op.Constant(value_ints=[2]), keepdims=1)
    variance = op.ReduceMean(d * d, op.Constant(value_ints=[2]), keepdims=1)
    normed = op.Reshape(d / op.Sqrt(variance + epsilon), op.Shape(x))
    out = op.Transpose(normed, perm=[0, 2, 3, 1]) * gamma + beta
    silu = op.Cast(op.Constant(value_int=activation), to=1)
    return op.CastLike(out * (1.0 - silu + silu * op.Sigmoid(out)), X)


@script(_own, default_opset=op)
def SkipGroupNorm(X, gamma, beta, skip, groups: int, epsilon: float, activation: int, channels_last: int):  # type: ignore  # noqa: N802
    channels = op.Shape(X, start=3)
    flat = op.Concat(op.Shape(X, start=0, end=1), op.Constant(value_ints=[-1]), channels, axis=0)
    # (B, C) and (B, H, W, C) alike become (B, 1 or H·W, C)
    total = op.Reshape(op.Reshape(X, flat) + op.Reshape(skip, flat), op.Shape(X))
    normed = GroupNorm(
        total, gamma, beta, groups=groups, epsilon=epsilon, activation=activation, channels_last=channels_last
    )
    return normed, total


@script(_own, default_opset=op)
def MultiHeadAttention(Q, K, V, num_heads: int, scale: float):  # type: ignore  # noqa: N802
    zero = op.Constant(value_ints=[0, 0])
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(zero, heads, op.Constant(value_ints=[-1]), axis=0)
    q = op.Transpose(op.Reshape(Q, split), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(K, split), perm=[0, 2, 3, 1])
    v = op.Transpose(op.Reshape(V, split), perm=[0, 2, 1, 3])
    weights = op.Softmax(op.MatMul(q, k) * op.CastLike(op.Constant(value_float=scale), Q), axis=-1)
    return op.Reshape(op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3]), op.Shape(Q))


@script(_own, default_opset=op)
def BiasSplitGelu(X, bias):  # type: ignore  # noqa: N802
    a, b = op.Split(X + bias, axis=-1, num_outputs=2)
    return a * op.Gelu(b)


@script(_own, default_opset=op)
def BiasAdd(X, bias, skip):  # type: ignore  # noqa: N802
    return X + bias + skip


FUNCTIONS = {
    function.name: function for function in (GroupNorm, SkipGroupNorm, MultiHeadAttention, BiasSplitGelu, BiasAdd)
}


def runnable(path: Path) -> bytes:
    """Return a serialized model without its weights, in which `com.microsoft` operators are functions of standard ones.

    Args:
        path: the file of the model.
    """
    model = onnx.load(path, load_external_data=False)
    for node in nodes_of(model.graph):
        if node.domain == "com.microsoft" and node.op_type in FUNCTIONS:
            node.domain = DOMAIN
    model.functions.extend(function.to_function_proto() for function in FUNCTIONS.values())
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    serialized: bytes = model.SerializeToString()
    return serialized
