"""The different spellings of a call: operators and functions, positional and named arguments, modules."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op

SAME: Mapping[Any, Any] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.div: operator.truediv,
}


class _Called:
    """Stands for a tensor. A PyTorch function that is called with it returns itself and its arguments."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function, args, kwargs or {}


def as_function(module: nn.Module, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return the function whose call is all that a leaf module does, and its arguments for `node`, by name.

    Returns:
        Function, positional and named arguments; None if the module does more, or depends on the mode as dropout does.
    """
    if len(node.args) != 1 or node.kwargs:
        return None
    try:
        function, args, kwargs = module.forward(_Called())
    except Exception:  # its code needs a real tensor, so it is more than one call
        return None
    bound = _bound(function, args, kwargs)
    if bound is None or any("training" in signature.parameters for signature in _signatures(function)):
        return None
    named = {k: node.args[0] if isinstance(v, _Called) else v for k, v in bound.items()}
    return function, (), {k: v for k, v in named.items() if not k.startswith("_")}  # such as softmax's _stacklevel


def arguments_of(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call; by name and without defaults if the signature is known."""
    if node.op == "call_function" and node.target not in SAME and node.target not in SAME.values():
        bound = _bound(node.target, node.args, node.kwargs)
        if bound is not None:
            return (), bound
    return tuple(node.args), dict(node.kwargs)


def _bound(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return arguments by name, without defaults; None if no signature of the function fits."""
    for signature in _signatures(target):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            continue
        default = {name: p.default for name, p in signature.parameters.items()}
        plain = (bool, int, float, str, tuple, type(None))
        return {k: v for k, v in bound.arguments.items() if not isinstance(v, plain) or v != default[k]}
    return None


@functools.cache
def _signatures(target: Any) -> tuple[inspect.Signature, ...]:
    try:
        signatures = [inspect.signature(target)]
    except (TypeError, ValueError):
        signatures = get_signature_for_torch_op(target) or []
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(s for s in signatures if not any(p.kind in loose for p in s.parameters.values()))
