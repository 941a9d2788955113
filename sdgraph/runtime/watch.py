"""`Watch`: the modules and weights that the calls of a graph read, and whether they changed since the last call.

A call reads modules and weights where they are, so an exchanged one acts at the next call. What needs a watch is what
was made of them before: values that were kept for later calls, and compiled code. It also refuses what would never act.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle

from ..errors import ModeError
from ..graph import Graph
from ..ir.nodes import ancestors, weights_read
from ..ir.sites import sites
from ..ir.weights import HOOKS, Branch, Scale, own_code

SAMPLE = 4  # numbers of a matrix or kernel that are compared where not all are
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_version = operator.attrgetter("_version")
_STATE = frozenset(vars(nn.Module())) - {"training"}
_AGAIN = "change the source UNet, and call sdgraph.apply again"


class Watch:
    """Notices changes of the modules and weights of a graph. It is asked once per call.

    Args:
        graph: the graph, with the tree of modules that its calls read.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._read = weights_read(graph.fx.nodes)
        self._called = {str(node.target) for node in graph.fx.nodes if node.op == "call_module"}
        self._blocks = {path[:at] for path in self._read for at, letter in enumerate(path) if letter == "."}
        self._whole, self._sampled = _reach(graph)
        self._tree: _Tree | None = None
        self._code: _Code | None = None
        self._kept: _Kept | None = None

    def check(self) -> bool:
        """Return whether modules are the same as at the last call.

        Raises:
            ModeError: a module was given something that would never act, or is missing.
        """
        if self._tree is not None and self._tree.same():
            return True
        self._tree = self._kept = None
        self._tree = self._survey()
        return False

    def same_code(self) -> bool:
        """Return whether the leaves compute what they did when this was asked last, apart from their weights."""
        if self._code is not None and self._code.same():
            return True
        read = self._modules(self._read)
        self._code = _Code(module for module in read if not isinstance(module, Scale))  # a compiler reads the number
        return False

    def weights(self, reads: bool) -> object:
        """Return an object that stays the same as long as values that were kept would be computed as they were.

        PyTorch counts edits, but neither those of inference tensors nor those through `.data` or NumPy. So contents are
        compared too: all of the weights that invariant sites depend on, and a few numbers of every other matrix and
        kernel. Options of modules, such as an epsilon, are compared where invariant sites depend on them.

        Args:
            reads: whether contents on an accelerator may be read, for which the host waits.
        """
        if self._kept is None or not self._kept.same(reads):
            self._kept = _Kept(self._modules(self._whole), self._modules(self._sampled), reads)
        return self._kept.mark

    def _modules(self, paths: Iterable[str]) -> list[nn.Module]:
        """Return the modules that are called at paths or hold the tensors there, with what is inside them."""
        found: list[nn.Module] = []
        for path in paths:
            held = self._graph.weights.get(path)
            if isinstance(held, nn.Module):
                found += held.modules()
            else:
                holder = self._graph.weights.get_submodule(path.rpartition(".")[0])
                computed = holder._modules.get("parametrizations")
                found += (holder, *(computed.modules() if computed is not None else ()))
        return list(dict.fromkeys(found))

    def _survey(self) -> _Tree:
        branches = list(_branches(self._graph.weights, ""))
        for path, branch in branches:
            self._check_branch(path, branch)
        for path in self._read:
            holder: Any = self._graph.weights
            for step in path.split("."):
                holder = getattr(holder, step, None)
            if holder is None:
                raise ModeError("the graph calls or reads this, and it was removed", where=path, hint=_AGAIN)
        return _Tree([branch for _, branch in branches])

    def _check_branch(self, path: str, branch: Branch) -> None:
        own = vars(branch)
        if type(branch).forward is not Branch.forward or type(branch).__call__ is not Branch.__call__:
            raise ModeError(f"{type(branch).__name__} would never be called", where=path, hint=_AGAIN)
        if path and any(own[name] for name in HOOKS):
            raise ModeError("a hook here would never be called", where=path, hint=f"hook leaves, or {_AGAIN}")
        for name, value in own.items():
            if path and own_code(branch, name, value) and "_hf_hook" not in own:
                raise ModeError(f"{name} would never be called", where=path, hint=f"change leaves, or {_AGAIN}")
        for name, child in branch._modules.items():
            inner = f"{path}.{name}" if path else name
            if child is not None and (inner in self._called or inner in self._blocks):
                if isinstance(child, Branch) == (inner in self._called):
                    what = "a leaf of the graph" if inner in self._called else "a block, and a graph calls leaves only"
                    raise ModeError(f"this takes the place of {what}", where=inner, hint=_AGAIN)
            elif child is not None:
                branch.check_new(name)


