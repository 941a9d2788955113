"""From PyTorch code to graph nodes.

Ordinary code runs once with proxies for its tensors. Each operation becomes a node of one flat `torch.fx` graph and is
evaluated twice on the meta device, at the nominal and at the generic sizes (see `dims`). What moves between the two
stays symbolic: `x.shape` gives plain numbers for fixed dimensions and proxies for the others. What the code decides
with a size is recorded as a `Guard`; a decision that comes out differently at the two sizes is refused.

`torch.fx.symbolic_trace` cannot do this ("Proxy object cannot be iterated"), and fake tensors with symbolic shapes
take ten times as long for the same graph.
"""

from __future__ import annotations

import contextlib
import linecache
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers.utils import torch_utils
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import ShapeError, TraceError
from .dims import Probe
from .guards import Guard
from .nodes import residual_like, values
from .state import GraphState
from .weights import Shares

# Decisions in diffusers' code whose two branches give the same values, by function and source line. The trace takes
# the branch of the generic (odd) sizes. If diffusers changes such a line the decision becomes a guard again, and calls
# on its other side are refused instead of answered wrongly.
EQUIVALENT_BRANCHES: Mapping[tuple[str, str], str] = {
    (
        "UNet2DConditionModel.forward",
        "if dim % default_overall_up_factor != 0:",
    ): "up-sampling to the size of the skip is up-sampling by two whenever the size divides",
    ("Upsample2D.forward", "if hidden_states.shape[0] >= 64:"): "contiguous() keeps the values",
    (
        "Upsample2D.forward",
        'if dtype == torch.bfloat16 and is_torch_version("<", "2.1"):',
    ): "the cast is for PyTorch before 2.1",
    (
        "Upsample2D.forward",
        "2 if output_size is None else max([f / s for f, s in zip(output_size, hidden_states.shape[-2:])])",
    ): "only feeds the choice of a contiguous() that keeps the values",
    (
        "Upsample2D.forward",
        "if hidden_states.numel() * scale_factor > pow(2, 31):",
    ): "contiguous() keeps the values",
}

# Functions of diffusers that are one node: they branch on sizes, to no effect on values.
WHOLE = ((torch_utils, "fourier_filter"),)
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
READS = {"item", "tolist", "numpy"}
FACTORIES = ("arange", "empty", "zeros", "ones", "full", "linspace", "tensor")


def is_leaf(module: nn.Module) -> bool:
    """PyTorch's own modules are leaves of the graph; everything else is traced through."""
    ours = type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)
    return ours and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def edited(tensor: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """A new tensor: `tensor` after `tensor[key] = value`."""
    if has_torch_function((tensor, value)):
        return handle_torch_function(edited, (tensor, value), tensor, key, value)
    made = tensor.clone()
    made[key] = value
    return made


class TensorProxy(fx.Proxy):
    """Stands for a tensor while code is traced."""

    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor  # code asks isinstance(x, torch.Tensor)

    @property
    def shape(self) -> Any:
        if self.node.meta["val"] is None:
            return _ShapeToCome(self)
        return tuple(self.size(i) for i in range(self.ndim))

    @property
    def ndim(self) -> int:
        return int(self.node.meta["val"].ndim)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        dim = range(self.ndim)[dim]
        nominal, generic = (v.shape[dim] for v in values(self.node))
        return nominal if nominal == generic else self.tracer.once("call_method", "size", self.node, dim)

    def numel(self) -> Any:
        count: Any = 1
        for size in self.shape:
            count = count * size
        return count

    @property
    def dtype(self) -> Any:
        return self.tracer.once("call_function", getattr, self.node, "dtype")

    @property
    def device(self) -> Any:
        return self.tracer.once("call_function", getattr, self.node, "device")

    @property
    def is_cuda(self) -> bool:
        return self.tracer.owner.device.type == "cuda"

    def is_floating_point(self) -> bool:
        return bool(self.node.meta["val"].is_floating_point())

    def __iadd__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.add, other)

    def __imul__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.mul, other)

    def __isub__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.sub, other)

    def __itruediv__(self, other: Any) -> TensorProxy:
        return self._in_place(operator.truediv, other)

    def _in_place(self, op: Callable[..., Any], other: Any) -> TensorProxy:
        # Whoever holds this very tensor sees the new value, as in eager code: diffusers adds adapter residuals to a
        # tensor that it has already put on the list of skips.
        self._become(self.tracer.create_proxy("call_function", op, (self, other), {}).node)
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        if any(node.op in ("placeholder", "get_attr") for node in self.tracer.sharing_memory(self.node)):
            raise self.tracer.error(
                "an input or a weight is edited in place", "edit a clone() of it, or use torch.where or torch.cat"
            )
        self._become(self.tracer.create_proxy("call_function", edited, (self, key, value), {}).node)

    def _become(self, node: fx.Node) -> None:
        """Stand for the edited tensor from now on; views of the old one would show the edit in eager code."""
        self.tracer.outdated |= self.tracer.sharing_memory(self.node) - {node}
        self.node = node

    def __bool__(self) -> bool:
        raise self.tracer.error("the code branches on the values of a tensor", "decide it before tracing")

    def __iter__(self) -> Iterator[Any]:
        raise self.tracer.error("a tensor is iterated over", "use unbind(dim)")

    def __len__(self) -> int:
        size: int = self.size(0)
        return size


