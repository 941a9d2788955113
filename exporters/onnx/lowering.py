"""Lowering: passes that put ONNX Runtime's own operators in the place of what they compute. All are CLOSE.

They are for graphs that go to its CUDA provider; `export(..., target="cuda")` applies them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sdgraph import Contract, Findings, Graph, NearMiss, Pass
from sdgraph.errors import EditError

from . import contrib_ops as contrib

CLOSE = Contract.CLOSE(rtol=1e-4, atol=1e-5)


class Limit(str):
    """The reason why a place is not lowered, where the operator's kernels set the limit."""


@dataclass(frozen=True)
class Lowering(Pass, abstract=True):
    """The base class of lowerings: `places` finds where a lowering may apply, `lower` applies it.

    Raises:
        EditError: the pattern occurs but no occurrence can be lowered: an earlier pass has separated its nodes.
    """

    contract: ClassVar[Contract] = CLOSE
    may_change_nothing: ClassVar[bool] = True

    def places(self, graph: Graph) -> Iterator[fx.Node]:
        raise NotImplementedError(f"{type(self).__name__}.places")

    def lower(self, graph: Graph, node: fx.Node) -> str:
        """Lower one place.

        Returns:
            The reason why it does not apply; empty if it did.
        """
        raise NotImplementedError(f"{type(self).__name__}.lower")

    def run(self, graph: Graph) -> Findings:
        misses, lowered, strange = [], False, False
        for node in list(self.places(graph)):
            where = f"{graph.module_path(node)}, node {node.name}"
            reason = self.lower(graph, node)
            if reason:
                misses.append(NearMiss(where, reason))
            lowered |= not reason
            strange |= bool(reason) and not isinstance(reason, Limit)
        if strange and not lowered:
            raise EditError(
                f"none of {len(misses)} places has the form that the operator takes; {misses[0].reason}",
                where=misses[0].where,
                hint="export with target='portable'; and please report it",
            )
        return Findings(tuple(misses))


