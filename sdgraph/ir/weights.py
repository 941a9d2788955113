"""Parameters and leaf modules of a graph: a plain module tree under the source's own names.

The tensors' storage is shared with the source; the modules and `Parameter` objects are not, so that moving or
casting the result leaves the source alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn


class Weights(nn.Module):
    """A tree of leaf modules and tensors by dotted path. It has no code of its own."""

    def get(self, path: str) -> Any:
        """Return the module or tensor at a path, None if there is none."""
        *above, name = path.split(".")
        holder: nn.Module | None = self
        for step in above:
            holder = holder._modules.get(step) if holder is not None else None
        if holder is None:
            return None
        kinds: tuple[dict[str, Any], ...] = (holder._modules, holder._parameters, holder._buffers)
        return next((kind[name] for kind in kinds if kind.get(name) is not None), None)

    def put(self, path: str, value: nn.Module | torch.Tensor, persistent: bool = True) -> None:
        """Set the module, parameter or buffer at a path; modules above it are added where they are missing.

        Args:
            persistent: whether a buffer is in `state_dict`.
        """
        *above, name = path.split(".")
        holder: nn.Module = self
        for step in above:
            if step not in holder._modules:
                holder.add_module(step, nn.Module())
            holder = holder._modules[step]  # type: ignore[assignment]
        for kind in (holder._modules, holder._parameters, holder._buffers):
            kind.pop(name, None)
        if isinstance(value, nn.Module):
            holder.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            holder.register_parameter(name, value)
        else:
            holder.register_buffer(name, value, persistent)

    def leaves(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the leaf modules with their paths."""
        return _leaves(self, "")

    def sharing(self, paths: Iterable[str]) -> Weights:
        """Return a new tree with the modules and tensors at `paths`, over the same storage."""
        tree, shares = Weights(), Shares()
        for path in paths:
            held = self.get(path)
            tree.put(path, shares.module(held) if isinstance(held, nn.Module) else shares.tensor(held))
        return tree

    def keep_only(self, paths: Collection[str]) -> None:
        """Remove every leaf and tensor that is not in `paths`, and the modules that are empty then."""
        _drop_unused(self, "", paths)


def described(held: nn.Module | torch.Tensor) -> str:
    """Return what a leaf module or a tensor is, without its values: its class and options, or its shape and dtype."""
    return repr(held) if isinstance(held, nn.Module) else f"a tensor {tuple(held.shape)} of {held.dtype}"


def _leaves(holder: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in holder._modules.items():
        if child is not None and type(child) is nn.Module:
            yield from _leaves(child, f"{prefix}{name}.")
        elif child is not None:
            yield prefix + name, child


def _drop_unused(module: nn.Module, path: str, keep: Collection[str]) -> bool:
    if path in keep:
        return True
    dotted = f"{path}." if path else ""
    for kind in (module._parameters, module._buffers):
        for name in [n for n in kind if dotted + n not in keep]:
            del kind[name]
    for name, child in list(module._modules.items()):
        if child is None or not _drop_unused(child, dotted + name, keep):
            del module._modules[name]
    return bool(module._parameters or module._buffers or module._modules)


class Shares:
    """Copies modules and tensors without their storage, which is shared; tied tensors stay tied."""

    def __init__(self) -> None:
        # By id; with the original, which must live as long as its id is looked up.
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def module(self, module: nn.Module) -> nn.Module:
        return _rebuilt(module, self.tensor)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, _like(tensor, tensor.detach())
        return self._made[id(tensor)][1]


IMAGE_PROMPTS = (".processor.", "encoder_hid_proj.")  # in the names of an IP-Adapter's weights


def skeleton(unet: Any, used: Weights) -> Any:
    """Return a copy of a model on the meta device: its modules with their settings, without the values of weights.

    The weights of an IP-Adapter whose scale is 0 keep their values, because the graph does not have them.

    Args:
        used: the weights of the model's graph.
    """
    memo: dict[int, Any] = {
        id(tensor): meta_like(tensor, tensor.dtype) for tensor in (*unet.parameters(), *unet.buffers())
    }
    for name, tensor in unet.named_parameters():
        if any(part in name for part in IMAGE_PROMPTS) and used.get(name) is None:
            memo[id(tensor)] = tensor
    with torch.inference_mode(False):
        copied = copy.deepcopy(unet, memo)
    if any(hasattr(module, "base_layer") for module in copied.modules()):  # fused LoRA is in the weights
        copied.unload_lora()
    return copied


def on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module on the meta device, in a floating dtype, to compute shapes with."""
    return _rebuilt(module, lambda tensor: meta_like(tensor, dtype))


def meta_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of the same shape on the meta device, in `dtype` if it is floating."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return _like(tensor, torch.empty(tensor.shape, dtype=kind, device="meta"))


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):
        return value
    with torch.inference_mode(value.is_inference()):  # for models built in inference mode
        return nn.Parameter(value, tensor.requires_grad)


def _rebuilt(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    own = copy.copy(module)
    own.__dict__ = {n: v.copy() if isinstance(v, dict | set | list) else v for n, v in module.__dict__.items()}
    own.training = False
    own._parameters = {n: None if t is None else make(t) for n, t in module._parameters.items()}  # type: ignore[misc]
    own._buffers = {n: None if t is None else make(t) for n, t in module._buffers.items()}
    own._modules = {n: None if m is None else _rebuilt(m, make) for n, m in module._modules.items()}
    return own
