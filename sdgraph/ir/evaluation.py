"""Evaluation on the meta device: operations, their values, and results that are remembered.

On the meta device norms, products and attention run as Python code, which is most of the time of a trace; and a UNet
repeats them at the same sizes again and again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .nodes import values

SIGNS: Mapping[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
}


@dataclass(frozen=True)
class Operation:
    """The operation of a node. As long as this and the values of its inputs stay the same, so do the node's values.

    The operation that the values of a node were computed by is in its `meta["evaluated"]`.
    """

    op: str
    target: Any
    args: str
    kwargs: str

    @classmethod
    def of(cls, node: fx.Node) -> Operation:
        return cls(node.op, node.target, repr(node.args), repr(node.kwargs))


def edit_counts(node: fx.Node) -> list[int]:
    """Return how often each tensor that a node reads has been edited in place."""
    read = [v for n in node.all_input_nodes for v in values(n) if isinstance(v, torch.Tensor)]
    return [v._version for v in read if not v.is_inference()]


def value_kinds(node: fx.Node) -> list[Any]:
    """Return shape and dtype of each tensor among a node's two values, and whatever else is among them."""
    kinds: list[Any] = []
    for value in values(node):
        for item in value if isinstance(value, tuple | list) else (value,):
            kinds.append((item.shape, item.dtype) if isinstance(item, torch.Tensor) else item)
    return kinds


# What the result depends on besides the arguments is in `extra_repr` and the weights; the result shares no memory.
MODULES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
FUNCTIONS = (F.scaled_dot_product_attention, F.gelu, operator.add, operator.truediv)

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_known: dict[tuple[Any, ...], Layout] = {}


def computed(code: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return `code(*args, **kwargs)` for tensors on the meta device.

    Args:
        code: a function, or a method such as the `forward` of a module.
    """
    module: Any = getattr(code, "__self__", None)
    with torch.no_grad():
        about: tuple[Any, ...]
        if type(module) in MODULES:
            about = (type(module), module.extra_repr(), *map(_layout, module.parameters()))
        elif code in FUNCTIONS and isinstance(args[0], torch.Tensor):
            about = (code,)
        else:
            return code(*args, **kwargs)
        key = (*about, *map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items()))
        if key not in _known:
            _known[key] = _layout(code(*args, **kwargs))
        shape, stride, dtype = _known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return repr(value)
