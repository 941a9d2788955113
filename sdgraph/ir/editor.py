"""Edits of a graph: inserting code, replacing and removing regions, removing unused nodes and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from ..errors import EditError, PathError, SdgraphError, ShapeError, TraceError, did_you_mean
from ..options import checked
from ..schedules import Schedule
from .edits import Removed
from .guards import Guard, check_condition, probing
from .nodes import called, eliminate_dead_code, scope, values, weights_read
from .read_only import also_read_only
from .regions import Region, above, matching, region_at, regions_of
from .sites import Site, bypass, sites
from .state import GraphState
from .tracer import Tracer, tracing
from .weights import Shares, described


class EditableGraph(GraphState):
    """A graph whose regions can be found and edited. `sdgraph.Graph` adds views, and sites with their timetable."""

    @checked(PathError)
    def region(self, path: str) -> Region:
        """Return the nodes under a module path.

        Raises:
            PathError: there are none; the error names the nearest paths, or the pass that removed the region.
        """
        return region_at(self, path)

    def regions(self) -> dict[str, Region]:
        """Return all regions by path, in graph order, outer before inner."""
        return regions_of(self)

    @checked(PathError)
    def matching(self, patterns: str | Iterable[str]) -> list[str]:
        """Return the paths of the regions that patterns name, in graph order.

        `*` stands for any text without a dot and `**` for any text. A negative number counts from the last sibling that
        is in the graph. `{a,b}` stands for `a` or `b`.

        Raises:
            PathError: a pattern names nothing; the error names the nearest paths.
        Example:
            `graph.matching("up_blocks.-1.{resnets,attentions}.*")`
        """
        return matching(patterns, self.paths(), self.region)

    @checked(EditError)
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
            args: the arguments of `code`. A node of the graph stands for its value; anything else is passed as it is.
            before: the node that the new nodes come before; by default the earliest place where all arguments exist.
            path: the scope of the new nodes; for a module, also the path at which it is registered.
            leaving: nodes that will be removed, so that new weights may take the names of their weights.
        Returns:
            The node of the value that the code returns, or a tuple of nodes.
        Raises:
            EditError: a module is inserted without a path.
            TraceError, ShapeError: the code cannot be traced; the graph is unchanged.
        """
        self._check_editable()
        self._check_own(*(arg for arg in (*args, before) if isinstance(arg, torch.fx.Node)))
        return insert(self, code, args, before, path, leaving)

    @checked(EditError)
    def insert_after(
        self, node: torch.fx.Node, code: Callable[..., Any] | nn.Module, *args: Any, path: str = ""
    ) -> torch.fx.Node:
        """Trace `code(node, *args)` into the graph and give its result to every earlier user of `node`.

        Returns:
            The node of the result.
        Raises:
            ShapeError: the result does not have the shape and dtype of `node`.
        """
        self._check_own(node)
        users = list(node.users)
        result = self.insert(code, node, *args, path=path or scope(node))
        check_same_shape(self, node, result, path or scope(node))
        for user in users:
            user.replace_input_with(node, result)
        return result  # type: ignore[no-any-return]

    @checked(EditError)
    def replace(self, region: Region | str, code: Callable[..., Any] | nn.Module) -> torch.fx.Node:
        """Replace a region that has one output by PyTorch code.

        Args:
            region: the region, or its path.
            code: a function or module, which is called with the region's tensor inputs in graph order
                (`region.inputs`).
        Returns:
            The node of the new output.
        Raises:
            EditError: the region has several outputs, or sites of feature inheritance.
            ShapeError: the new output does not have the shape and dtype of the old one.
        """
        region = self._own_region(region)
        self._keep_sites(region)
        old = region.output
        new = self.insert(code, *region.inputs, before=old.next, path=region.path, leaving=region.nodes)
        check_same_shape(self, old, new, region.path)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._leave(region)
        return new  # type: ignore[no-any-return]

    @checked(EditError)
    def bypass(self, region: Region | str, schedule: Schedule | None = None) -> tuple[str, ...]:
        """Remove a region, so that the main flow goes past it; with a schedule, only at the calls it does not name.

        An output of the region is replaced by the first of these values that fits:

        1. the other side of the residual addition that is its only user (attention and feed-forward units);
        2. the main flow before the concatenation that feeds the region, if the channels agree (an up layer is removed
           together with its skip connection);
        3. the region's main input, if the channels agree;
        4. the result of a resnet's own 1x1 shortcut.

        Shapes are checked by `propagate`, so that several regions can be removed together. The removal is recorded in
        `removals`.

        Args:
            region: the region, or its path.
            schedule: the calls at which the region is computed; at the others it is bypassed. By default it is removed.
        Returns:
            The names of the new sites, one for each output of the region; without a schedule there are none.
        Raises:
            EditError: the region is to be removed and has sites, or it is a site already.
            ShapeError: no value fits; the error names the two shapes.
        """
        self._check_editable()
        region = self._own_region(region)
        if schedule is None:
            self._keep_sites(region)
            for output in region.outputs:
                old, new = region.stand_in(output)
                old.replace_all_uses_with(new)
            self.removals += (Removed(region.path, self._editor),)
            self._leave(region)
            return ()
        names = tuple(f"{region.path}[{i}]" if i else region.path for i in range(len(region.outputs)))
        for name, output in zip(names, region.outputs, strict=True):
            self._bypass_by_call(*region.stand_in(output), name, schedule)
        return names

    def _bypass_by_call(self, value: torch.fx.Node, instead: torch.fx.Node, name: str, schedule: Schedule) -> None:
        if name in sites(self.fx):
            raise EditError(f"there is a site {name!r} already", where=scope(value), hint="bypass another module")
        check_same_shape(self, value, instead, name)
        made = Site(schedule, bypassed=True)  # before the graph is edited
        with self.fx.inserting_after(value):
            site = self.fx.call_function(bypass, (value, instead, name))
        site.meta["nn_module_stack"] = dict(value.meta.get("nn_module_stack", {}))
        self.infer(site)
        value.replace_all_uses_with(site, delete_user_cb=lambda user: user is not site)
        self._sites[name] = made

    @checked(EditError)
    def rewire(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Give `new` to every user of `old`.

        Raises:
            ShapeError: the two do not have the same shape and dtype at every size.
        """
        self._check_editable()
        self._check_own(old, new)
        check_same_shape(self, old, new, scope(old))
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    @checked(EditError)
    def share(self, node: torch.fx.Node, path: str) -> None:
        """Let a node use the weights at another path. Its own are removed with the dead code, if nothing uses them.

        Args:
            node: a node that calls a leaf module or reads a tensor.
            path: another leaf module of the same class and options, or another tensor of the same shape.
        Raises:
            PathError: there are no such weights.
            ShapeError: the weights differ in more than their values; the error names both.
        """
        self._check_editable()
        self._check_own(node)
        if self.weights.get(str(node.target)) is None:
            raise EditError(f"{node.name} uses no weights", where=scope(node), hint="name a node of a leaf module")
        own, other = str(node.target), self.weights.get(path)
        if other is None:
            raise PathError(f"no weights {path!r}", hint=did_you_mean(path, self.parameters()))
        kinds = [described(self.weights.get(own)), described(other)]
        if kinds[0] != kinds[1]:
            raise ShapeError(
                f"{own} is {kinds[0]}, and {path} is {kinds[1]}",
                where=own,
                hint="only weights of the same shape can be shared",
            )
        node.target = path
        self.infer(node)

    @checked(EditError)
    def take_weights(self, regions: str | Iterable[str], other: GraphState) -> tuple[str, ...]:
        """Take the weights of regions from another graph, over the same storage.

        The regions must be the same in both graphs but for the values of their weights.

        Args:
            regions: paths or patterns, see `matching`.
            other: the graph to take from, which stays as it is.
        Returns:
            The names of the weights: leaf modules and tensors.
        Raises:
            PathError: there is no such region in one of the graphs.
            EditError: a region is not the same in both, or shares its weights with another one; or dtype or device of
                the weights differ.
            ShapeError: the weights differ in more than their values.
        Example:
            `graph.take_weights(["mid_block", "up_blocks.*"], tuned.graph)`
        """
        self._check_editable()
        return take_weights(self, self.matching(regions), other)

    @checked(EditError)
    def erase(self, node: torch.fx.Node) -> None:
        """Remove a node that has no users.

        Raises:
            EditError: the node has users.
        """
        self._check_editable()
        self._check_own(node)
        if node.users:
            names = ", ".join(n.name for n in node.users)
            raise EditError(f"{node.name} is used by {names}", where=scope(node), hint="rewire its users first")
        self.fx.erase_node(node)

    @checked(EditError)
    def add_parameter(self, name: str, tensor: torch.Tensor, before: torch.fx.Node | None = None) -> torch.fx.Node:
        """Add a trainable parameter.

        Args:
            name: its name among the weights.
            tensor: its initial value; the storage is shared.
            before: the node that the new node comes before; by default the first operation.
        Returns:
            The node that reads the parameter.
        Raises:
            EditError: there is a weight of this name.
        """
        self._check_editable()
        if self.weights.get(name) is not None:
            raise EditError(f"there is a weight {name!r} already", hint="choose another name")
        if not tensor.is_floating_point():
            raise EditError(f"{name} is a tensor of {tensor.dtype}", where=name, hint="parameters are floating-point")
        self.add_tensor(name, nn.Parameter(tensor))
        with self.fx.inserting_before(before or first_operation(self)):
            node = self.fx.get_attr(name)
        node.meta["nn_module_stack"] = module_stack(self, name.rpartition(".")[0])
        self.infer(node)
        return node

    @checked(EditError)
    def require(self, condition: str, because: str = "") -> None:
        """Refuse calls whose sizes do not satisfy a condition, here and in exported models.

        Call this before inserting code that needs the condition: the sizes at which the graph is evaluated are moved
        to sizes that satisfy it.

        Args:
            condition: a comparison of sizes of the call: batch `B`, height `H` and width `W` of the latents, length
                `L` of the text.
            because: the reason, which the error for a refused call gives.
        Raises:
            SpecError: the condition is no comparison of sizes.
            EditError: the condition contradicts an earlier one, or the model's own size.
        Example:
            `graph.require("H % 2 == 0", "the windows are two rows high")`
        """
        names = [symbol.name for symbol in self.dims.symbols]
        check_condition(condition, names)
        if any(guard.condition == condition and guard.outcome for guard in self.guards):
            return
        guards = tuple(dict.fromkeys((*self.guards, Guard(condition, True, because))))
        symbols = probing(guards, self.dims.symbols, len(self.config.get("down_block_types", ())))
        self.guards = guards
        if symbols != self.dims.symbols:
            self.evaluate_at(symbols)

    def eliminate_dead_code(self) -> None:
        """Remove nodes that the output does not depend on, except inputs, and then unused weights.

        Leaf modules that go are recorded in `removals`.
        """
        self._check_editable()
        eliminate_dead_code(self.fx)
        used = weights_read(self.fx.nodes)
        recorded = {removed.path for removed in self.removals if removed.module is not None}
        self.removals += tuple(
            Removed(path, self._editor, Shares().module(module))
            for path, module in self.weights.leaves()
            if path not in used and path not in recorded
        )
        self.weights.keep_only(used)

    def _own_region(self, region: Region | str) -> Region:
        if isinstance(region, str):
            return self.region(region)
        self._check_own(*region.nodes)
        return region

    def _check_own(self, *nodes: torch.fx.Node) -> None:
        """Refuse nodes of another graph, such as the one that this graph is a copy of."""
        for node in nodes:
            if node.graph is not self.fx:
                raise EditError(
                    f"{node.name} is a node of another graph",
                    where=scope(node),
                    hint="find it in this graph: a copy has nodes of its own",
                )

    def _keep_sites(self, region: Region) -> None:
        """Refuse a region with sites, which would vanish with it unnoticed."""
        for name, node in sites(self.fx).items():
            if node in region.nodes:
                raise EditError(
                    f"{region.path} has the site {name!r}", where=region.path,
                    hint="remove and replace modules before features are inherited",
                )  # fmt: skip

    def _leave(self, region: Region) -> None:
        """Remove a region that nothing uses. Sizes read in it that others use stay, in the scope of their source."""
        self.eliminate_dead_code()
        for node in region.nodes:
            if not node._erased and not isinstance(node.meta["val"], torch.Tensor) and len(node.all_input_nodes) == 1:
                source = node.all_input_nodes[0]
                if source not in region.nodes:
                    node.meta["nn_module_stack"] = dict(source.meta.get("nn_module_stack", {}))


def insert(
    graph: GraphState,
    code: Callable[..., Any] | nn.Module,
    args: Sequence[Any],
    before: fx.Node | None,
    path: str,
    leaving: Iterable[fx.Node],
) -> Any:
    """Trace code into a graph; see `Graph.insert`."""
    is_module = isinstance(code, nn.Module)
    if is_module and not path:
        raise EditError("a module is inserted without a path", hint="pass path=, where it is registered")
    tracer = Tracer(graph, code if isinstance(code, nn.Module) else None, prefix=path, leaving=leaving)
    tracer.module_stack = module_stack(graph, path.rpartition(".")[0] if is_module else path)
    nodes_before = set(graph.fx.nodes)
    try:
        with graph.fx.inserting_before(before or _earliest_place(graph, args)), tracing(tracer):
            result = code(*[tracer.proxy(a) if isinstance(a, fx.Node) else a for a in args])
            new_value = tracer.create_arg(result)
    except BaseException as error:
        for node in reversed([n for n in graph.fx.nodes if n not in nodes_before]):
            graph.fx.erase_node(node)
        for name, displaced in reversed(tracer.displaced.items()):
            if displaced is not None:
                graph._put(name, displaced)
        graph.weights.keep_only(weights_read(graph.fx.nodes))
        # within a pass the error is that of the pass, which names its line
        if graph._editor or isinstance(error, SdgraphError) or not isinstance(error, Exception):
            raise
        raise TraceError(
            f"the code that is inserted failed while being traced: {type(error).__name__}: {error}",
            where=path or tracer.failed_at,
            hint="it is called with values of the graph, whose sizes are free; check that it runs on tensors",
        ) from error
    graph.guards = tuple(dict.fromkeys((*graph.guards, *tracer.guards)))
    return new_value


def _earliest_place(graph: GraphState, args: Sequence[Any]) -> fx.Node:
    """The first operation before which all arguments exist."""
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    nodes = [a for a in args if isinstance(a, fx.Node) and a.op != "placeholder"]
    if not nodes:
        return first_operation(graph)
    last = max(nodes, key=lambda n: order[n])
    return last.next


def first_operation(graph: GraphState) -> fx.Node:
    """The first node that is no input."""
    first: fx.Node = next(n for n in graph.fx.nodes if n.op != "placeholder")
    return first


def module_stack(graph: GraphState, path: str) -> dict[str, Any]:
    """The module stack of a path: that of a node already there, or one made from its parts."""
    for node in graph.fx.nodes:
        stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
        if path in stack:
            return {p: stack[p] for p in list(stack)[: list(stack).index(path) + 1]}
    holders = [p for p in reversed(list(above(path))) if p in graph.classes]
    return {p: (p, graph.classes.get(p, "")) for p in (*holders, path) if p}


def check_same_shape(graph: GraphState, old: fx.Node, new: Any, path: str) -> None:
    """Refuse a new value that has another shape or dtype than the old one, at either call.

    Args:
        path: where it is, for the error.
    """
    if not isinstance(new, fx.Node) or not isinstance(new.meta["val"], torch.Tensor):
        raise EditError("the code must return one tensor", where=path, hint="return the new value alone")
    for was, now in zip(values(old), values(new), strict=True):
        if was.shape != now.shape or was.dtype != now.dtype:
            raise ShapeError(
                f"the new value is {graph.shape(new)} {now.dtype}, the old one is {graph.shape(old)} {was.dtype}",
                where=path,
                hint="return a tensor of the old shape and dtype, at every size and model dtype",
            )


def take_weights(graph: GraphState, paths: Sequence[str], other: GraphState) -> tuple[str, ...]:
    """Take the weights of regions; see `EditableGraph.take_weights`."""
    inside: set[fx.Node] = set()
    for path in paths:
        region = region_at(graph, path)
        _check_same(region, region_at(other, path))
        inside.update(region.nodes)
    names = tuple(weights_read(node for node in graph.fx.nodes if node in inside))
    outside = weights_read(node for node in graph.fx.nodes if node not in inside)
    held = {name: other.weights.get(name) for name in names}
    for name, value in held.items():
        _check_fits(name, graph.weights.get(name), value)
        if name in outside:
            raise EditError(
                f"{name} is used outside of {', '.join(paths)} as well",
                where=name,
                hint="take all regions that share these weights",
            )
    also_read_only(other.tensors())
    shares = Shares()
    for name, value in held.items():
        if isinstance(value, nn.Module):
            graph.add_module(name, value, shares)
        else:
            graph.add_tensor(name, value, shares)
    return names


def _check_same(mine: Region, its: Region) -> None:
    """Refuse regions that differ in more than their weights."""
    for here, there in zip_longest(_operations(mine), _operations(its), fillvalue="nothing"):
        if here != there:
            passes = ", ".join(map(str, its.graph.passes)) or "none"
            raise EditError(
                f"{mine.path} is not the same in both graphs: here {here}, there {there}",
                where=mine.path,
                hint=f"apply the same passes to both; those of the graph to take from are: {passes}",
            )


def _operations(region: Region) -> list[str]:
    """Return what the nodes of a region compute, as text, whatever its inputs are computed from."""
    number = {node: count for count, node in enumerate(region.nodes)}

    def named(node: fx.Node) -> str:
        return f"%{number[node]}" if node in number else "%"

    return [f"{called(node)} {fx.map_arg((node.args, node.kwargs), named)}" for node in region.nodes]


def _check_fits(name: str, mine: nn.Module | torch.Tensor, its: nn.Module | torch.Tensor) -> None:
    """Refuse weights of another shape, dtype or device."""
    if described(mine) != described(its):
        raise ShapeError(
            f"{name} is {described(mine)}, and {described(its)} in the graph to take from",
            where=name,
            hint="take regions from a UNet of the same configuration",
        )
    places = [_place(mine), _place(its)]
    if places[0] != places[1]:
        raise EditError(
            f"{name} is {places[0]}, and {places[1]} in the graph to take from",
            where=name,
            hint="unet.to(device, dtype) first",
        )


def _place(held: nn.Module | torch.Tensor) -> str:
    tensors = [held] if isinstance(held, torch.Tensor) else [*held.parameters(), *held.buffers()]
    return ", ".join(dict.fromkeys(f"{tensor.dtype} on {tensor.device}" for tensor in tensors))
