"""The graph that passes edit: one flat fx graph, its weights, its inputs and its sizes."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import nn

from .decisions import Applied, Decisions
from .dims import Dims, Symbol
from .errors import EditError, PathError, SdgraphError, ShapeError, did_you_mean
from .guards import check_condition, probing, raised
from .inherit import Site, changing_nodes, inherit, needed, sites
from .inputs import Input, example_of
from .region import Region
from .schedules import Run, Schedule
from .trace import Guard, Tracer, called, residual_like, scope, tracing, values
from .weights import Shares, Weights, meta_like, on_meta

if TYPE_CHECKING:
    from .timetable import Timetable


SIGNS: Mapping[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
}


@dataclass
class Graph:
    """A traced model: nodes, weights, and what is known of its sizes.

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
        removed: module paths that are gone, with the spec of the pass that removed each.
        frozen: it belongs to a `GraphUNet` and is not edited any more; a copy can be.
        dropped: convolutions that passes of this `apply` removed, by the path they had: material for later passes.
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
    removed: dict[str, str] = field(default_factory=dict)
    frozen: bool = False
    dropped: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _sites: dict[str, Site] = field(default_factory=dict, repr=False)
    _decisions: Decisions = field(default_factory=Decisions, repr=False)
    _meta: dict[tuple[str, str], nn.Module] = field(default_factory=dict, repr=False)

    # -- reading -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from .text import text

        return text(self)

    def text(self, depth: int = 3, within: str = "") -> str:
        """Readable form: one line per region down to `depth` levels of nesting (2: blocks, 3: layers, 4: units), or
        the single operations of the region `within`."""
        from .text import text

        return text(self, depth, within)

    def picture(self, path: str | os.PathLike[str], before: Graph | None = None) -> None:
        """Draw the UNet to an SVG or PNG file; with `before`, what was removed and what was changed since is marked."""
        from .picture import picture

        picture(self, path, before)

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.fx.nodes)

    @property
    def output(self) -> torch.fx.Node:
        """The value the graph returns."""
        value = self.fx.output_node().args[0]
        assert isinstance(value, torch.fx.Node)
        return value

    def input(self, name: str) -> torch.fx.Node:
        """The placeholder of an input."""
        for node in self.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        names = [i.name for i in self.inputs]
        raise PathError(f"no input {name!r}", cure=did_you_mean(name, names) or f"inputs: {', '.join(names)}")

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

    def region(self, path: str) -> Region:
        """The nodes under a module path.

        Raises:
            PathError: naming the nearest paths, or the pass that removed it.
        """
        nodes = [n for n in self.fx.nodes if path in n.meta.get("nn_module_stack", {})]
        if nodes:
            return Region(self, path, tuple(nodes))
        gone = next((p for p in (path, *_above(path)) if p in self.removed), None)
        if gone is not None:
            raise PathError(
                f"{path!r} is no longer in the graph", where=gone, cure=f"it was removed by {self.removed[gone]}"
            )
        cure = did_you_mean(path, self.paths()) or "print(graph) lists the paths"
        raise PathError(f"no module {path!r} in the graph", where=path, cure=cure)

    def regions(self) -> dict[str, Region]:
        """All regions by path, in graph order, outer before inner."""
        found: dict[str, list[torch.fx.Node]] = {}
        for node in self.fx.nodes:
            for path in node.meta.get("nn_module_stack", {}):
                found.setdefault(path, []).append(node)
        return {path: Region(self, path, tuple(nodes)) for path, nodes in found.items()}

    def paths(self) -> list[str]:
        """Paths of all regions, in graph order."""
        return list(dict.fromkeys(p for n in self.fx.nodes for p in n.meta.get("nn_module_stack", {})))

    def matching(self, patterns: str | Iterable[str]) -> list[str]:
        """Paths of the regions that patterns name, in graph order.

        `*` stands for anything within a name, `**` for anything; a negative number counts from the last of its
        siblings that are there; `{a,b}` is either: `up_blocks.-1.{resnets,attentions}.*`.

        Raises:
            PathError: a pattern that names nothing; with the nearest paths.
        """
        known = self.paths()
        found: set[str] = set()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            either = [_counted(each, known) for each in _expanded(pattern)]
            if len(either) == 1 and "*" not in either[0]:
                found.add(self.region(either[0]).path)
                continue
            regex = re.compile("|".join(_regex(each) for each in either))
            matched = [path for path in known if regex.fullmatch(path)]
            if not matched:
                cure = did_you_mean(pattern, known) or "print(graph) lists the paths"
                raise PathError(f"no module matches {pattern!r}", where=pattern, cure=cure)
            found.update(matched)
        return sorted(found, key=known.index)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name."""
        return dict(self.weights.named_parameters())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call at the nominal sizes (batch 1), products of attention included."""
        from .cost import macs

        return sum(macs(self, node) for node in self.fx.nodes)

    def to_networkx(self) -> nx.DiGraph[str]:
        """Nodes by name with `op`, `target`, `scope` and `macs`; an edge from each value to each user."""
        from .cost import macs

        net: nx.DiGraph[str] = nx.DiGraph()
        for node in self.fx.nodes:
            net.add_node(node.name, op=node.op, target=str(node.target), scope=scope(node), macs=macs(self, node))
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

    # -- evaluation at the two sizes -----------------------------------------------------------------------------

    def infer(self, node: torch.fx.Node) -> None:
        """Evaluate a node at both sizes, into its meta.

        Raises:
            ShapeError: the operation does not accept its inputs; nothing is stored.
        """
        node.meta.pop("macs", None)
        node.meta["asked"] = _question(node)
        for key in ("val", "probe"):
            try:
                node.meta[key] = self._evaluate(node, key)
            except SdgraphError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{n.name}: {self.shape(n)}" for n in node.all_input_nodes)
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ShapeError(
                    f"{called(node)} cannot take {shapes or 'its arguments'}: {reason}",
                    where=f"{scope(node) or '(top level)'}, node {node.name}",
                    cure="the shapes on both sides must agree at every size of the call",
                ) from error
        nominal, generic = values(node)
        if isinstance(nominal, int | float) and not isinstance(nominal, bool):
            node.meta["size"] = self._size(node, nominal, generic)

    def _evaluate(self, node: torch.fx.Node, key: str) -> Any:
        args = torch.fx.map_arg(node.args, lambda n: n.meta[key])
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: n.meta[key])
        with torch.no_grad():
            if node.op == "call_module":
                return self._meta_module(str(node.target), key).forward(*args, **kwargs)
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            if node.op == "get_attr":
                return meta_like(self.tensor(str(node.target)), self.probe_dtype(key))
        raise EditError(f"a {node.op} node cannot be evaluated", where=node.name)

    def _size(self, node: torch.fx.Node, nominal: Any, generic: Any) -> str | None:
        """A number in the call's symbols: sizes are recognised, arithmetic is composed."""
        if node.op == "call_method":
            return self.dims.name(nominal, generic)
        sides = [a.meta.get("size") if isinstance(a, torch.fx.Node) else repr(a) for a in node.args]
        if node.target not in SIGNS or None in sides:
            return None
        return f"({sides[0]} {SIGNS[node.target]} {sides[1]})"

    def probe_dtype(self, key: str) -> torch.dtype:
        """Floating dtype of an evaluation: the source's, or, for the probe, another one."""
        if key == "val":
            return self.dtype
        return torch.float16 if self.dtype is not torch.float16 else torch.float32

    def _meta_module(self, path: str, key: str) -> nn.Module:
        if (path, key) not in self._meta:
            self._meta[path, key] = on_meta(self.module(path), self.probe_dtype(key))
        return self._meta[path, key]

    def propagate(self) -> None:
        """Evaluate what edits have touched: new and rewired nodes, and whatever their new values reach.

        Raises:
            ShapeError: at the first node whose inputs do not fit.
        """
        changed: set[torch.fx.Node] = set()
        residuals = {i.name for i in self.inputs if i.shape is None}
        shaped: set[torch.fx.Node] = set()
        for node in self.fx.nodes:
            if node.op in ("placeholder", "output"):
                continue
            for arg in node.all_input_nodes:
                if arg.op == "placeholder" and arg.name in residuals and arg not in shaped:
                    # anew, for what it is added to may have changed
                    other = next(n for n in node.all_input_nodes if n is not arg)
                    shaped.add(arg)
                    if arg.meta["val"] is None or _signature(arg) != _signature(other):
                        changed.add(arg)
                    residual_like(arg, other)
            if node.meta.get("asked") == _question(node) and changed.isdisjoint(node.all_input_nodes):
                continue
            before = _signature(node) if "val" in node.meta else None
            self.infer(node)
            if before != _signature(node):
                changed.add(node)

    def follow_weights(self) -> None:
        """Take over the dtype and device that the weights have been moved to since the trace."""
        self._check_editable()
        weight = next(iter(self.parameters().values()), None)
        if weight is None or (weight.dtype, weight.device) == (self.dtype, self.device):
            return
        self.dtype, self.device = weight.dtype, weight.device
        for node in self.fx.nodes:
            if node.op == "placeholder" and node.meta["val"] is not None and node.meta["val"].is_floating_point():
                for key in ("val", "probe"):
                    node.meta[key] = node.meta[key].to(self.probe_dtype(key))
        self._meta.clear()
        for node in self.fx.nodes:
            node.meta.pop("asked", None)
        self.propagate()

    # -- weights -------------------------------------------------------------------------------------------------

    def module(self, path: str) -> nn.Module:
        """The leaf module at a path."""
        found = self.weights.get(path)
        if not isinstance(found, nn.Module):
            raise PathError(f"no leaf module {path!r}", cure=did_you_mean(path, self.paths()))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer of a name."""
        found = self.weights.get(name)
        if not isinstance(found, torch.Tensor):
            raise PathError(f"no tensor {name!r}", cure=did_you_mean(name, self.parameters()))
        return found

    def add_module(self, path: str, module: nn.Module, shares: Shares | None = None) -> None:
        """Put a module at a path, replacing what is there: one of its own over the same weights. Those tied to weights
        added with the same `shares` stay tied."""
        self._put(path, (shares or Shares()).module(module))

    def add_tensor(self, name: str, tensor: torch.Tensor, shares: Shares | None = None) -> None:
        """Put a parameter or buffer at a name, over the same storage."""
        self._put(name, (shares or Shares()).tensor(tensor))

    def _put(self, path: str, value: nn.Module | torch.Tensor) -> None:
        """Set a weight, and forget what was known of the one before."""
        self._check_editable()
        self.weights.put(path, value)
        for key in ("val", "probe"):
            if self._meta.pop((path, key), None) is not None:
                for node in self.fx.nodes:
                    if node.target == path:
                        node.meta.pop("asked", None)

    def free_name(self, stem: str) -> str:
        """A name no weight has: the stem, or the stem with a number."""
        name, count = stem, 0
        while self.weights.get(name) is not None:
            count += 1
            name = f"{stem}_{count}"
        return name

    # -- editing -------------------------------------------------------------------------------------------------

    def insert(
        self,
        code: Callable[..., Any] | nn.Module,
        *args: Any,
        before: torch.fx.Node | None = None,
        path: str = "",
        leaving: Iterable[torch.fx.Node] = (),
    ) -> Any:
        """Trace ordinary PyTorch code into the graph.

        Args:
            code: a function, or a module, which is registered at `path` with its parameters.
            args: its arguments: nodes of the graph stand for their values, anything else is passed as it is.
            before: the node the new ones come before; by default the earliest place where all arguments exist.
            path: the scope of the new nodes; for a module, also where it is registered.
            leaving: nodes that will be removed, so that new weights may take the names of theirs.
        Returns:
            the node (or tuple of nodes) of what the code returns.
        Raises:
            TraceError, ShapeError: the code cannot be traced; the graph is unchanged.
        """
        self._check_editable()
        given = [a for a in args if isinstance(a, torch.fx.Node)]
        if isinstance(code, nn.Module) and not path:
            raise EditError("a module is inserted without a path", cure="pass path=, where it is registered")
        order = {node: i for i, node in enumerate(self.fx.nodes)}
        anchor = before
        if anchor is None:
            last = max((n for n in given), key=lambda n: order[n], default=None)
            anchor = last.next if last is not None and last.op != "placeholder" else self._first_operation()
        tracer = Tracer(self, code if isinstance(code, nn.Module) else None, prefix=path, leaving=leaving)
        tracer.module_stack = self._stack(path.rpartition(".")[0] if isinstance(code, nn.Module) else path)
        known = set(self.fx.nodes)
        try:
            with self.fx.inserting_before(anchor), tracing(tracer):
                result = code(*[tracer.proxy(a) if isinstance(a, torch.fx.Node) else a for a in args])
                made = tracer.create_arg(result)
        except BaseException:
            for node in reversed([n for n in self.fx.nodes if n not in known]):
                self.fx.erase_node(node)
            for name, held in reversed(tracer.displaced.items()):
                if held is not None:
                    self._put(name, held)
            self._drop_unused_weights()
            raise
        self.guards = tuple(dict.fromkeys((*self.guards, *tracer.guards)))
        return made

    def insert_after(
        self, node: torch.fx.Node, code: Callable[..., Any] | nn.Module, *args: Any, path: str = ""
    ) -> torch.fx.Node:
        """Trace `code(node, *args)` in, and let every earlier user of `node` take its result.

        Returns:
            the new value.
        Raises:
            ShapeError: it does not have the shape and dtype of `node`.
        """
        users = list(node.users)
        made = self.insert(code, node, *args, path=path or scope(node))
        self._same_shape(node, made, path or scope(node))
        for user in users:
            user.replace_input_with(node, made)
        return made  # type: ignore[no-any-return]

    def replace(self, region: Region | str, code: Callable[..., Any] | nn.Module) -> torch.fx.Node:
        """Put PyTorch code in the place of a region with one output.

        Args:
            code: called with the region's tensor inputs, in graph order (`region.inputs`).
        Returns:
            the new output.
        Raises:
            EditError: the region has several outputs, or sites of feature inheritance.
            ShapeError: the new value does not have the old one's shape.
        """
        region = self.region(region) if isinstance(region, str) else region
        self._keep_sites(region)
        old = region.output
        new = self.insert(code, *region.inputs, before=old.next, path=region.path, leaving=region.nodes)
        self._same_shape(old, new, region.path)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._leave(region)
        return new  # type: ignore[no-any-return]

    def bypass(self, region: Region | str) -> None:
        """Take a region out, so that the main flow goes past it.

        The value that takes an output's place is, in this order: the other side of the residual addition it only feeds
        (attention and feed-forward units); the main flow before the concatenation that feeds it, if the channels agree
        (an up layer goes together with its skip); the region's main input, if the channels agree; a resnet's own 1x1
        shortcut. Shapes are checked by `propagate`, so that several regions can go together.

        Raises:
            EditError: the region has sites of feature inheritance.
            ShapeError: nothing fits; with the two shapes.
        """
        self._check_editable()
        region = self.region(region) if isinstance(region, str) else region
        self._keep_sites(region)
        for output in region.outputs:
            old, new = region.stand_in(output)
            old.replace_all_uses_with(new)
        self._leave(region)

    def rewire(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Let every user of `old` take `new`, which must have the same shape at every size."""
        self._check_editable()
        self._same_shape(old, new, scope(old))
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def erase(self, node: torch.fx.Node) -> None:
        """Remove a node nobody uses."""
        self._check_editable()
        if node.users:
            names = ", ".join(n.name for n in node.users)
            raise EditError(f"{node.name} is used by {names}", where=scope(node), cure="rewire its users first")
        self.fx.erase_node(node)

    def add_parameter(self, name: str, tensor: torch.Tensor, before: torch.fx.Node | None = None) -> torch.fx.Node:
        """A new trainable parameter, and the node that reads it."""
        if self.weights.get(name) is not None:
            raise EditError(f"there is a weight {name!r} already", cure="choose another name")
        self.add_tensor(name, nn.Parameter(tensor))
        with self.fx.inserting_before(before or self._first_operation()):
            node = self.fx.get_attr(name)
        node.meta["nn_module_stack"] = self._stack(name.rpartition(".")[0])
        self.infer(node)
        return node

    def inherit(
        self, node: torch.fx.Node, name: str, schedule: Schedule, forecast: int = 0, path: str = ""
    ) -> torch.fx.Node:
        """Let calls take over the value of `node` from earlier ones, under the name `name`, except those at which
        `schedule` refreshes it; see `sdgraph.inherit.Site`.

        Args:
            path: the scope of the new node; by default that of the value.
        Returns:
            the node that all earlier users of `node` now take.
        """
        self._check_editable()
        if name in sites(self.fx):
            raise EditError(f"there is a site {name!r} already", where=scope(node), cure="name it otherwise")
        if not isinstance(node.meta["val"], torch.Tensor):
            raise EditError(f"{node.name} is no tensor", where=scope(node), cure="inherit a tensor")
        after = node if node.op != "placeholder" else self._first_operation().prev
        with self.fx.inserting_after(after):
            made = self.fx.call_function(inherit, (node, name))
        made.meta["nn_module_stack"] = self._stack(path) if path else dict(node.meta.get("nn_module_stack", {}))
        self.infer(made)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self._sites[name] = Site(schedule, forecast)
        return made

    def reschedule(self, name: str, schedule: Schedule) -> None:
        """Give a site another schedule."""
        self._check_editable()
        if name not in self.sites:
            raise PathError(f"no site {name!r}", cure=did_you_mean(name, self.sites) or f"sites: {list(self.sites)}")
        self._sites[name] = replace(self._sites[name], schedule=schedule)

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of feature inheritance by name, in graph order."""
        changing = changing_nodes(self.fx, self.inputs) if self._sites else set()
        return {n: replace(self._sites[n], invariant=node not in changing) for n, node in sites(self.fx).items()}

    def timetable(self, calls: int | Sequence[float] | torch.Tensor) -> Timetable:
        """What each call of a generation refreshes, inherits and costs.

        Args:
            calls: how many, or their timesteps: `scheduler.timesteps`.
        Raises:
            ScheduleError: a schedule does not fit.
        """
        from .timetable import timetable

        return timetable(self, Run.of(calls))

    def step_macs(self, stale: Collection[str] = ()) -> int:
        """Multiply-accumulates of a call at which the sites `stale` are inherited, at the nominal sizes."""
        from .cost import macs

        return sum(macs(self, node) for node in needed(self.fx, stale))

    def require(self, condition: str, because: str = "") -> None:
        """Serve only calls whose sizes satisfy a condition; others are refused, here and in what is exported.

        Call it before inserting code that needs it: the sizes at which the graph is evaluated are moved to such ones.

        Args:
            condition: a comparison of sizes of the call: batch `B`, height `H` and width `W` of the latents, length
                `L` of the text; such as `H % 2 == 0`.
            because: the reason, for those whose call is refused.
        Raises:
            SpecError: it is no comparison of sizes.
            EditError: it contradicts what the graph requires already, or the model's own size.
        """
        names = [symbol.name for symbol in self.dims.symbols]
        check_condition(condition, names)
        guards = tuple(dict.fromkeys((*self.guards, Guard(condition, True, because))))
        symbols = probing(guards, self.dims.symbols, len(self.config.get("down_block_types", ())))
        self.guards = guards
        if symbols != self.dims.symbols:
            self.probe_at(symbols)

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
            node.meta.pop("asked", None)
            if node.op == "placeholder" and specs[node.name].shape is not None:
                node.meta["probe"] = example_of(specs[node.name], sizes, self.probe_dtype("probe"))
        self.propagate()

    def decide(self, about: str, code: Callable[..., Any], *args: Any) -> Any:
        """What `code(*args)` says, recorded with the pass: for what a pass decides by the numbers of weights.

        A saved UNet is loaded by running its passes again on the shapes of weights; there the recorded answer is given
        instead. Weights that are made of weights need no decision: PyTorch works out their shapes, and their numbers
        are saved.

        Args:
            about: what is decided, such as a module path; the report names it.
            code: returns numbers, text, or lists and dicts of them: `tensor.item()`, `tensor.tolist()`.
        Returns:
            what it returned, as it comes back from a file: tuples are lists.
        Raises:
            DecisionError: it cannot be recorded; or what was recorded is about something else.
        """
        return self._decisions.decide(str(about), lambda: code(*args))

    def sweep(self) -> None:
        """Remove what no longer reaches the output: nodes (inputs stay), then modules and tensors."""
        self._check_editable()
        for node in reversed(self.fx.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.fx.erase_node(node)
        self._drop_unused_weights()

    def copy(self) -> Graph:
        """A graph of its own over the same weights' storage."""
        weights, shares = Weights(), Shares()
        for path in {str(n.target): None for n in self.fx.nodes if n.op in ("call_module", "get_attr")}:
            held = self.weights.get(path)
            weights.put(path, shares.module(held) if isinstance(held, nn.Module) else shares.tensor(held))
        nodes = torch.fx.Graph()
        done: dict[torch.fx.Node, torch.fx.Node] = {}
        result = nodes.graph_copy(self.fx, done)
        output = nodes.output(result)
        output.meta = dict(self.fx.output_node().meta)
        return replace(
            self,
            fx=nodes,
            weights=weights,
            frozen=False,
            classes=dict(self.classes),
            removed=dict(self.removed),
            dropped=dict(self.dropped),
            _sites=dict(self._sites),
            _meta=dict(self._meta),
        )

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_editable(self) -> None:
        if self.frozen:
            raise EditError(
                "the graph belongs to a GraphUNet, which has compiled calls from it",
                cure="edit a copy, and build another: graph = unet.graph.copy(); ...; sdgraph.GraphUNet(graph)",
            )

    def _keep_sites(self, region: Region) -> None:
        """Sites would vanish with their region, and nobody would know."""
        for name, node in sites(self.fx).items():
            if node in region.nodes:
                raise EditError(
                    f"{region.path} has the site {name!r}", where=region.path,
                    cure="remove and replace modules before features are inherited",
                )  # fmt: skip

    def _leave(self, region: Region) -> None:
        """Sweep; what stays of a region that is gone, because others asked for the same size, goes to its source."""
        self.sweep()
        for node in region.nodes:
            if not node._erased and not isinstance(node.meta["val"], torch.Tensor) and len(node.all_input_nodes) == 1:
                source = node.all_input_nodes[0]
                if source not in region.nodes:
                    node.meta["nn_module_stack"] = dict(source.meta.get("nn_module_stack", {}))

    def _drop_unused_weights(self) -> None:
        used = {str(n.target) for n in self.fx.nodes if n.op in ("call_module", "get_attr")}
        for path, module in self.weights.named_modules():
            if isinstance(module, nn.Conv2d) and path not in used:
                self.dropped.setdefault(path, Shares().module(module))
        self.weights.keep_only(used)

    def _first_operation(self) -> torch.fx.Node:
        return next(n for n in self.nodes if n.op != "placeholder")

    def _stack(self, path: str) -> dict[str, Any]:
        """The module stack of a path: that of a node already there, or one made from its parts."""
        for node in self.fx.nodes:
            stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
            if path in stack:
                return {p: stack[p] for p in list(stack)[: list(stack).index(path) + 1]}
        above = [p for p in reversed(list(_above(path))) if p in self.classes]
        return {p: (p, self.classes.get(p, "")) for p in (*above, path) if p}

    def _same_shape(self, old: torch.fx.Node, new: Any, path: str) -> None:
        if not isinstance(new, torch.fx.Node) or not isinstance(new.meta["val"], torch.Tensor):
            raise EditError("the code must return one tensor", where=path, cure="return the new value alone")
        for before, after in zip(values(old), values(new), strict=True):
            if before.shape != after.shape or before.dtype != after.dtype:
                one, two = f"{self.shape(new)} {after.dtype}", f"{self.shape(old)} {before.dtype}"
                raise ShapeError(
                    f"the new value is {one}, the old one is {two}",
                    where=path,
                    cure="return a tensor of the old shape and dtype, at every size and model dtype",
                )


