"""Interception: while code is traced, its calls of modules, reads of weights and new tensors go to the tracer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.utils import torch_utils
from torch import fx, nn

from .tracer import Tracer

# Functions of diffusers that are one node: they branch on sizes, to no effect on values.
WHOLE = ((torch_utils, "fourier_filter"),)
FACTORIES = ("arange", "empty", "zeros", "ones", "full", "linspace", "tensor")

_LOCK = threading.RLock()  # what `tracing` patches is global, so traces take turns


@contextlib.contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """Send module calls, reads of weights and tensor constructors of this thread to the tracer."""
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return originals[nn.Module, "__call__"](module, *args, **kwargs)
        return tracer.call_module(module, args, kwargs)

    def attribute(module: nn.Module, name: str) -> Any:
        value = originals[nn.Module, "__getattr__"](module, name)
        if isinstance(value, torch.Tensor) and threading.get_ident() == thread:
            return tracer.read(value)
        return value

    def keep(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == thread and any(isinstance(leaf, fx.Proxy) for leaf in _leaves(value)):
            raise tracer.error(
                f"a {type(module).__name__} keeps a tensor between calls, as its attribute {name!r}",
                "write it as a function of its tensors; a graph keeps nothing",
            )
        originals[nn.Module, "__setattr__"](module, name, value)

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and any(isinstance(a, fx.Proxy) for a in _leaves((args, kwargs))):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return build

    with _LOCK, torch.inference_mode(False), torch.no_grad():
        patched: dict[tuple[Any, str], Any] = {
            (nn.Module, "__call__"): call,
            (nn.Module, "__getattr__"): attribute,
            (nn.Module, "__setattr__"): keep,
        }
        originals = {(holder, name): getattr(holder, name) for holder, name in patched}
        for holder, name in (*((torch, name) for name in FACTORIES), *WHOLE):
            originals[holder, name] = getattr(holder, name)
            patched[holder, name] = factory(originals[holder, name])
        try:
            for (holder, name), value in patched.items():
                setattr(holder, name, value)
            yield
        finally:
            for (holder, name), value in originals.items():
                setattr(holder, name, value)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(tuple(tree.values()))
    else:
        yield tree