class Normalise(nn.Module):
    """The replacement of a `GroupNorm` module and the SiLU after it; channels are the last dimension inside."""

    def __init__(self, norm: nn.GroupNorm, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.options = norm.num_groups, norm.eps, silu

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        gamma, beta = self.weight.float(), self.bias.float()
        x = x.permute(0, 2, 3, 1)
        if skip is None:
            return contrib.group_norm(x, gamma, beta, *self.options).permute(0, 3, 1, 2)
        skip = skip.permute(0, 2, 3, 1) if skip.ndim == 4 else skip
        normed, total = contrib.skip_group_norm(x, skip, gamma, beta, *self.options)
        return normed.permute(0, 3, 1, 2), total.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class LowerGroupNorm(Lowering):
    """GroupNorm, with the SiLU after it and the addition before it, where there are such."""

    def places(self, graph: Graph) -> Iterator[fx.Node]:
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(graph.module(str(node.target)), nn.GroupNorm):
                yield node

    def lower(self, graph: Graph, node: fx.Node) -> str:
        norm: Any = graph.module(str(node.target))
        if not norm.affine or node.meta["val"].ndim != 4:
            return "it has no weights, or is not of a map"
        (user, *others) = node.users
        silu = not others and (user.target is F.silu or _is(graph, user, nn.SiLU))
        last = user if silu else node
        x: Any = node.args[0]
        terms = _sum(x)
        path, module = str(node.target), Normalise(norm, silu)
        if terms is None:
            graph.replace(last, module, x, path=path)
        else:
            graph.replace((last, x), module, *terms, path=path)
        return ""


def _is(graph: Graph, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(graph.module(str(node.target)), kind)


def _sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the terms of a sum of maps, or of a map and what is added to all of its positions."""
    if node.target not in (operator.add, torch.add) or node.kwargs or len(node.args) != 2:
        return None
    a: Any = node.args[0]
    b: Any = node.args[1]
    if not all(isinstance(side, fx.Node) and isinstance(side.meta.get("val"), Tensor) for side in (a, b)):
        return None
    if "placeholder" in (a.op, b.op):
        return None  # an optional input, which calls may leave out
    shape = node.meta["val"].shape
    if a.meta["val"].shape != shape:
        a, b = b, a
    if a.meta["val"].shape != shape:
        return None
    everywhere = (slice(None), slice(None), None, None)
    if b.target is operator.getitem and b.args[1] == everywhere:
        return a, b.args[0]
    return (a, b) if b.meta["val"].shape == shape else None


@dataclass(frozen=True)
class LowerAttention(Lowering):
    """Fused attention without a mask, between the views that split heads and join them."""

    def places(self, graph: Graph) -> Iterator[fx.Node]:
        return (node for node in graph.nodes if node.target is F.scaled_dot_product_attention)

    def lower(self, graph: Graph, node: fx.Node) -> str:
        if any(node.kwargs.get(name) for name in ("attn_mask", "is_causal", "dropout_p", "enable_gqa")):
            return Limit("it has a mask, or options")
        if len(node.args) != 3:
            return Limit("it has a mask")
        joined = _joined(node)
        if joined is None:
            return "its heads are not joined after it"
        heads = node.meta["val"].shape[1]
        upcast = bool(graph.config.get("upcast_attention"))
        scale: Any = node.kwargs.get("scale")

        def code(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            dtype = q.dtype
            q, k, v = (x.transpose(1, 2).flatten(2) if x.ndim == 4 else x for x in (q, k, v))
            if upcast:
                q, k, v = q.float(), k.float(), v.float()
            return contrib.attention(q, k, v, heads, scale).to(dtype)  # type: ignore[no-any-return]

        graph.replace(joined, code, *map(_split, node.args), path=graph.module_path(node))
        return ""


def _split(node: Any) -> fx.Node:
    """Return the value that heads were split from, (B, N, heads·d), or the node itself, (B, heads, N, d)."""
    view = node.args[0] if node.target == "transpose" and node.args[1:] == (1, 2) else None
    if isinstance(view, fx.Node) and view.target in ("view", "reshape", "unflatten"):
        whole: Any = view.args[0]
        B, heads, N, d = node.meta["val"].shape
        if whole.meta["val"].shape == (B, N, heads * d):
            return whole  # type: ignore[no-any-return]
    return node  # type: ignore[no-any-return]


def _joined(node: fx.Node) -> fx.Node | None:
    """Return the joined heads after an attention, (B, N, heads·d), if nothing else uses it."""
    B, heads, N, d = node.meta["val"].shape
    for target in ("transpose", "reshape"):
        if len(node.users) != 1:
            return None
        (node,) = node.users
        if node.target != target:
            return None
    return node if node.meta["val"].shape == (B, N, heads * d) else None


class Gated(nn.Module):
    """The replacement of a GEGLU's projection and all that follows in it."""

    def __init__(self, project: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = project.weight, project.bias

    def forward(self, x: Tensor) -> Tensor:
        return contrib.bias_split_gelu(F.linear(x, self.weight), self.bias)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LowerGEGLU(Lowering):
    """The gated linear unit of a feed-forward: bias, split, GELU and product."""

    def places(self, graph: Graph) -> Iterator[fx.Node]:
        for node in graph.nodes:
            if node.target is operator.mul and any(isinstance(a, fx.Node) and a.target is F.gelu for a in node.args):
                yield node

    def lower(self, graph: Graph, node: fx.Node) -> str:
        first: Any = node.args[0]
        gelu: Any = node.args[1]
        gate: Any = gelu.args[0] if isinstance(gelu, fx.Node) and gelu.target is F.gelu and not gelu.kwargs else None
        if gate is None or gate.target is not operator.getitem or first.target is not operator.getitem:
            return "it is no product of two halves"
        chunk: Any = first.args[0]
        if (first.args[1], gate.args[1]) != (0, 1) or gate.args[0] is not chunk or chunk.target != "chunk":
            return "it is no product of two halves"
        project: Any = chunk.args[0]
        if not _is(graph, project, nn.Linear) or len(project.users) != 1:
            return "what is split is no projection's"
        linear: Any = graph.module(str(project.target))
        if linear.bias is None:
            return "the projection has no bias"
        if linear.out_features not in contrib.SPLIT_GELU_WIDTHS:
            return Limit(f"the width {linear.out_features} is none of {contrib.SPLIT_GELU_WIDTHS}")
        graph.replace(node, Gated(linear), project.args[0], path=str(project.target))
        return ""


class Added(nn.Module):
    """The replacement of a projection and the addition after it."""

    def __init__(self, project: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = project.weight, project.bias

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return contrib.bias_add(F.linear(x, self.weight), self.bias, skip)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LowerBiasAdd(Lowering):
    """The bias of a projection of tokens, and the residual addition after it."""

    def places(self, graph: Graph) -> Iterator[fx.Node]:
        for node in graph.nodes:
            if node.target in (operator.add, torch.add) and any(_is_projection(graph, a) for a in node.args):
                yield node

    def lower(self, graph: Graph, node: fx.Node) -> str:
        project, skip = node.args if _is_projection(graph, node.args[0]) else reversed(node.args)
        if not isinstance(project, fx.Node) or not isinstance(skip, fx.Node):
            return "a number is added"
        linear: Any = graph.module(str(project.target))
        if linear.bias is None or len(project.users) != 1 or skip.meta["val"].shape != project.meta["val"].shape:
            return "it has no bias, or its output serves something else, or shapes differ"
        graph.replace(node, Added(linear), project.args[0], skip, path=str(project.target))
        return ""


class SkipNormalise(nn.Module):
    """The replacement of a `LayerNorm` module and the addition before it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.epsilon = norm.eps

    def forward(self, x: Tensor, skip: Tensor, bias: Tensor | None = None) -> Any:
        return contrib.skip_layer_norm(x, skip, self.weight, self.bias, bias, self.epsilon)


@dataclass(frozen=True)
class LowerLayerNorm(Lowering):
    """LayerNorm of tokens, and the residual addition before it, with its bias where `LowerBiasAdd` went before."""

    def places(self, graph: Graph) -> Iterator[fx.Node]:
        for node in graph.nodes:
            if _is(graph, node, nn.LayerNorm):
                yield node

    def lower(self, graph: Graph, node: fx.Node) -> str:
        norm: Any = graph.module(str(node.target))
        x: Any = node.args[0]
        if norm.weight is None or norm.bias is None:
            return Limit("it has no weights")
        terms: tuple[Any, ...] = _sum(x) or ()
        if x.target is contrib.bias_add:
            projected, bias, skip = x.args
            terms = projected, skip, bias
        if not terms:
            return Limit("what it normalises is no sum")
        shape = x.meta["val"].shape
        if len(shape) != 3 or norm.normalized_shape != (shape[-1],):
            return "what it normalises are no tokens"
        graph.replace((node, x), SkipNormalise(norm), *terms, path=str(node.target))
        return ""


def _is_projection(graph: Graph, node: Any) -> bool:
    return isinstance(node, fx.Node) and _is(graph, node, nn.Linear) and node.meta["val"].ndim == 3


ALL = (LowerGroupNorm(), LowerAttention(), LowerGEGLU(), LowerBiasAdd(), LowerLayerNorm())
