"""The state of a graph, which is read and evaluated: nodes, their values at two calls, weights, sizes, sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Self

import networkx as nx
import torch
from torch import nn
from torch.fx import map_arg

from ..errors import EditError, ModeError, PathError, SdgraphError, ShapeError, SpecError, did_you_mean
from ..options import checked
from .decisions import Applied
from .dims import Dims, Symbol
from .edits import Recording, Removed
from .evaluation import SIGNS, Operation, computed, edit_counts, value_kinds
from .guards import Guard, probing, raised, satisfied
from .inputs import Input, example_of
from .nodes import ancestors, called, count_macs, residual_like, scope, values, weights_read
from .sites import Site, changing_nodes, live_nodes, sites
from .variants import copy_nodes
from .weights import Scale, Shares, Weights, alteration, kind, meta_like, on_meta


@dataclass
class GraphState:
    """The state of a graph: its nodes and their values, weights, sizes and sites. `sdgraph.Graph` adds editing.

    PyTorch's own modules are leaves, which nodes call (`call_module`); all other nodes call functions and methods. A
    node's `meta["nn_module_stack"]` names the source modules that it belongs to. Its value is known on the meta device
    at two calls: `meta["val"]` at the nominal sizes and in the source's dtype, `meta["probe"]` at the generic sizes and
    in another dtype. What is equal in both is fixed; what differs depends on the call.

    Args:
        fx: the nodes.
        weights: leaf modules and parameters under the source's names.
        inputs: the flat inputs, in the order of the placeholders.
        dims: the free sizes.
        dtype: the dtype of the source's parameters.
        device: the device of the source's parameters.
        config: the source's configuration.
        guards: the conditions that the sizes of a call must satisfy.
        classes: the class name of every source module, by path.
        passes: the passes that were applied, with their decisions.
        removals: the modules that edits removed, in order; leaf modules are among them until a `GraphUNet` runs the
            graph.
        source: the UNet that was traced, without the values of its weights; see `sdgraph.runtime.retrace`.
    """

    fx: torch.fx.Graph
    weights: Weights
    inputs: tuple[Input, ...]
    dims: Dims
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    config: Mapping[str, Any] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    classes: dict[str, str] = field(default_factory=dict)
    passes: tuple[Applied, ...] = ()
    removals: tuple[Removed, ...] = ()
    source: Any = field(default=None, repr=False)
    _sites: dict[str, Site] = field(default_factory=dict, repr=False)
    _frozen: bool = field(default=False, repr=False)
    _recording: Recording | None = field(default=None, repr=False)  # of the pass that is running
    _meta: dict[tuple[str, str], nn.Module] = field(default_factory=dict, repr=False)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[torch.fx.Node]:
        """The nodes, in graph order."""
        return list(self.fx.nodes)

    @property
    def output(self) -> torch.fx.Node:
        """The node of the value that the graph returns."""
        value = self.fx.output_node().args[0]
        assert isinstance(value, torch.fx.Node)
        return value

    @property
    def removed(self) -> dict[str, str]:
        """Paths of the regions that edits removed, each with the pass that removed it."""
        return {r.path: r.by or "an edit outside of passes" for r in self.removals if r.module is None}

    def freeze(self) -> None:
        """Refuse further edits of this graph, and free the weights of removed leaf modules, because a module runs it.

        The record of removed regions stays. A copy can be edited.
        """
        self.removals = tuple(r for r in self.removals if r.module is None)
        self._frozen = True

    @checked(PathError)
    def input(self, name: str) -> torch.fx.Node:
        """Return the placeholder of an input.

        Args:
            name: the name of the input.
        Raises:
            PathError: there is no input of this name.
        """
        for node in self.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        names = [i.name for i in self.inputs]
        raise PathError(f"no input {name!r}", hint=did_you_mean(name, names) or f"inputs: {', '.join(names)}")

    def resolved_inputs(self) -> tuple[Input, ...]:
        """Return the inputs with the shapes of residuals filled in.

        A residual has the shape of the value that it is added to, and None if that value was removed. A size that has
        no expression in the call's sizes is "?".
        """
        resolved = []
        for spec in self.inputs:
            node = self.input(spec.name)
            if spec.shape is None and node.meta["val"] is not None:
                spec = replace(spec, shape=self.dims.expressions(*values(node)))
            resolved.append(spec)
        return tuple(resolved)

    def module_path(self, node: torch.fx.Node) -> str:
        """Return the path of the innermost module that a node belongs to; "" is the model itself.

        Args:
            node: the node.
        """
        return scope(node)

    def paths(self) -> list[str]:
        """Return the paths of all regions, in graph order."""
        return list(dict.fromkeys(p for n in self.fx.nodes for p in n.meta.get("nn_module_stack", {})))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name."""
        return dict(self.weights.named_parameters())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors whose memory the graph may share with its source, by name."""
        held: tuple[Any, ...] = (self.weights, self.source) if isinstance(self.source, nn.Module) else (self.weights,)
        return {n: t for h in reversed(held) for n, t in (*h.named_parameters(), *h.named_buffers())}

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call at the nominal sizes (batch 1), including the products of attention."""
        return sum(self.macs_of(node) for node in self.fx.nodes)

    def to_networkx(self) -> nx.DiGraph[str]:
        """Return a graph of node names with `op`, `target`, `scope` and `macs`; edges go from a value to its users."""
        net: nx.DiGraph[str] = nx.DiGraph()
        for node in self.fx.nodes:
            net.add_node(node.name, op=node.op, target=str(node.target), scope=scope(node), macs=self.macs_of(node))
            net.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return net

    def shape(self, node: torch.fx.Node) -> str:
        """Return the shape of a node's value as text, such as `B×320×H/2×W/2`.

        Args:
            node: the node.
        """
        nominal, generic = values(node)
        if isinstance(nominal, torch.Tensor):
            return self.dims.shape(nominal, generic)
        if isinstance(nominal, tuple | list):
            return f"({', '.join(self.dims.shape(n, g) for n, g in zip(nominal, generic, strict=True))})"
        return "" if nominal is None else str(node.meta.get("size", nominal))

    def infer(self, node: torch.fx.Node) -> None:
        """Evaluate a node at both calls and store its values in its `meta`.

        Args:
            node: the node.
        Raises:
            ShapeError: the operation does not accept its inputs.
            EditError: the operation edits a tensor in place.
        """
        node.meta.pop("macs", None)
        node.meta["evaluated"] = Operation.of(node)
        before = edit_counts(node)
        for key in ("val", "probe"):
            try:
                node.meta[key] = computed(*self._call(node, key))
            except SdgraphError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{n.name}: {self.shape(n)}" for n in node.all_input_nodes)
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ShapeError(
                    f"{called(node)} cannot take {shapes or 'its arguments'}: {reason}",
                    where=f"{scope(node) or '(top level)'}, node {node.name}",
                    hint="the shapes on both sides must agree at every size of the call",
                ) from error
        if edit_counts(node) != before:
            raise EditError(
                f"{called(node)} edits a tensor in place",
                where=f"{scope(node) or '(top level)'}, node {node.name}",
                hint="use the form that returns a new tensor",
            )
        nominal, generic = values(node)
        if isinstance(nominal, int | float) and not isinstance(nominal, bool):
            node.meta["size"] = self._size(node, nominal, generic)

    def probe_dtype(self, key: str) -> torch.dtype:
        """Return the floating dtype of an evaluation: the source's for "val", another one for "probe".

        Args:
            key: "val" or "probe".
        """
        if key == "val":
            return self.dtype
        return torch.float16 if self.dtype is not torch.float16 else torch.float32

    def propagate(self, anew: bool = False) -> None:
        """Evaluate new and rewired nodes, and the nodes that depend on values that have changed.

        Args:
            anew: evaluate all nodes.
        Raises:
            ShapeError: an operation does not accept its inputs; the error names the first such node.
        """
        changed: set[torch.fx.Node] = set()
        residuals = {i.name for i in self.inputs if i.shape is None}
        shaped: set[torch.fx.Node] = set()
        for node in self.fx.nodes:
            if node.op in ("placeholder", "output"):
                continue
            for arg in node.all_input_nodes:
                if arg.op == "placeholder" and arg.name in residuals and arg not in shaped:
                    # Shaped anew, for what it is added to may have changed.
                    other = next(n for n in node.all_input_nodes if n is not arg)
                    shaped.add(arg)
                    if arg.meta["val"] is None or value_kinds(arg) != value_kinds(other):
                        changed.add(arg)
                        residual_like(arg, other)
            current = not anew and node.meta.get("evaluated") == Operation.of(node)
            if current and changed.isdisjoint(node.all_input_nodes):
                continue
            before = value_kinds(node) if "val" in node.meta else None
            self.infer(node)
            if before != value_kinds(node):
                changed.add(node)

    def evaluate(self, node: torch.fx.Node, key: str) -> Any:
        """Return the value of a node, computed from the values of its inputs.

        Args:
            node: the node.
            key: "val" for the nominal sizes, "probe" for the generic ones.
        """
        code, args, kwargs = self._call(node, key)
        with torch.no_grad():
            return code(*args, **kwargs)

    def evaluate_elsewhere(self, node: torch.fx.Node, value: Callable[[torch.fx.Node], Any]) -> Any:
        """Return the value of a node at sizes that are neither nominal nor generic; None if it has none there.

        Args:
            node: the node.
            value: a function that returns the values of its inputs there, which are not None.
        """
        try:
            return computed(*self._call(node, "val", value))
        except Exception:  # whatever an operation raises at sizes that it does not take
            return None

    def _call(
        self, node: torch.fx.Node, key: str, value: Callable[[torch.fx.Node], Any] | None = None
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Return the callable of a node and its arguments: its inputs' values by a key, or as `value` returns them."""
        given = (lambda n: n.meta[key]) if value is None else value
        args, kwargs = map_arg(node.args, given), map_arg(node.kwargs, given)
        if node.op == "call_module":
            return self._meta_module(str(node.target), key).forward, args, kwargs
        if node.op == "call_function":
            return node.target, args, kwargs  # type: ignore[return-value]
        if node.op == "call_method":
            return getattr(args[0], str(node.target)), args[1:], kwargs
        if node.op == "get_attr":
            return meta_like, (self.tensor(str(node.target)), self.probe_dtype(key)), {}
        raise EditError(f"a {node.op} node cannot be evaluated", where=node.name)

    def _size(self, node: torch.fx.Node, nominal: Any, generic: Any) -> str | None:
        """Return a number as an expression in the call's sizes: sizes are recognised, arithmetic is composed."""
        if node.op == "call_method":
            return self.dims.name(nominal, generic)
        sides = [a.meta.get("size") if isinstance(a, torch.fx.Node) else repr(a) for a in node.args]
        if node.target not in SIGNS or None in sides:
            return None
        return f"({sides[0]} {SIGNS[node.target]} {sides[1]})"

    def _meta_module(self, path: str, key: str) -> nn.Module:
        if (path, key) not in self._meta:
            self._meta[path, key] = on_meta(self.module(path), self.probe_dtype(key))
        return self._meta[path, key]

    def module(self, path: str) -> nn.Module:
        """Return the leaf module at a path.

        Args:
            path: the path of the module.
        Raises:
            PathError: there is none; the error names the nearest paths.
        """
        module = self.weights.get(path) if isinstance(path, str) else None
        if not isinstance(module, nn.Module):
            raise PathError(f"no leaf module {path!r}", hint=did_you_mean(path, self.paths()))
        return module

    def tensor(self, name: str) -> torch.Tensor:
        """Return the parameter or buffer of a name.

        Args:
            name: the dotted name, as in the source's `state_dict`.
        Raises:
            PathError: there is none; the error names the nearest names.
        """
        tensor = self.weights.get(name) if isinstance(name, str) else None
        if not isinstance(tensor, torch.Tensor):
            raise PathError(f"no tensor {name!r}", hint=did_you_mean(str(name), self.parameters()))
        return tensor

    @checked(EditError)
    def add_module(self, path: str, module: nn.Module, shares: Shares | None = None) -> None:
        """Put a copy of a leaf module at a path, over the same storage; it replaces the module there.

        Args:
            path: the path of the module.
            module: the leaf module.
            shares: a record of tied weights; weights that are added with the same record stay tied.
        """
        self._put(path, (shares or Shares()).module(module))

    @checked(EditError)
    def add_tensor(
        self, name: str, tensor: torch.Tensor, shares: Shares | None = None, persistent: bool = True
    ) -> None:
        """Put a parameter or buffer at a name, over the same storage.

        Args:
            name: the dotted name.
            tensor: the parameter or buffer.
            shares: a record of tied weights; weights that are added with the same record stay tied.
            persistent: whether a buffer is in `state_dict`.
        """
        self._put(name, (shares or Shares()).tensor(tensor), persistent)

    def _put(self, path: str, value: nn.Module | torch.Tensor, persistent: bool = True) -> None:
        """Set a weight, and forget the values that were computed with the one before."""
        self._check_editable()
        if not all(part.isidentifier() or part.isdigit() for part in path.split(".")):
            raise EditError(f"{path!r} is no module path", where=path, hint="names with dots between them")
        self.weights.put(path, value, persistent)
        for key in ("val", "probe"):
            if self._meta.pop((path, key), None) is not None:
                for node in self.fx.nodes:
                    if node.target == path:
                        node.meta.pop("evaluated", None)

    def free_name(self, stem: str) -> str:
        """Return a name that no weight has: the stem, or the stem with a number.

        Args:
            stem: the beginning of the name.
        """
        name, count = stem, 0
        while self.weights.get(name) is not None:
            count += 1
            name = f"{stem}_{count}"
        return name

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of feature inheritance by name, in graph order."""
        changing = self.changing_nodes() if self._sites else set()
        return {n: replace(self._sites[n], invariant=node not in changing) for n, node in sites(self.fx).items()}

    @checked(EditError)
    def call_macs(self, reused: Collection[str] = ()) -> int:
        """Return the multiply-accumulates of a call that reuses some sites, at the nominal sizes.

        Args:
            reused: the names of the sites that are reused.
        """
        return sum(self.macs_of(node) for node in live_nodes(self.fx, reused))

    @checked(EditError)
    def allowed(self, **sizes: int) -> dict[str, int]:
        """Return the sizes of a call, enlarged as little as the graph requires.

        Args:
            sizes: the sizes by symbol: batch B, height H and width W of the latents, length L of the text.
        Raises:
            EditError: no sizes nearby satisfy the guards.
        Example:
            `graph.allowed(B=2, H=9, W=8)`
        """
        return raised(self.guards, sizes)

    def evaluate_at(self, symbols: tuple[Symbol, ...]) -> None:
        """Evaluate the graph at the nominal and the generic sizes of other symbols.

        Args:
            symbols: the symbols with their sizes.
        """
        self.dims = Dims(symbols)
        specs = {spec.name: spec for spec in self.inputs}
        for node in self.fx.nodes:
            if node.op == "placeholder" and specs[node.name].shape is not None:
                for key, which in (("val", "nominal"), ("probe", "generic")):
                    sizes = {symbol.name: getattr(symbol, which) for symbol in symbols}
                    node.meta[key] = example_of(specs[node.name], sizes, self.probe_dtype(key))
        self.propagate(anew=True)

    def _check_editable(self) -> None:
        if self._frozen:
            raise EditError(
                "the graph belongs to a GraphUNet, which has compiled calls from it",
                hint="edit a copy, and build another: graph = unet.graph.copy(); ...; sdgraph.GraphUNet(graph)",
            )

    def details(self) -> tuple[object, ...]:
        """Return what operations do not show: the classes and options of modules, shapes, sites and guards."""
        return frozenset(self.kinds().items()), tuple(self.sites.items()), self.guards

    def kinds(self) -> dict[str, object]:
        """Return the kinds of leaf modules (see `kind` in `weights`), and the shapes of tensors, by path."""
        paths = dict.fromkeys(str(node.target) for node in self.fx.nodes if node.op == "call_module")
        modules = ((path, self.module(path)) for path in paths)
        tensors = chain(self.weights.named_parameters(remove_duplicate=False), self.weights.named_buffers())
        return {
            **{path: kind(module) for path, module in modules},
            **{name: tuple(tensor.shape) for name, tensor in tensors},
        }

    def changing_nodes(self) -> set[torch.fx.Node]:
        """Return the nodes whose tensors depend on inputs that change from call to call of a generation."""
        return changing_nodes(self.fx, self.inputs)

    def ancestors(
        self, node: torch.fx.Node, stop: Callable[[torch.fx.Node], bool] = lambda _: False
    ) -> Iterator[torch.fx.Node]:
        """Yield a node and all nodes that its value is computed from, depth first.

        Args:
            node: the node.
            stop: a predicate of nodes whose inputs are left out.
        """
        return ancestors(node, lambda source: [] if stop(source) else source.all_input_nodes)

    def macs_of(self, node: torch.fx.Node) -> int:
        """Return the multiply-accumulates of a node at the nominal sizes.

        Args:
            node: the node.
        Raises:
            EditError: the argument is not a node.
        """
        if not isinstance(node, torch.fx.Node):
            raise EditError(f"{node!r} is no node", where="macs_of", hint="pass one of graph.nodes")
        if "macs" not in node.meta:
            module = self.module(str(node.target)) if node.op == "call_module" else None
            node.meta["macs"] = count_macs(node, module, lambda: self.evaluate(node, "val"))
        return int(node.meta["macs"])

    def follow_weights(self) -> None:
        """Adopt the dtype and device that the weights have been moved to since the trace, and exchanged modules.

        Raises:
            ShapeError: an exchanged module or weight does not take the values that the graph gives it.
        """
        self._check_editable()
        weight = next(iter(self.parameters().values()), None)
        if weight is None or ((weight.dtype, weight.device) == (self.dtype, self.device) and self._is_evaluated()):
            return
        self.dtype, self.device = weight.dtype, weight.device
        for node in self.fx.nodes:
            if node.op == "placeholder" and node.meta["val"] is not None and node.meta["val"].is_floating_point():
                for key in ("val", "probe"):
                    node.meta[key] = node.meta[key].to(self.probe_dtype(key))
        self._meta.clear()
        self.propagate(anew=True)

    def _is_evaluated(self) -> bool:
        """Return whether the values of nodes are those of the modules and tensors that the graph has now."""
        for node in self.fx.nodes:
            path = str(node.target)
            if node.op == "get_attr" and node.meta["val"].shape != self.tensor(path).shape:
                return False
            evaluated = self._meta.get((path, "val")) if node.op == "call_module" else None
            if evaluated is not None and kind(evaluated) != kind(self.module(path)):
                return False
        return True

    def check_no_adapters(self) -> None:
        """Refuse a graph whose leaves are wrapped by LoRA layers, which are not part of the graph and would be lost.

        Raises:
            ModeError: there are LoRA layers.
        """
        for path, module in self.weights.named_modules():
            if hasattr(module, "lora_A"):
                raise ModeError(
                    "LoRA is loaded, and its layers are no part of the graph",
                    where=path,
                    hint="unet.fuse_lora() and unet.unload_lora() first",
                )

    def check_unaltered(self) -> None:
        """Refuse a graph whose leaves do more than their class, options and weights say, which would be lost.

        Raises:
            ModeError: there are LoRA layers, hooks, methods that were exchanged on a leaf, or leaves of a class that no
                trace has.
        """
        self.check_no_adapters()
        for path in weights_read(node for node in self.fx.nodes if node.op == "call_module"):
            module = self.module(path)
            what = alteration(module)
            if not what and not type(module).__module__.startswith("torch.nn.modules.") and type(module) is not Scale:
                what = f"the class {type(module).__name__}"
            if what:
                raise ModeError(
                    f"the module was given {what} since the graph was made, which would be lost",
                    where=path,
                    hint="remove it, and give it to the result; or change the source UNet and call sdgraph.apply again",
                )

    def copy(self) -> Self:
        """Return a separate graph that shares the storage of the weights; it can be edited.

        Raises:
            ModeError: there are LoRA layers.
        """
        self.check_no_adapters()
        return replace(
            self,
            fx=copy_nodes(self.fx),
            weights=self.weights.sharing(weights_read(self.fx.nodes)),
            _frozen=False,
            config=copy.deepcopy(dict(self.config)),
            classes=dict(self.classes),
            _sites=dict(self._sites),
            _meta=dict(self._meta),
            _recording=None,
        )

    def at(self, **sizes: int) -> Self:
        """Return a copy whose nominal sizes, at which costs are quoted, are others.

        Args:
            sizes: sizes of the call by symbol: batch `B`, height `H` and width `W` of the latents, length `L` of the
                text. The others stay.
        Raises:
            SpecError: there is no such size, it is no whole number of at least 1, or the graph does not cover it.
        Example:
            `graph.at(B=2, H=64, W=96).macs`
        """
        symbols = {symbol.name: symbol for symbol in self.dims.symbols}
        for name, size in sizes.items():
            if name not in symbols:
                hint = f"sizes of this UNet's calls: {', '.join(symbols)}"
                raise SpecError(f"there is no size {name!r} in a call", where="sizes", hint=hint)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise SpecError(f"{name} is {size!r}", where="sizes", hint="a whole number of at least 1")
        nominal = {name: sizes.get(name, symbol.nominal) for name, symbol in symbols.items()}
        for guard in self.guards:
            if not satisfied(guard, nominal):
                wanted = guard.condition if guard.outcome else f"not {guard.condition}"
                raise SpecError(f"this graph is for calls with {wanted}", where=guard.where, hint="choose other sizes")
        copied = self.copy()
        if sizes:
            changed = tuple(replace(symbol, nominal=nominal[name]) for name, symbol in symbols.items())
            copied.evaluate_at(probing(self.guards, changed, len(self.config.get("down_block_types", ()))))
        return copied
