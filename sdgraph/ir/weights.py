"""Parameters and leaf modules of a graph: a plain module tree under the source's own names.

The tensors' storage is shared with the source; the modules and `Parameter` objects are not, so that moving or
casting the result leaves the source alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import ModeError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TREE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")  # what a module holds
_ON_LEAVES = "a graph calls its leaves only: do it on those, or on the source UNet, and call sdgraph.apply again"


class Branch(nn.Module):
    """A module of a graph's tree that holds others. Nothing calls it, so it takes nothing that only a call would see.

    Args:
        path: its path, once a `GraphUNet` runs the graph.
        source: the module of the source UNet at that path, on the meta device.
    """

    def __init__(self, path: str = "", source: nn.Module | None = None) -> None:
        super().__init__()
        vars(self).update(_path=path, _source=source)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: nothing calls a block of a graph.

        Raises:
            ModeError: always.
        """
        raise self._refusal("a block of a graph is not called")

    def refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a hook would never be called.

        Raises:
            ModeError: always.
        """
        raise self._refusal("a hook here would never be called")

    register_forward_hook = register_forward_pre_hook = refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = refuse_hook

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._check_child(name, module)
        super().add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]  # first, because the code of a graph reads every leaf here
        if name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("_source")
            if name.startswith("_") or not hasattr(source, name):
                raise
            value = getattr(source, name)
            if value is None or isinstance(value, bool | int | float | str):
                return value  # a setting of the source
            raise self._refusal(f"a block of a graph has no {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.check_attribute(name, value)
        super().__setattr__(name, value)

    def check_attribute(self, name: str, value: Any) -> None:
        """Refuse to set what the calls of the graph would not see.

        Raises:
            ModeError: the source would see it.
        """
        if isinstance(value, nn.Module) or name in self._modules:
            self._check_child(name, value)
        elif isinstance(value, torch.Tensor) or name in self._parameters or name in self._buffers:
            if name not in self._parameters and name not in self._buffers and hasattr(self._source, name):
                raise self._refusal(f"the graph no longer reads {name}")
        elif not name.startswith("_") and not self._known(name, value):
            raise self._refusal(f"{name} would never be read")

    def _known(self, name: str, value: Any) -> bool:
        """Whether setting an attribute changes nothing: the source has the same, or none that its code could read."""
        source = self._source
        if own_code(self, name, value):
            return "_hf_hook" in vars(self)  # of offloading, which a call looks at
        if hasattr(type(self), name) or name == "training":
            return True
        if source is None or not (hasattr(source, name) or name in ("s1", "s2", "b1", "b2")):
            return True
        before = getattr(source, name, None)
        return value is before or (isinstance(value, bool | int | float | str) and value == before)

    def _check_child(self, name: str, value: Any) -> None:
        held = self._modules.get(name)
        if value is None:
            return
        if isinstance(held, Branch) and not isinstance(value, Branch):
            raise self._refusal("a block of a graph is not exchanged", name)
        if held is None:
            self.check_new(name)

    def check_new(self, name: str) -> None:
        """Refuse a further child if the source's code would call it.

        Raises:
            ModeError: it would.
        """
        if isinstance(self, nn.ModuleList) or getattr(self._source, name, None) is not None:
            raise self._refusal("the graph does not call a module here", name)

    def _refusal(self, what: str, *names: str) -> ModeError:
        return ModeError(what, where=".".join(filter(None, (self._path, *names))), hint=_ON_LEAVES)


class Branches(Branch, nn.ModuleList):
    """A `Branch` whose children are numbered; it has a length and iterates as diffusers' lists of blocks and layers."""


class Weights(Branch):
    """A tree of leaf modules and tensors by dotted path. It has no code."""

    def settle(self, source: nn.Module | None, called: Collection[str]) -> None:
        """Make branches of all modules that are not called, each with its path and the source's module at that path."""
        _settle(self, "", source, called)

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
                holder.add_module(step, Branch())
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
            if held is None:
                raise ModeError(
                    "the graph reads a tensor here, and the module has it no longer, or computes it",
                    where=path,
                    hint="remove parametrizations and pruning masks, or put the tensor back",
                )
            tree.put(path, shares.module(held) if isinstance(held, nn.Module) else shares.tensor(held))
        return tree

    def keep_only(self, paths: Collection[str]) -> None:
        """Remove every leaf and tensor that is not in `paths`, and the modules that are empty then."""
        _drop_unused(self, "", paths)