class _Tree:
    """The branches of a tree, and their children."""

    def __init__(self, branches: list[Branch]) -> None:
        self._branches, self._types = branches, list(map(type, branches))
        self._dicts = [branch._modules for branch in branches]
        self._hooks = [vars(branch)[name] for branch in branches[1:] for name in HOOKS[:2]]  # those of calls
        self._own = [vars(branch) for branch in branches]
        self._children, self._sizes = self._now(), sum(map(len, self._own))

    def _now(self) -> list[nn.Module | None]:
        return [module for held in self._dicts for module in held.values()]

    def same(self) -> bool:
        return (
            self._now() == self._children
            and not any(self._hooks)
            and sum(map(len, self._own)) == self._sizes
            and list(map(type, self._branches)) == self._types
        )


class _Code:
    """The computation of modules apart from their weights: classes, hooks, replaced methods, options.

    Args:
        modules: the modules.
        rough: further modules, whose options are not compared.
    """

    def __init__(self, modules: Iterable[nn.Module], rough: Iterable[nn.Module] = ()) -> None:
        exact = dict.fromkeys(modules)
        self._modules = [*exact, *(module for module in rough if module not in exact)]
        self._classes = self._classes_now()
        self._kinds: list[Any] = list(dict.fromkeys(self._classes))
        self._own = [vars(module) for module in self._modules]
        self._hooks = [own[name] for own in self._own for name in HOOKS[:2]]
        self._hooks += (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
        self._readers = [_reader(own) for own in self._own[: len(exact)]]
        self._handles, self._keys = RemovableHandle.next_id, self._keys_now()
        self._full = [hooks for hooks in self._hooks if hooks]  # the others stay empty until a hook is added somewhere
        self._state = [tuple(map(_frozen, values)) for values in self._state_now()]
        self._sizes, self._methods = self._sizes_now(), self._methods_now()

    def same(self) -> bool:
        if self._classes != self._classes_now() or self._sizes != self._sizes_now():
            return False
        if self._methods != self._methods_now():
            return False
        if RemovableHandle.next_id != self._handles:  # hooks were added somewhere
            if self._keys != self._keys_now():
                return False
            self._handles = RemovableHandle.next_id
        try:
            return self._state == self._state_now()
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone, or is an array now
            return False

    def _state_now(self) -> list[tuple[Any, ...]]:
        return list(map(operator.call, self._readers, self._own))

    def _sizes_now(self) -> list[int]:
        return [*map(len, self._own), *map(len, self._full)]

    def _classes_now(self) -> list[type]:
        return list(map(type, self._modules))

    def _methods_now(self) -> list[Any]:
        return [kind.forward for kind in self._kinds]

    def _keys_now(self) -> list[tuple[Any, ...]]:
        return [tuple(hooks.items()) for hooks in self._hooks]


class _Kept:
    """The modules and weights that kept values were computed from.

    Args:
        whole: modules whose tensors are compared whole.
        sampled: modules of whose tensors a few numbers are compared.
        reads: whether contents on an accelerator may be read.
    """

    def __init__(self, whole: list[nn.Module], sampled: list[nn.Module], reads: bool) -> None:
        self.mark = object()
        self._code = _Code([*whole, *(module for module in sampled if isinstance(module, Scale))], sampled)
        # Offloading exchanges the tensors of a module at every call.
        exact, rough = (
            [m for m in ms if not {"_hf_hook", "_diffusers_hook"} & vars(m).keys()] for ms in (whole, sampled)
        )
        dicts = [held for module in (*exact, *rough) for held in (module._parameters, module._buffers)]
        self._dicts, self._empty = [held for held in dicts if held], [held for held in dicts if not held]
        self._loose = [(vars(m), name) for m in (*exact, *rough) for name, v in vars(m).items() if _is_tensor(v)]
        self._tensors = self._now()  # kept alive, so that no other tensor gets the place of one
        plain = {id(tensor): tensor for tensor in self._tensors if tensor is not None and not tensor.is_meta}
        self._counted = [tensor for tensor in plain.values() if not tensor.is_inference()]
        self._versions = self._versions_now()
        compared = {id(t) for module in exact for t in (*module._parameters.values(), *module._buffers.values())}
        ordinary = {key: tensor for key, tensor in plain.items() if type(tensor) in (torch.Tensor, nn.Parameter)}
        placed = {key: tensor for key, tensor in ordinary.items() if key in compared or tensor.dim() > 1}
        self._placed = list(placed.values())
        self._places = self._places_now()
        compared &= {key for key, tensor in placed.items() if reads or tensor.device.type == "cpu"}
        self._compared = [placed[key] for key in compared]
        self._flags = self._flags_now()
        self._copies = [tensor.detach().clone() for tensor in self._compared]
        numbers = [_numbers(tensor.detach()) for key, tensor in placed.items() if key not in compared]
        self._here = _by_kind(view for view in numbers if view is not None and view.device.type == "cpu")
        self._there = _by_kind(view for view in numbers if view is not None and view.device.type != "cpu")
        self._read_there = reads
        self._samples_here, self._samples_there = self._here_now(), self._there_now() if reads else []

    def same(self, reads: bool) -> bool:
        now = self._now()
        return (
            len(now) == len(self._tensors)
            and not any(self._empty)
            and all(map(operator.is_, now, self._tensors))
            and self._versions_now() == self._versions
            and self._places_now() == self._places
            and self._flags_now() == self._flags
            and self._code.same()
            and all(map(np.array_equal, self._here_now(), self._samples_here))
            and all(
                torch.equal(tensor, copy)
                for tensor, copy in zip(self._compared, self._copies, strict=True)
                if reads or tensor.device.type == "cpu"
            )
            and (not reads or (self._read_there and all(map(torch.equal, self._there_now(), self._samples_there))))
        )

    def _now(self) -> list[torch.Tensor | None]:
        tensors = [tensor for held in self._dicts for tensor in held.values()]
        return [*tensors, *(own.get(name) for own, name in self._loose)] if self._loose else tensors

    def _versions_now(self) -> list[int]:
        return list(map(_version, self._counted))

    def _places_now(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._placed))

    def _flags_now(self) -> list[bool]:
        return [tensor.requires_grad for tensor in self._compared]  # kernels of matrix products are chosen by it

    def _here_now(self) -> list[Any]:
        return [np.concatenate(views) for views in self._here]

    def _there_now(self) -> list[torch.Tensor]:
        return [torch.cat(views) for views in self._there]