def _expanded(pattern: str) -> list[str]:
    """The pattern for each choice of what its braces hold."""
    before, brace, rest = pattern.partition("{")
    inner, _, after = rest.partition("}")
    return [each for choice in inner.split(",") for each in _expanded(before + choice + after)] if brace else [pattern]


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*?)", pattern)
    return "".join({"*": r"[^.]*", "**": r".*"}.get(part, re.escape(part)) for part in parts)


def _counted(pattern: str, known: Sequence[str]) -> str:
    """The pattern with its negative numbers replaced; as it is where there are too few siblings."""
    names = pattern.split(".")
    for i, name in enumerate(names):
        if re.fullmatch(r"-\d+", name):
            above = ".".join(names[:i])
            siblings = dict.fromkeys(
                path.split(".")[i] for path in known if path.startswith(f"{above}.") and path.count(".") >= i
            )
            there = sorted(map(int, filter(str.isdigit, siblings)))
            if -int(name) <= len(there):
                names[i] = str(there[int(name)])
    return ".".join(names)


def _question(node: torch.fx.Node) -> tuple[Any, ...]:
    """What is evaluated: as long as this and the inputs' values stay, so does the value."""
    return node.op, node.target, repr(node.args), repr(node.kwargs)


def _signature(node: torch.fx.Node) -> list[Any]:
    """What a node's two values look like from outside."""
    flat: list[Any] = []
    for value in values(node):
        for item in value if isinstance(value, tuple | list) else (value,):
            flat.append((item.shape, item.dtype) if isinstance(item, torch.Tensor) else item)
    return flat


def _above(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