class Scale(nn.Module):
    """A leaf that multiplies by a number which may be set between calls, as the scales of IP-Adapters are.

    Args:
        value: the number.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value * x

    def __mul__(self, x: torch.Tensor) -> Any:
        return self(x)  # diffusers' code multiplies by it as by a number


def described(held: nn.Module | torch.Tensor) -> str:
    """Return what a leaf module or a tensor is, without its values: its class and options, or its shape and dtype."""
    return repr(held) if isinstance(held, nn.Module) else f"a tensor {tuple(held.shape)} of {held.dtype}"


def own_code(module: nn.Module, name: str, value: Any) -> bool:
    """Return whether an attribute of a module takes the place of a method of its class."""
    method = getattr(type(module), name, None)
    bound = isinstance(value, MethodType) and value.__self__ is module and value.__func__ is method
    return callable(method) and not isinstance(method, type) and not bound


def alteration(module: nn.Module) -> str:
    """Return what a module has been given that its class, options and weights do not say; "" if nothing.

    Hooks of offloading are not counted: they bring weights in, and compute nothing.
    """
    own = vars(module)
    if any(own.get(kind) for kind in HOOKS):
        return "hooks"
    moved = "_hf_hook" in own or set(getattr(own.get("_diffusers_hook"), "hooks", ())) & _OFFLOADING
    for name in [name for name in own if name not in _STATE]:  # in order, so that the first is named
        if own_code(module, name, own[name]) and not (name == "forward" and (moved or "_original_forward" in own)):
            return f"another {name}"
    hidden = "_old_forward" in own and own_code(module, "forward", own["_old_forward"])
    return "another forward" if hidden else ""


_STATE = frozenset(vars(nn.Module()))  # the attributes of every module
_OFFLOADING = {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "lazy_leafs"}


def kind(module: nn.Module) -> tuple[object, ...]:
    """Return the kind of a leaf module: its class, its alterations, its options, and the shapes of its tensors.

    The options are the arguments of its constructor, as its attributes have them now.
    """
    own = vars(module)
    options = tuple((name, repr(own[name])) for name in _option_names(type(module)) if name in own)  # type: ignore[arg-type]
    if module._modules:
        tensors: dict[str, torch.Tensor | None] = dict((*module.named_parameters(), *module.named_buffers()))
    else:  # the same, in a tenth of the time
        tensors = dict((*module._parameters.items(), *module._buffers.items()))
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items() if tensor is not None)
    return type(module), alteration(module), options, tuple(shapes)


@functools.cache
def _option_names(kind: type) -> tuple[str, ...]:
    arguments = inspect.signature(kind).parameters
    return tuple(dict.fromkeys((*arguments, *getattr(kind, "__constants__", ()))))


def _settle(branch: Branch, path: str, source: nn.Module | None, called: Collection[str]) -> None:
    names = list(branch._modules)
    if type(branch) is Branch and names and names == [str(i) for i in range(len(names))]:
        branch.__class__ = Branches
    vars(branch).update(_path=path, _source=source)
    for name, child in branch._modules.items():
        inner = f"{path}.{name}" if path else name
        if child is None or inner in called:
            continue
        if not isinstance(child, Branch):  # a leaf whose tensors are read
            holder = Branch()
            for held in TREE:
                vars(holder)[held] = vars(child)[held]
            branch._modules[name] = child = holder
        _settle(child, inner, source._modules.get(name) if source is not None else None, called)


def _leaves(holder: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in holder._modules.items():
        if isinstance(child, Branch):
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
    if alteration(module) or not type(module).__module__.startswith("torch.nn.modules."):
        # Code that is bound to the module must be bound to the copy.
        try:
            return copy.deepcopy(module, {id(t): make(t) for t in (*module.parameters(), *module.buffers())}).eval()
        except RuntimeError as error:  # such as the weight that a hook of weight_norm computes
            raise ModeError(
                f"the {type(module).__name__} cannot be copied: {error}", where=type(module).__name__, hint=_ON_LEAVES
            ) from error
    own: nn.Module = type(module).__new__(type(module))
    state = {n: v.copy() if isinstance(v, _CONTAINERS) else v for n, v in vars(module).items()}
    state["training"] = False
    state["_parameters"] = {n: None if t is None else make(t) for n, t in module._parameters.items()}
    state["_buffers"] = {n: None if t is None else make(t) for n, t in module._buffers.items()}
    state["_modules"] = {n: None if m is None else _rebuilt(m, make) for n, m in module._modules.items()}
    vars(own).update(state)
    return own


_CONTAINERS = (dict, set, list)