class _ShapeToCome:
    """Shape of an optional residual before it is used: it becomes the shape it is compared with."""

    def __init__(self, proxy: TensorProxy) -> None:
        self.proxy = proxy

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple):
            return NotImplemented
        graph = self.proxy.tracer.owner
        for key, sizes in zip(("val", "probe"), _probes(other), strict=True):
            self.proxy.node.meta[key] = torch.empty(sizes, device="meta", dtype=graph.probe_dtype(key))
        return True

    __hash__ = None  # type: ignore[assignment]


def _probes(sizes: tuple[Any, ...]) -> tuple[list[int], list[int]]:
    pairs = [values(s.node) if isinstance(s, fx.Proxy) else (s, s) for s in sizes]
    return [p[0] for p in pairs], [p[1] for p in pairs]


class SizeProxy(fx.Proxy):
    """Stands for a number that depends on the sizes of the call."""

    tracer: Tracer

    def _decide(self, op: Callable[[Any, Any], Any], sign: str, other: Any) -> bool:
        mine = values(self.node)
        theirs = values(other.node) if isinstance(other, fx.Proxy) else (other, other)
        outcomes = bool(op(mine[0], theirs[0])), bool(op(mine[1], theirs[1]))
        return self.tracer.decide(f"{self.tracer.expression(self)} {sign} {self.tracer.expression(other)}", outcomes)

    def __eq__(self, other: object) -> bool:
        return self._decide(operator.eq, "==", other)

    def __ne__(self, other: object) -> bool:
        return self._decide(operator.ne, "!=", other)

    def __lt__(self, other: Any) -> bool:
        return self._decide(operator.lt, "<", other)

    def __le__(self, other: Any) -> bool:
        return self._decide(operator.le, "<=", other)

    def __gt__(self, other: Any) -> bool:
        return self._decide(operator.gt, ">", other)

    def __ge__(self, other: Any) -> bool:
        return self._decide(operator.ge, ">=", other)

    def __bool__(self) -> bool:
        return self._decide(operator.ne, "!=", 0)

    __hash__ = fx.Proxy.__hash__

    def __index__(self) -> int:
        raise self.tracer.error(
            "a size of the call is used as a plain number, which would freeze it", "keep it a tensor operation"
        )

    __int__ = __float__ = __index__


class OpaqueProxy(fx.Proxy):
    """Stands for a dtype or a device, which follow the weights when the model is moved."""

    tracer: Tracer

    def __eq__(self, other: object) -> bool:
        mine = values(self.node)
        if isinstance(mine[0], torch.device):
            mine = (self.tracer.owner.device,) * 2
        theirs = values(other.node) if isinstance(other, fx.Proxy) else (other, other)
        outcomes = (mine[0] == theirs[0], mine[1] == theirs[1])
        if mine[0] != mine[1] and isinstance(other, torch.dtype) and other.is_floating_point:
            outcomes = (True, False)  # the weights may be cast to any dtype, so to this one and to others
        return self.tracer.decide("", outcomes)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = fx.Proxy.__hash__

    @property
    def type(self) -> str:
        return str(self.tracer.owner.device.type)

    @property
    def itemsize(self) -> int:
        return int(self.node.meta["val"].itemsize)


