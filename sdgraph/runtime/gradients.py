"""Gradients of a call: whether derivatives may be taken, and the weights that a module must own before it has any."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle


class Ownership:
    """Gives a module its own copy of shared weights, once, before anything may change them.

    Args:
        owned: the weights share storage with nothing from the beginning.
    """

    def __init__(self, owned: bool = False) -> None:
        self.owned = owned
        self._before_gradients: RemovableHandle | None = None

    def take(self, module: nn.Module) -> None:
        """Copy the weights of the module, unless they are its own."""
        self._remove_hook()
        if not self.owned:
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data = tensor.data.clone()
            self.owned = True

    def take_before_gradients(self, module: nn.Module) -> None:
        """Copy the weights as soon as one of them is about to have a gradient, because an optimizer may follow."""
        if self.owned:
            return
        self._remove_hook()
        learned = [p for p in module.parameters() if p.requires_grad]
        self._before_gradients = register_multi_grad_hook(learned, lambda _: self.take(module), mode="any")

    def _remove_hook(self) -> None:
        if self._before_gradients is not None:
            self._before_gradients.remove()
            self._before_gradients = None


def transformed() -> bool:
    """Return whether weights may be those of a transform, such as `torch.func.grad` or forward derivatives."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def differentiated(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether derivatives may be taken with respect to one of the tensors, backward or forward."""
    return any(
        (torch.is_grad_enabled() and tensor.requires_grad)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )
