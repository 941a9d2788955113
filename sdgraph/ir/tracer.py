"""From PyTorch code to graph nodes.

Ordinary code runs once with proxies for its tensors. Each operation becomes a node of one flat `torch.fx` graph and is
evaluated twice on the meta device, at the nominal and at the generic sizes (see `dims`). Sizes that differ between the
two stay symbolic: `x.shape` gives plain numbers for fixed dimensions and proxies for the others. A decision that the
code takes by a size is recorded as a `Guard`; a decision with different outcomes at the two sizes is refused.

`torch.fx.symbolic_trace` cannot do this ("Proxy object cannot be iterated"), and fake tensors with symbolic shapes
take ten times as long for the same graph.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import torch_utils
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import EditError, ShapeError, SpecError, TraceError
from . import guards
from .dims import Probe, evaluate
from .guards import EQUIVALENT_BRANCHES, Guard, calling_line
from .nodes import residual_like, values
from .state import GraphState
from .weights import Scale, Shares

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SCALES = (0, 40)  # of sizes at which a trace looks besides: a single pixel, and large images
READS = {"item", "tolist", "numpy"}
OWN_MODULES = (__name__, guards.__name__)
# Functions of diffusers that are one node: they branch on sizes, to no effect on values.
WHOLE = ((torch_utils, "fourier_filter"),)
FACTORIES = ("arange", "empty", "zeros", "ones", "full", "linspace", "tensor")

_LOCK = threading.RLock()  # what `tracing` patches is global, so traces take turns


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is a leaf of the graph, as PyTorch's own are; the code of any other module is traced."""
    ours = type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)
    return isinstance(module, Scale) or (ours and not isinstance(module, CONTAINERS))


