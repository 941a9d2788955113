"""What a graph is: nodes, their values at two calls, weights, sizes, sites. Reading and evaluating, no editing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import nn

from ..errors import EditError, PathError, did_you_mean
from .cost import count_macs
from .decisions import Applied, Decisions
from .dims import Dims, Symbol
from .edits import Removed
from .evaluation import evaluate, infer, propagate
from .guards import Guard, raised
from .inputs import Input, example_of
from .liveness import ancestors
from .nodes import scope, values
from .sites import Site, changing_nodes, live_nodes, sites
from .weights import Shares, Weights


@dataclass
class GraphState:
    """The state of a graph: its nodes and their values, weights, sizes and sites. `sdgraph.Graph` adds editing.

    Leaves are PyTorch's own modules (`call_module`), everything else is functions and methods. Each node carries
    `meta["nn_module_stack"]` (the source modules it belongs to) and its value on the meta device at two calls:
    `meta["val"]` at the nominal sizes and in the source's dtype, `meta["probe"]` at the generic sizes and in another
    dtype. What is the same in both is fixed; what moves must stay symbolic.

    Args:
        fx: the nodes.
        weights: leaf modules and parameters under the source's names.
        inputs: the flat inputs, in the order of the placeholders.
        dims: the free sizes.
        dtype: of the source's parameters.
        device: of the source's parameters.
        config: the source's configuration.
        guards: what a call must satisfy for the graph to hold.
        classes: class name of every source module, by path.
        passes: what has been applied, and what it decided.
        removals: the modules that edits took out, in order; leaf modules until a `GraphUNet` runs the graph.
        frozen: it belongs to a `GraphUNet` and is not edited any more; a copy can be.
        source: the UNet it was traced from, without the numbers; see `sdgraph.runtime.retrace`.
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
    frozen: bool = False
    source: Any = field(default=None, repr=False)
    _sites: dict[str, Site] = field(default_factory=dict, repr=False)
    _decisions: Decisions = field(default_factory=Decisions, repr=False)
    _editor: str = field(default="", repr=False)  # the pass that is running, as text
    _meta: dict[tuple[str, str], nn.Module] = field(default_factory=dict, repr=False)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.fx.nodes)

    @property
    def output(self) -> torch.fx.Node:
        """The value the graph returns."""
        value = self.fx.output_node().args[0]
        assert isinstance(value, torch.fx.Node)
        return value

    @property
    def removed(self) -> dict[str, str]:
        """Paths of the regions that edits took out, each with the pass that did so."""
        return {r.path: r.by or "an edit outside of passes" for r in self.removals if r.module is None}

    def forget_removed_modules(self) -> None:
        """Free the weights of the leaf modules that edits took out; the record of removed regions stays."""
        self.removals = tuple(r for r in self.removals if r.module is None)

    def input(self, name: str) -> torch.fx.Node:
        """The placeholder of an input."""
        for node in self.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        names = [i.name for i in self.inputs]
        raise PathError(f"no input {name!r}", hint=did_you_mean(name, names) or f"inputs: {', '.join(names)}")

    def resolved_inputs(self) -> tuple[Input, ...]:
        """The inputs with the shapes of residuals filled in: that of what they are added to, None if that is gone, and
        "?" for a size that is no known expression of the call's."""
        resolved = []
        for spec in self.inputs:
            node = self.input(spec.name)
            if spec.shape is None and node.meta["val"] is not None:
                spec = replace(spec, shape=self.dims.expressions(*values(node)))
            resolved.append(spec)
        return tuple(resolved)

    def paths(self) -> list[str]:
        """Paths of all regions, in graph order."""
        return list(dict.fromkeys(p for n in self.fx.nodes for p in n.meta.get("nn_module_stack", {})))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name."""
        return dict(self.weights.named_parameters())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call at the nominal sizes (batch 1), products of attention included."""
        return sum(self.macs_of(node) for node in self.fx.nodes)

    def to_networkx(self) -> nx.DiGraph[str]:
        """Nodes by name with `op`, `target`, `scope` and `macs`; an edge from each value to each user."""
        net: nx.DiGraph[str] = nx.DiGraph()
        for node in self.fx.nodes:
            net.add_node(node.name, op=node.op, target=str(node.target), scope=scope(node), macs=self.macs_of(node))
            net.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return net

    def shape(self, node: torch.fx.Node) -> str:
        """Readable shape of a node's value in the call's symbols, e.g. `B×320×H/2×W/2`."""
        nominal, generic = values(node)
        if isinstance(nominal, torch.Tensor):
            return self.dims.shape(nominal, generic)
        if isinstance(nominal, tuple | list):
            return f"({', '.join(self.dims.shape(n, g) for n, g in zip(nominal, generic, strict=True))})"
        return "" if nominal is None else str(node.meta.get("size", nominal))

    def infer(self, node: torch.fx.Node) -> None:
        """Evaluate a node at both sizes, into its meta.

        Raises:
            ShapeError: the operation does not accept its inputs; nothing is stored.
        """
        infer(self, node)

    def probe_dtype(self, key: str) -> torch.dtype:
        """Floating dtype of an evaluation: the source's, or, for the probe, another one."""
        if key == "val":
            return self.dtype
        return torch.float16 if self.dtype is not torch.float16 else torch.float32

    def propagate(self, anew: bool = False) -> None:
        """Evaluate what edits have touched: new and rewired nodes, and whatever their new values reach.

        Args:
            anew: evaluate all nodes.
        Raises:
            ShapeError: at the first node whose inputs do not fit.
        """
        propagate(self, anew)

    def module(self, path: str) -> nn.Module:
        """The leaf module at a path."""
        found = self.weights.get(path)
        if not isinstance(found, nn.Module):
            raise PathError(f"no leaf module {path!r}", hint=did_you_mean(path, self.paths()))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer of a name."""
        found = self.weights.get(name)
        if not isinstance(found, torch.Tensor):
            raise PathError(f"no tensor {name!r}", hint=did_you_mean(name, self.parameters()))
        return found

    def add_module(self, path: str, module: nn.Module, shares: Shares | None = None) -> None:
        """Put a module at a path, replacing what is there: one of its own over the same weights. Those tied to weights
        added with the same `shares` stay tied."""
        self._put(path, (shares or Shares()).module(module))

    def add_tensor(
        self, name: str, tensor: torch.Tensor, shares: Shares | None = None, persistent: bool = True
    ) -> None:
        """Put a parameter or buffer at a name, over the same storage; a buffer may be left out of `state_dict`."""
        self._put(name, (shares or Shares()).tensor(tensor), persistent)

    def _put(self, path: str, value: nn.Module | torch.Tensor, persistent: bool = True) -> None:
        """Set a weight, and forget what was known of the one before."""
        self._check_editable()
        self.weights.put(path, value, persistent)
        for key in ("val", "probe"):
            if self._meta.pop((path, key), None) is not None:
                for node in self.fx.nodes:
                    if node.target == path:
                        node.meta.pop("evaluated", None)

    def free_name(self, stem: str) -> str:
        """A name no weight has: the stem, or the stem with a number."""
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

    def step_macs(self, stale: Collection[str] = ()) -> int:
        """Multiply-accumulates of a call at which the sites `stale` are inherited, at the nominal sizes."""
        return sum(self.macs_of(node) for node in live_nodes(self.fx, stale))

    def allowed(self, **sizes: int) -> dict[str, int]:
        """Sizes of a call, made as little larger as the graph requires: `allowed(B=2, H=9, W=8)`.

        Raises:
            EditError: there are none nearby.
        """
        return raised(self.guards, sizes)

    def probe_at(self, symbols: tuple[Symbol, ...]) -> None:
        """Evaluate the graph at other generic sizes."""
        self.dims = Dims(symbols)
        sizes = {symbol.name: symbol.generic for symbol in symbols}
        specs = {spec.name: spec for spec in self.inputs}
        for node in self.fx.nodes:
            if node.op == "placeholder" and specs[node.name].shape is not None:
                node.meta["probe"] = example_of(specs[node.name], sizes, self.probe_dtype("probe"))
        self.propagate(anew=True)

    def _check_editable(self) -> None:
        if self.frozen:
            raise EditError(
                "the graph belongs to a GraphUNet, which has compiled calls from it",
                hint="edit a copy, and build another: graph = unet.graph.copy(); ...; sdgraph.GraphUNet(graph)",
            )

    def details(self) -> tuple[object, ...]:
        """What the operations of the graph do not show: its modules' kinds and options, its sites and its guards."""
        paths = dict.fromkeys(str(node.target) for node in self.fx.nodes if node.op == "call_module")
        modules = tuple((path, type(self.module(path)), self.module(path).extra_repr()) for path in paths)
        return modules, tuple(self.sites.items()), self.guards

    def changing_nodes(self) -> set[torch.fx.Node]:
        """The nodes whose tensors depend on inputs that change from call to call of a generation."""
        return changing_nodes(self.fx, self.inputs)

    def ancestors(
        self, node: torch.fx.Node, stop: Callable[[torch.fx.Node], bool] = lambda _: False
    ) -> Iterator[torch.fx.Node]:
        """The node and all nodes that its value is computed from, depth first.

        Args:
            stop: says of a node that its own inputs are not followed.
        """
        return ancestors(node, stop)

    def macs_of(self, node: torch.fx.Node) -> int:
        """Multiply-accumulates of a node at the nominal sizes."""
        if "macs" not in node.meta:
            module = self.module(str(node.target)) if node.op == "call_module" else None
            node.meta["macs"] = count_macs(node, module, lambda: evaluate(self, node, "val"))
        return int(node.meta["macs"])