def global_hooks() -> bool:
    """Return whether PyTorch has hooks for all modules, which are called for leaves and not for blocks."""
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _frozen(value: Any) -> Any:
    return copy(value) if isinstance(value, dict | list | set) else value


def _reader(own: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    names = [name for name, value in own.items() if name not in _STATE and name != "training" and not _is_tensor(value)]
    return operator.itemgetter("training", "training", *names)  # two names or more, so that it returns a tuple


def _numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a view of a few numbers of a tensor, as integers of the same bits."""
    bits, count = _BITS.get(tensor.element_size()), tensor.numel()
    if bits is None or not count:
        return None
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    row = tensor.as_strided((count,), (1,)) if dense else tensor[(0,) * (tensor.dim() - 1)]
    return row[:: max(1, len(row) // SAMPLE)][:SAMPLE].view(bits)


def _by_kind(views: Iterable[torch.Tensor]) -> list[list[Any]]:
    """Return views that can be concatenated together, those on the CPU as arrays."""
    kinds: dict[object, list[Any]] = {}
    for view in views:
        kinds.setdefault((view.device, view.dtype), []).append(view.numpy() if view.device.type == "cpu" else view)
    return list(kinds.values())


def _branches(branch: Branch, path: str) -> Iterator[tuple[str, Branch]]:
    yield path, branch
    for name, child in branch._modules.items():
        if isinstance(child, Branch):
            yield from _branches(child, f"{path}.{name}" if path else name)


def _reach(graph: Graph) -> tuple[list[str], list[str]]:
    """Return the weights that kept values depend on: of invariant sites, and of others only."""
    found: tuple[dict[str, None], dict[str, None]] = {}, {}
    nodes = sites(graph.fx)
    for name, site in graph.sites.items():
        if not site.bypassed:
            found[not site.invariant].update(weights_read(ancestors(nodes[name])))
    return list(found[0]), [path for path in found[1] if path not in found[0]]