def edited(tensor: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """Return a copy of `tensor` after `tensor[key] = value`."""
    if has_torch_function((tensor, value)):
        return handle_torch_function(edited, (tensor, value), tensor, key, value)
    copied = tensor.clone()
    copied[key] = value
    return copied


class TensorProxy(fx.Proxy):
    """Stands for a tensor."""

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
        nominal, generic = (value.ndim for value in values(self.node))
        if nominal != generic or not self.tracer.is_fixed(self.node, lambda value: value.ndim):
            raise self.tracer.error("the rank of a tensor depends on the sizes", "name the dimension: x.squeeze(dim)")
        return int(nominal)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        dim = range(self.ndim)[dim]
        nominal, generic = (v.shape[dim] for v in values(self.node))
        fixed = nominal == generic and self.tracer.is_fixed(self.node, lambda value: value.shape[dim])
        return nominal if fixed else self.tracer.once("call_method", "size", self.node, dim)

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
        """Stand for the edited tensor from now on. Views of the old tensor are outdated: eager code would edit them."""
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
    """The shape of an optional residual before its first use; it becomes the shape that it is compared with."""

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

    __int__ = __float__ = __round__ = __trunc__ = __ceil__ = __floor__ = __index__

    # Shifts and masks are arithmetic, which exported models have. torch.export knows them not of sizes.
    def __lshift__(self, places: Any) -> Any:
        return self * self._power_of_two(places)

    def __rlshift__(self, other: Any) -> Any:
        return other * self._power_of_two(self)

    def __rshift__(self, places: Any) -> Any:
        return self // self._power_of_two(places)

    def __rrshift__(self, other: Any) -> Any:
        return other // self._power_of_two(self)

    def _power_of_two(self, places: Any) -> Any:
        if isinstance(places, int) and places < 0:
            raise self.tracer.error("a size is shifted by a negative number of places", "shift to the other side")
        return 2**places

    def __and__(self, mask: Any) -> Any:
        if not isinstance(mask, int) or mask < 0 or mask & (mask + 1):
            raise self._bits()
        return self % (mask + 1)  # type: ignore[operator]

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        raise self._bits()

    __ror__ = __xor__ = __rxor__ = __or__

    def __invert__(self) -> Any:
        return -1 - self  # type: ignore[operator]

    def _bits(self) -> TraceError:
        return self.tracer.error(
            "the bits of a size are combined, which exported models cannot do", "compute with + - * // and %"
        )

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


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


@dataclass
class Names:
    """Names of modules and tensors.

    Args:
        modules: the paths of modules by id.
        tensors: the names of tensors by id; a tied tensor has the first of its names.
        transient: the names of buffers that no `state_dict` holds.
    """

    modules: dict[int, str] = field(default_factory=dict)
    tensors: dict[int, str] = field(default_factory=dict)
    transient: set[str] = field(default_factory=set)

    def add(self, root: nn.Module, prefix: str) -> None:
        """Add a module tree, whose names begin with `prefix`."""
        for inner, module in root.named_modules():
            path = ".".join(filter(None, (prefix, inner)))
            path = path.replace(".base_layer", "")  # inside a fused LoRA layer: the layer it stands for
            dotted = f"{path}." if path else ""
            self.modules[id(module)] = path
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tensors.setdefault(id(tensor), dotted + name)
            self.transient.update(dotted + name for name in module._non_persistent_buffers_set)


class Tracer(fx.proxy.TracerBase):
    """Appends the operations of running code to a graph.

    Args:
        graph: the graph that receives nodes and weights.
        root: the module whose code runs. Its weights keep the names that they have in it, behind `prefix`.
        prefix: the path of `root` in the graph.
        leaving: nodes that will be removed, so that new weights may take the names of their weights.
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
        self.displaced: dict[str, Any] = {}  # weights that this tracer has replaced, by name
        self._staying = set(graph.fx.nodes).difference(leaving)
        self._once: dict[Any, Any] = {}
        self._created: list[fx.Node] = []
        self._elsewhere: tuple[dict[fx.Node, Any], ...] = tuple({} for _ in SCALES)
        self.outdated: set[fx.Node] = set()  # values from before an edit in place that eager code would show in them
        self._prefix = prefix

    @functools.cached_property
    def _names(self) -> Names:
        """The names of what the code may use: the modules and tensors of `root`, and those of the graph."""
        names = Names()  # made when it is first asked for: most of the code that rewrites insert uses none
        names.add(self.owner.weights, "")
        if self.root is not None:
            names.add(self.root, self._prefix)
        return names

    # -- what fx calls ------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> Any:
        """Return the proxy for a node by the kind of its value; a tuple becomes a tuple of proxies."""
        val = node.meta["val"]
        if val is None or isinstance(val, torch.Tensor):
            return TensorProxy(node, self)
        if isinstance(val, int | float):
            return val if self._is_fixed(node) else SizeProxy(node, self)
        if isinstance(val, torch.dtype | torch.device):
            return OpaqueProxy(node, self)
        if isinstance(val, tuple | list):
            if len(val) != len(node.meta["probe"]) or not self.is_fixed(node, len):
                name = getattr(node.target, "__name__", node.target)
                raise self.error(
                    f"the number of results of {name} depends on the sizes", "split channels, or use views"
                )
            return tuple(
                self.create_proxy("call_function", operator.getitem, (fx.Proxy(node, self), i), {})
                for i in range(len(val))
            )
        raise self.error(f"{node.target} returns a {type(val).__name__}", "return tensors or tuples of tensors")

    def _is_fixed(self, node: fx.Node) -> bool:
        """Return whether a number is the same at all sizes. For results of arithmetic, two sizes do not prove it."""
        val = node.meta["val"]
        if isinstance(val, float) or val != node.meta["probe"]:
            return False
        if not any(isinstance(value, int | float) for arg in node.all_input_nodes for value in values(arg)):
            return node.op != "call_method" or (node.target != "size" and self.is_fixed(node, lambda value: value))
        expression, names = node.meta.get("size"), [symbol.name for symbol in self.owner.dims.symbols]
        try:
            return expression is not None and all(
                evaluate(expression, dict.fromkeys(names, size)) == val for size in (1, 2, 5, 16, 33, 100, 1000)
            )
        except SpecError:  # a division by zero
            return False

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """Append an operation: a node with its scope and its two values."""
        if target in IN_PLACE or (kind == "call_method" and target.endswith("_") and not target.endswith("__")):
            raise self.error(f"{target} edits a tensor in place", "use the form that returns a new tensor")
        if kind == "call_method" and target in READS:
            raise self.error(f"{target}() reads the values of a tensor", "compute with the tensor itself")
        node = self.graph.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        node.meta["nn_module_stack"] = dict(self.module_stack)
        for arg in node.all_input_nodes:
            if arg.meta["val"] is None:
                self._shape_residual(arg, node)
        try:
            self.owner.infer(node)
        except EditError as error:
            self.graph.erase_node(node)
            if isinstance(error.__cause__, NotImplementedError):
                name = getattr(target, "__name__", target)
                raise self.error(
                    f"the shape of the result of {name} depends on the values", "use torch.where or a mask"
                ) from error
            if not isinstance(error, ShapeError):
                raise self.error(error.what, error.hint) from error
            raise
        self._created.append(node)
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

    # -- what proxies call ---------------------------------------------------------------------------------------

    def once(self, kind: str, target: Any, node: fx.Node, *args: Any) -> Any:
        """Return the proxy of an operation on a node, which is appended the first time only."""
        key = (target, node, *args)
        if key not in self._once:
            self._once[key] = self.create_proxy(kind, target, (fx.Proxy(node, self), *args), {})
        return self._once[key]

    def is_fixed(self, node: fx.Node, read: Callable[[Any], Any]) -> bool:
        """Return whether a property of a node's value that is the same at both sizes of a trace is so at others too.

        `x[:, :, ::64].shape[2]` is 1 at small sizes. Sizes at which an operation fails do not count.

        Args:
            read: returns the property of a value.
        """
        for scale, known in zip(SCALES, self._elsewhere, strict=True):
            for created in self._created[len(known) :]:
                inputs = [self._at(scale, known, arg) for arg in created.all_input_nodes]
                there = dict(zip(created.all_input_nodes, inputs, strict=True))
                missing = any(value is None for value in inputs)
                known[created] = None if missing else self.owner.evaluate_elsewhere(created, there.__getitem__)
            value = known.get(node)
            if value is not None and read(value) != read(node.meta["val"]):
                return False
        return True

    def _at(self, scale: int, known: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        """Return the value of a node with each size of the call multiplied; None if it is not known."""
        if node in known:
            return known[node]
        val, probe = values(node)
        if not isinstance(val, torch.Tensor) or val.ndim != probe.ndim:
            return None
        sizes = {s.name: s.generic * scale + 1 if scale else 1 for s in self.owner.dims.symbols}
        shape = self.owner.dims.expressions(val, probe)
        if "?" in shape:
            return None
        return val.new_empty([d if isinstance(d, int) else int(evaluate(d, sizes)) for d in shape])

    def sharing_memory(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes whose values share memory with that of a node, and the node itself."""
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
        """Return a size as an expression in the symbols of the call; "?" if there is none."""
        if not isinstance(size, fx.Proxy):
            return repr(size)
        return str(size.node.meta.get("size") or "?")

    def decide(self, condition: str, outcomes: Probe | tuple[bool, bool]) -> bool:
        """Return the outcome of a decision, and record it as a guard unless both branches give the same values.

        Args:
            condition: the decision as an expression in the call's sizes; empty if it is about a dtype or a device.
            outcomes: the outcomes at the nominal and at the generic sizes.
        """
        nominal, generic = outcomes
        function, line, place = calling_line(OWN_MODULES)
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
        if condition:  # dtypes and devices need no guard: both outcomes are the same
            self.guards[Guard(condition, bool(generic), f"{place}: {line}")] = None
        return bool(generic)

    def error(self, what: str, hint: str) -> TraceError:
        return TraceError(what, where=next(reversed(self.module_stack), "") or "(top level)", hint=hint)

    # -- modules and parameters -----------------------------------------------------------------------------------

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Append a node for a leaf; run the code of any other module, in its own scope."""
        path = self._names.modules.get(id(module))
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
        """Return the proxy of a parameter or buffer of the traced code; any other tensor is returned as it is."""
        return self.proxy(self._tensor(tensor)) if id(tensor) in self._names.tensors else tensor

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        name = self._names.tensors.get(id(tensor))
        if name is None:
            name = self.owner.free_name("constant")
            self._names.tensors[id(tensor)] = name
        held = self.owner.weights.get(name)
        if held is not tensor and held is not self.shares.tensor(tensor):
            self._displace(name)
            self.owner.add_tensor(name, tensor, self.shares, persistent=name not in self._names.transient)
        key = ("get_attr", name)
        if key not in self._once:
            self._once[key] = self.create_proxy("get_attr", name, (), {})
        return self._once[key].node  # type: ignore[no-any-return]

    def _displace(self, name: str) -> None:
        """Make room for a new weight. The old one of its name must have no users that stay; it is kept to restore."""
        for node in self._staying:
            if str(node.target) in (name, name.rpartition(".")[0]):
                raise self.error(f"{node.name} still uses the weights at {name!r}", "register the new ones elsewhere")
        self.displaced[name] = self.owner.weights.get(name)

    def _shape_residual(self, residual: fx.Node, user: fx.Node) -> None:
        others = [n for n in user.all_input_nodes if n is not residual and isinstance(n.meta["val"], torch.Tensor)]
        if user.target not in (operator.add, torch.add) or len(others) != 1:
            raise self.error(f"the optional input {residual.name} is not simply added", "give it a shape")
        residual_like(residual, others[0])


@contextlib.contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """Send module calls, reads of weights and tensor constructors of this thread to the tracer."""

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            if _this_tracer() is not None and any(isinstance(a, fx.Proxy) for a in _leaves((args, kwargs))):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return build

    with _LOCK, torch.inference_mode(False), torch.no_grad(), watched_modules():
        outer, _thread.tracer = _this_tracer(), tracer
        factories = [(torch, name) for name in FACTORIES] + list(WHOLE)
        originals = {(holder, name): getattr(holder, name) for holder, name in factories}
        try:
            for (holder, name), original in originals.items():
                setattr(holder, name, factory(original))
            yield
        finally:
            _thread.tracer = outer
            for (holder, name), original in originals.items():
                setattr(holder, name, original)


@contextlib.contextmanager
def watched_modules() -> Iterator[None]:
    """Let `nn.Module` ask for the tracer of the thread at calls and at attributes, for the duration of the context.

    Python visits all subclasses of a class whose method is replaced, which takes milliseconds. A block around several
    traces replaces the methods once.
    """
    with _COUNT:
        if not _watch.users:
            _watch.originals = {name: getattr(nn.Module, name) for name in _WATCHED}
            for name, method in _WATCHED.items():
                setattr(nn.Module, name, method)
        _watch.users += 1
    try:
        yield
    finally:
        with _COUNT:
            _watch.users -= 1
            if not _watch.users:
                for name, method in _watch.originals.items():
                    setattr(nn.Module, name, method)


@dataclass
class _Watch:
    """The number of blocks that watch modules, and the methods of `nn.Module` outside of them."""

    users: int = 0
    originals: dict[str, Callable[..., Any]] = field(default_factory=dict)


_watch, _COUNT, _thread = _Watch(), threading.Lock(), threading.local()


def _this_tracer() -> Tracer | None:
    """Return the tracer of this thread; None where nothing is traced."""
    return getattr(_thread, "tracer", None)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tracer = _this_tracer()
    if tracer is None:
        return _watch.originals["__call__"](module, *args, **kwargs)
    return tracer.call_module(module, args, kwargs)


def _attribute(module: nn.Module, name: str) -> Any:
    value = _watch.originals["__getattr__"](module, name)
    if isinstance(value, torch.Tensor) and (tracer := _this_tracer()) is not None:
        return tracer.read(value)
    return value


def _keep(module: nn.Module, name: str, value: Any) -> None:
    tracer = _this_tracer()
    if tracer is not None and any(isinstance(leaf, fx.Proxy) for leaf in _leaves(value)):
        raise tracer.error(
            f"a {type(module).__name__} keeps a tensor between calls, as its attribute {name!r}",
            "write it as a function of its tensors; a graph keeps nothing",
        )
    _watch.originals["__setattr__"](module, name, value)


_WATCHED = {"__call__": _call, "__getattr__": _attribute, "__setattr__": _keep}


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(tuple(tree.values()))
    else:
        yield tree
