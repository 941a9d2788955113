"""From PyTorch code to graph nodes.

Ordinary code runs once with proxies for its tensors. Each operation becomes a node of one flat `torch.fx` graph and is
evaluated twice on the meta device, at the nominal and at the generic sizes (see `dims`). Sizes that differ between the
two stay symbolic: `x.shape` gives plain numbers for fixed dimensions and proxies for the others. A decision that the
code takes by a size is recorded as a `Guard`; a decision with different outcomes at the two sizes is refused.

`torch.fx.symbolic_trace` cannot do this ("Proxy object cannot be iterated"), and fake tensors with symbolic shapes
take ten times as long for the same graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..errors import EditError, ShapeError, SpecError, TraceError
from . import branches, proxies
from .branches import EQUIVALENT_BRANCHES, calling_line
from .dims import Probe, evaluate
from .evaluation import elsewhere
from .guards import Guard
from .nodes import residual_like, values
from .proxies import OpaqueProxy, ProxyTracer, SizeProxy, TensorProxy
from .state import GraphState
from .weights import Scale, Shares

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SCALES = (0, 40)  # of sizes at which a trace looks besides: a single pixel, and large images
READS = {"item", "tolist", "numpy"}
OWN_MODULES = (__name__, proxies.__name__, branches.__name__)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a leaf of the graph, as PyTorch's own are; the code of any other module is traced."""
    ours = type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)
    return isinstance(module, Scale) or (ours and not isinstance(module, CONTAINERS))


@dataclass
class Names:
    """Names of modules and tensors.

    Args:
        modules: by id.
        tensors: by id; a tied tensor has the first of its names.
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


class Tracer(ProxyTracer):
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
        """Whether a number is the same at all sizes. Of what is computed from sizes, the two sizes do not prove it."""
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
        """Whether a property of a node's value that is the same at both sizes of a trace is so at others too.

        `x[:, :, ::64].shape[2]` is 1 at small sizes. Sizes at which an operation fails do not count.

        Args:
            read: returns the property of a value.
        """
        for scale, known in zip(SCALES, self._elsewhere, strict=True):
            for created in self._created[len(known) :]:
                inputs = [self._at(scale, known, arg) for arg in created.all_input_nodes]
                there = dict(zip(created.all_input_nodes, inputs, strict=True))
                absent = any(value is None for value in inputs)
                known[created] = None if absent else elsewhere(self.owner, created, there.__getitem__)
            value = known.get(node)
            if value is not None and read(value) != read(node.meta["val"]):
                return False
        return True

    def _at(self, scale: int, known: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        """The value of a node with each size of the call multiplied; None if it is not known."""
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
            outcomes: at the nominal and at the generic sizes.
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