class Tracer(fx.proxy.TracerBase):
    """Appends the operations of running code to a graph.

    Args:
        graph: receives nodes and parameters, and holds the evaluation.
        root: the module whose code runs; its parameters keep the names they have in it, behind `prefix`.
        leaving: nodes that will be removed, whose weights may be displaced.
    """

    def __init__(
        self, graph: GraphState, root: nn.Module | None = None, prefix: str = "", leaving: Iterable[fx.Node] = ()
    ) -> None:
        super().__init__()
        self.owner, self.root = graph, root
        self.graph = graph.fx  # the name fx gives it
        self.module_stack: dict[str, Any] = {}  # type: ignore[assignment]
        self.guards: dict[Guard, None] = {}
        self.failed_at = ""  # innermost module in which an exception was raised
        self.shares = Shares()
        self.displaced: dict[str, Any] = {}  # what this tracer has put in the place of, by name
        self._staying = set(graph.fx.nodes).difference(leaving)
        self._once: dict[Any, Any] = {}
        self.outdated: set[fx.Node] = set()  # values from before an edit in place that eager code would show in them
        dotted = prefix + "." if prefix else ""
        self._paths: dict[int, str] = {}
        self._tensors: dict[int, str] = {}
        self._transient: set[str] = set()  # buffers that no state_dict holds
        for start, model in (("", graph.weights), (dotted, root)):  # code may use the graph's own leaves too
            for path, module in model.named_modules() if model is not None else ():
                path = f"{start}{path}" if path else start[:-1]
                path = path.replace(".base_layer", "")  # inside a fused LoRA layer: the layer it stands for
                self._paths[id(module)] = path
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        self._tensors.setdefault(id(tensor), f"{path}.{name}" if path else name)
                for name in module._non_persistent_buffers_set:
                    self._transient.add(f"{path}.{name}" if path else name)

    # -- what fx calls ------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> Any:
        """The proxy for a node, by what it evaluates to; tuples become tuples of proxies."""
        val = node.meta["val"]
        if val is None or isinstance(val, torch.Tensor):
            return TensorProxy(node, self)
        if isinstance(val, int | float):
            return val if val == node.meta["probe"] and not isinstance(val, float) else SizeProxy(node, self)
        if isinstance(val, torch.dtype | torch.device):
            return OpaqueProxy(node, self)
        if isinstance(val, tuple | list):
            return tuple(
                self.create_proxy("call_function", operator.getitem, (fx.Proxy(node, self), i), {})
                for i in range(len(val))
            )
        raise self.error(f"{node.target} returns a {type(val).__name__}", "return tensors or tuples of tensors")

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """One operation: a node with its scope and its two values."""
        if target in IN_PLACE or (kind == "call_method" and target.endswith("_") and not target.endswith("__")):
            raise self.error(f"{target} edits a tensor in place", "use the form that returns a new tensor")
        if kind == "call_method" and target in READS:
            raise self.error(f"{target}() reads the values of a tensor", "compute with the tensor itself")
        node = self.graph.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        node.meta["nn_module_stack"] = dict(self.module_stack)
        for arg in node.all_input_nodes:
            if arg.meta["val"] is None:
                self._shape_residual(arg, node)
        versions = _versions(node)
        try:
            self.owner.infer(node)
        except ShapeError as error:
            self.graph.erase_node(node)
            if isinstance(error.__cause__, NotImplementedError):
                name = getattr(target, "__name__", target)
                raise self.error(
                    f"the shape of the result of {name} depends on the values", "use torch.where or a mask"
                ) from error
            raise
        if _versions(node) != versions:
            self.graph.erase_node(node)
            name = getattr(target, "__name__", target)
            raise self.error(f"{name} edits a tensor in place", "use the form that returns a new tensor")
        return self.proxy(node)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            if a.node in self.outdated:
                raise self.error(
                    "a tensor is used that shares memory with one edited in place since", "edit a clone() of it"
                )
            return a.node
        if isinstance(a, torch.Tensor):
            return self._tensor(a)
        return super().create_arg(a)

    # -- what the proxies ask -----------------------------------------------------------------------------------

    def once(self, kind: str, target: Any, node: fx.Node, *args: Any) -> Any:
        """The same question about the same value is one node."""
        key = (target, node, *args)
        if key not in self._once:
            self._once[key] = self.create_proxy(kind, target, (fx.Proxy(node, self), *args), {})
        return self._once[key]

    def sharing_memory(self, node: fx.Node) -> set[fx.Node]:
        """The node, its views, and what it is a view of, as far as it is known here."""
        storages = {v.untyped_storage()._cdata for v in values(node) if isinstance(v, torch.Tensor)}
        return {
            other
            for other in self.graph.nodes
            if other is node
            or any(
                v.untyped_storage()._cdata in storages
                for value in (other.meta.get("val"), other.meta.get("probe"))
                for v in (value if isinstance(value, tuple | list) else (value,))
                if isinstance(v, torch.Tensor)
            )
        }

    def expression(self, size: Any) -> str:
        """A size in the symbols of the call."""
        if not isinstance(size, fx.Proxy):
            return repr(size)
        return str(size.node.meta.get("size") or "?")

    def decide(self, condition: str, outcomes: Probe | tuple[bool, bool]) -> bool:
        """The outcome of a decision, recorded as a guard unless both branches are known to give the same values."""
        nominal, generic = outcomes
        function, line, place = _calling_line()
        if (function, line) in EQUIVALENT_BRANCHES:
            return bool(generic)
        if nominal != generic:
            raise self.error(
                f"{function} takes another branch at other sizes or in another dtype: {line} ({place})",
                "write the code so that one branch serves all",
            )
        if "?" in condition:
            raise self.error(
                f"{function} decides on a size that has no expression in the call's sizes: {line} ({place})",
                "decide on the shape of an input instead",
            )
        if condition:  # dtypes and devices need no guard: both came out the same
            self.guards[Guard(condition, bool(generic), f"{place}: {line}")] = None
        return bool(generic)

    def error(self, what: str, hint: str) -> TraceError:
        return TraceError(what, where=next(reversed(self.module_stack), "") or "(top level)", hint=hint)

    # -- modules and parameters -----------------------------------------------------------------------------------

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A leaf becomes one node, any other module is traced through, in its own scope."""
        path = self._paths.get(id(module))
        if path is None:
            raise self.error(
                f"a {type(module).__name__} is called that is no submodule of what is traced",
                "hand over the module itself, as in graph.insert(module, *nodes, path=...), or one that holds it",
            )
        outer = self.module_stack
        self.module_stack = {**outer, path: (path, type(module))}
        self.owner.classes[path] = type(module).__name__
        try:
            if not is_leaf(module):
                return module.forward(*args, **kwargs)
            if getattr(module, "inplace", False):
                raise self.error(f"{type(module).__name__} works in place", "construct it with inplace=False")
            if self.owner.weights.get(path) is not module and path not in self.displaced:
                self._displace(path)
                self.owner.add_module(path, module, self.shares)
            return self.create_proxy("call_module", path, args, kwargs)
        except Exception:
            self.failed_at = self.failed_at or path
            raise
        finally:
            self.module_stack = outer

    def read(self, tensor: torch.Tensor) -> Any:
        """The proxy of a parameter or buffer of what is traced, so that its dtype and values follow the weights."""
        return self.proxy(self._tensor(tensor)) if id(tensor) in self._tensors else tensor

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        name = self._tensors.get(id(tensor))
        if name is None:
            name = self.owner.free_name("constant")
            self._tensors[id(tensor)] = name
        held = self.owner.weights.get(name)
        if held is not tensor and held is not self.shares.tensor(tensor):
            self._displace(name)
            self.owner.add_tensor(name, tensor, self.shares, persistent=name not in self._transient)
        key = ("get_attr", name)
        if key not in self._once:
            self._once[key] = self.create_proxy("get_attr", name, (), {})
        return self._once[key].node  # type: ignore[no-any-return]

    def _displace(self, name: str) -> None:
        """Make room for a new weight. What had its name must be on the way out, and is kept in case of failure."""
        for node in self._staying:
            if str(node.target) in (name, name.rpartition(".")[0]):
                raise self.error(f"{node.name} still uses the weights at {name!r}", "register the new ones elsewhere")
        self.displaced[name] = self.owner.weights.get(name)

    def _shape_residual(self, residual: fx.Node, user: fx.Node) -> None:
        others = [n for n in user.all_input_nodes if n is not residual and isinstance(n.meta["val"], torch.Tensor)]
        if user.target not in (operator.add, torch.add) or len(others) != 1:
            raise self.error(f"the optional input {residual.name} is not simply added", "give it a shape")
        residual_like(residual, others[0])


def _versions(node: fx.Node) -> list[int]:
    """How often each tensor that a node reads has been edited in place."""
    read = [v for n in node.all_input_nodes for v in values(n) if isinstance(v, torch.Tensor)]
    return [v._version for v in read if not v.is_inference()]


def _calling_line() -> tuple[str, str, str]:
    """Function, source line and place of the code being traced, from inside a proxy's operator."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") == __name__ or frame.f_code.co_filename.endswith("enum.py"):
        assert frame.f_back is not None
        frame = frame.f_back
    while frame.f_code.co_name in ("<listcomp>", "<genexpr>"):
        assert frame.f_back is not None
        frame = frame.f_back
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    file = "/".join(code.co_filename.split("/")[-2:])
    return code.co_qualname, line, f"{file}:{frame.f_lineno}"


_LOCK = threading.RLock()  # what `tracing` patches is global, so traces take turns


@contextlib.contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """Module calls, parameters and tensor constructors go to the tracer while this is open, in this thread only."""
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return originals[nn.Module, "__call__"](module, *args, **kwargs)
        return tracer.call_module(module, args, kwargs)

    def attribute(module: nn.Module, name: str) -> Any:
        found = originals[nn.Module, "__getattr__"](module, name)
        if isinstance(found, torch.Tensor) and threading.get_ident() == thread:
            return tracer.read(found)
        return found

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and any(isinstance(a, fx.Proxy) for a in _leaves((args, kwargs))):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return build

    with _LOCK, torch.inference_mode(False), torch.no_grad():
        patched: dict[tuple[Any, str], Any] = {(nn.Module, "__call__"): call, (nn.Module, "__getattr__"): attribute}
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
