"""The editor of a graph: it inserts code, replaces and removes nodes and regions, adds sites, and records edits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import fx, nn

from ..errors import EditError, PathError, SdgraphError, ShapeError, TraceError, did_you_mean
from ..forecasts import Forecast, Order, as_forecast
from ..options import checked
from ..schedules import Schedule
from .decisions import Decisions
from .edits import Edit, EditKind, Recording, Removed
from .guards import Guard, check_condition, probing
from .nodes import called, eliminate_dead_code, scope, values, weights_read
from .read_only import also_read_only
from .regions import Region, above, matching, region_at, regions_of
from .sites import Site, bypass, inherit, sites
from .state import GraphState
from .tracer import Tracer, tracing
from .weights import Shares, described
from .widths import Width, channels_of, find_widths, narrowed, no_width, size_of


class EditableGraph(GraphState):
    """A graph whose regions can be found and edited. Every edit is an event, see `recording`."""

    @checked(PathError)
    def region(self, path: str) -> Region:
        """Return the nodes under a module path.

        Args:
            path: the module path, such as "mid_block.attentions.0".
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

        Args:
            patterns: a path or pattern, or several.
        Raises:
            PathError: a pattern names nothing; the error names the nearest paths.
        Example:
            `graph.matching("up_blocks.-1.{resnets,attentions}.*")`
        """
        return matching(patterns, self.paths(), self.region)

    @contextlib.contextmanager
    def recording(self, by: str = "", decisions: Decisions | None = None) -> Iterator[Recording]:
        """Record the edits and decisions in this context; the recording before goes on afterwards.

        Args:
            by: the pass that edits, as text.
            decisions: the decisions of the pass; by default it takes them.
        Returns:
            A context, which yields the recording.
        Example:
            `with graph.recording() as recording: graph.bypass("mid_block")`, then `recording.edits`
        """
        outer, self._recording = self._recording, Recording(by, decisions or Decisions())
        try:
            yield self._recording
        finally:
            self._recording = outer

    def decide(self, about: str, code: Callable[..., Any], *args: Any) -> Any:
        """Return the result of `code(*args)` and record it with the pass.

        A pass calls this for every decision that depends on the values of weights. A saved UNet is loaded by running
        its passes again on the shapes of weights alone, and then the recorded result is returned instead. New weights
        that are computed from old ones need no decision, because their values are saved.

        Args:
            about: the subject of the decision, such as a module path; the report names it.
            code: a function that returns numbers, text, or lists and dicts of them (`tensor.item()`,
                `tensor.tolist()`).
            args: the arguments of the function.
        Returns:
            The result as it comes back from a file: tuples are lists.
        Raises:
            DecisionError: the result cannot be recorded, or the recorded decision is about something else.
        """
        decisions = self._recording.decisions if self._recording is not None else Decisions()
        return decisions.decide(str(about), lambda: code(*args))

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
            leaving: the nodes that will be removed, so that new weights may take the names of their weights.
        Returns:
            The node of the value that the code returns, or a tuple of nodes.
        Raises:
            EditError: a module is inserted without a path.
            TraceError, ShapeError: the code cannot be traced; the graph is unchanged.
        """
        value, inserted = self._trace(code, args, before or self._earliest_place(args), path, leaving)
        self._record("inserted", path, inserted)
        return value

    @checked(EditError)
    def insert_after(
        self, node: torch.fx.Node, code: Callable[..., Any] | nn.Module, *args: Any, path: str = ""
    ) -> torch.fx.Node:
        """Trace `code(node, *args)` into the graph and give its result to every earlier user of `node`.

        Args:
            node: the node of the value, which is the first argument of the code.
            code: a function, or a module, which is registered at `path` with its parameters.
            args: further arguments; a node of the graph stands for its value.
            path: the scope of the new nodes; by default that of `node`.
        Returns:
            The node of the result.
        Raises:
            ShapeError: the result does not have the shape and dtype of `node`.
        """
        users, path = list(node.users), path or scope(node)
        result, _ = self._trace(code, (node, *args), self._earliest_place((node, *args)), path)
        self._check_same_shape(node, result, path)
        for user in users:
            user.replace_input_with(node, result)
        self._record("replaced", path, [node], [result.name])
        return result  # type: ignore[no-any-return]

    @checked(EditError)
    def replace(
        self,
        old: torch.fx.Node | Region | str | tuple[torch.fx.Node, ...],
        code: Callable[..., Any] | nn.Module,
        *inputs: Any,
        path: str = "",
        leaving: Iterable[torch.fx.Node] = (),
    ) -> Any:
        """Replace a node, several nodes or a region by PyTorch code, and remove what only they were computed from.

        Args:
            old: a node; nodes, in the order of the values that the code returns; or a region with one output, or its
                path.
            code: a function, or a module, which is registered at `path` with its parameters.
            inputs: the arguments of `code`. A node of the graph stands for its value. By default the arguments of the
                first node, or the tensor inputs of the region in graph order (`region.inputs`).
            path: the scope of the new nodes; by default that of the first node, or the path of the region.
            leaving: further nodes that will be removed, so that new weights may take the names of their weights.
        Returns:
            The node of the new value; for several nodes a tuple.
        Raises:
            EditError: there are no nodes; the region has several outputs, or sites of feature inheritance; or the code
                returns another number of values.
            ShapeError: a new value does not have the shape and dtype of the old one.
        Example:
            `graph.replace(node, F.hardswish)`
        """
        self._check_editable()
        nodes: tuple[torch.fx.Node, ...]
        inside: tuple[torch.fx.Node, ...] = ()
        if isinstance(old, Region | str):
            region = self._own_region(old)
            self._keep_sites(region)
            nodes, inside, args, path = (region.output,), region.nodes, inputs or region.inputs, path or region.path
        else:
            nodes = old if isinstance(old, tuple) else (old,)
            if not nodes:
                raise EditError("there is nothing to replace", where="replace", hint="pass a node, nodes or a region")
            self._check_own(*nodes)
            args, path = inputs or nodes[0].args, path or scope(nodes[0])
        order = {node: number for number, node in enumerate(self.fx.nodes)}
        first = min(nodes, key=order.__getitem__)
        going = {*inside, *leaving, *self._needed_by(nodes, keep=args)}
        value, inserted = self._trace(code, args, first.next, path, going)
        values = value if isinstance(old, tuple) else (value,)
        if not isinstance(values, tuple | list) or len(values) != len(nodes):
            raise EditError(f"the code must return {len(nodes)} values", where=path, hint="one for each old node")
        for node, new in zip(nodes, values, strict=True):
            self._redirect(node, new, path, keep=inserted)
        self._record("replaced", path, nodes, [new.name for new in values])
        gone = self._erase_unused((*nodes, *reversed(inside)))
        self._record_erased(node for node in gone if node not in nodes and node not in inside)
        self._settle_sizes(inside)
        return value

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
            replaced = []
            for output in region.outputs:
                old, new = region.stand_in(output)
                old.replace_all_uses_with(new)
                replaced.append(old)
            self.removals += (Removed(region.path, self._by),)
            self._record("erased", region.path)
            gone = self._erase_unused((*replaced, *reversed(region.nodes)))
            self._record_erased(node for node in gone if node not in region.nodes)
            self._settle_sizes(region.nodes)
            return ()
        names = tuple(f"{region.path}[{i}]" if i else region.path for i in range(len(region.outputs)))
        for name, output in zip(names, region.outputs, strict=True):
            self._bypass_by_call(*region.stand_in(output), name, schedule)
        return names

    @checked(EditError)
    def narrow(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Cut widths down to some of their slices, in all weights that share them.

        The result computes what the graph would if the layers that sum over these widths had zeros for all other
        slices. The groups of norms that stay have the channels that they had.

        Args:
            kept: the numbers of the slices that stay, ascending, by the path of the width; see `Graph.widths`.
        Raises:
            PathError: there is no such width, or it cannot be cut; the error gives the reason.
            EditError: the numbers are no slices of the width, or there are none.
        Example:
            `graph.narrow({"mid_block.resnets.0": range(24)})` keeps the first 24 groups of channels
        """
        self._check_editable()
        widths, fixed = find_widths(self)
        for path, slices in kept.items():
            if path not in widths:
                raise no_width(path, widths, fixed)
            if not slices or list(slices) != sorted({*slices}) or slices[0] < 0 or slices[-1] >= widths[path].slices:
                raise EditError(
                    f"{list(slices)} are no slices of {widths[path]}",
                    where=path,
                    hint=f"ascending numbers from 0 to {widths[path].slices - 1}, at least one",
                )
        for path, slices in kept.items():
            self._narrow(widths[path], slices)
        self.propagate()

    def _narrow(self, width: Width, slices: Sequence[int]) -> None:
        """Cut one width down to some of its slices."""
        for end in width.ends:
            held = self.weights.get(end.path)
            channels = channels_of(width, end, size_of(self, end), slices)
            groups = getattr(held, "num_groups", 0) * len(slices) // width.slices
            self._put(end.path, narrowed(held, end, channels, groups))
            for node in self.fx.nodes:
                if node.target == end.path:
                    node.meta.pop("evaluated", None)
        for node, at in width.literals:
            if isinstance(at, int):
                node.update_arg(at, node.args[at] * len(slices) // width.slices)  # type: ignore[operator]
            else:
                node.update_kwarg(at, node.kwargs[at] * len(slices) // width.slices)  # type: ignore[operator]
        self._record("replaced", width.path, by=[f"{len(slices)} of {width.slices} {width.kind}"])

    def _bypass_by_call(self, value: torch.fx.Node, instead: torch.fx.Node, name: str, schedule: Schedule) -> None:
        self._check_new_site(name, value)
        self._check_same_shape(value, instead, name)
        self._add_site(name, Site(schedule, bypassed=True), value, value, bypass, (value, instead, name))

    @checked(EditError)
    def inherit(
        self, node: torch.fx.Node, name: str, schedule: Schedule, forecast: Forecast | Order = 0, path: str = ""
    ) -> torch.fx.Node:
        """Make the value of `node` a site: calls at which `schedule` does not refresh it inherit it from earlier calls.

        Args:
            node: the node of the value, a tensor.
            name: the name of the site.
            schedule: the calls at which the value is computed.
            forecast: what inherited values are, a forecast or its order; see `sdgraph.Site`.
            path: the scope of the new node; by default the scope of `node`.
        Returns:
            The node that now stands for the value; all earlier users of `node` use it.
        Raises:
            EditError: there is a site of this name, or the value is no tensor.
        """
        self._check_editable()
        self._check_own(node)
        self._check_new_site(name, node)
        if not isinstance(node.meta["val"], torch.Tensor):
            raise EditError(f"{node.name} is no tensor", where=scope(node), hint="inherit a tensor")
        after = node if node.op != "placeholder" else self._first_operation().prev
        return self._add_site(name, Site(schedule, as_forecast(forecast)), node, after, inherit, (node, name), path)

    def _check_new_site(self, name: str, node: torch.fx.Node) -> None:
        if name in sites(self.fx):
            raise EditError(f"there is a site {name!r} already", where=scope(node), hint="choose another name")

    def _add_site(
        self,
        name: str,
        site: Site,
        value: torch.fx.Node,
        after: torch.fx.Node,
        mark: Callable[..., torch.Tensor],
        args: tuple[Any, ...],
        path: str = "",
    ) -> torch.fx.Node:
        """Insert the node of a site and give it to all users of the value."""
        with self.fx.inserting_after(after):
            node = self.fx.call_function(mark, args)
        stack = self._module_stack(path) if path else value.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = dict(stack)
        self.infer(node)
        value.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self._sites[name] = site
        self._record("inserted", scope(node), [node])
        return node

    @checked(PathError)
    def reschedule(self, name: str, schedule: Schedule) -> None:
        """Give a site another schedule.

        Args:
            name: the name of the site.
            schedule: the new schedule.
        Raises:
            PathError: there is no site of this name.
        """
        self._check_editable()
        if name not in self.sites:
            raise PathError(f"no site {name!r}", hint=did_you_mean(name, self.sites) or f"sites: {list(self.sites)}")
        self._sites[name] = replace(self._sites[name], schedule=schedule)

    def rescheduled(self, changed: Mapping[str, Site]) -> Self:
        """Return the graph with other schedules and forecasts of its sites, over the same nodes and weights.

        Args:
            changed: the sites that differ, by name.
        Raises:
            PathError: there is no site of a name.
        """
        for name in changed:
            if name not in self._sites:
                raise PathError(
                    f"no site {name!r}", hint=did_you_mean(name, self._sites) or f"sites: {list(self._sites)}"
                )
        return replace(self, _sites={**self._sites, **changed})

    @checked(EditError)
    def rewire(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Give `new` to every user of `old`.

        Args:
            old: the node whose users change.
            new: the node that they use instead.
        Raises:
            ShapeError: the two do not have the same shape and dtype at every size.
        """
        self._check_editable()
        self._check_own(old, new)
        self._redirect(old, new, scope(old))
        self._record("replaced", scope(old), [old], [new.name])

    def _redirect(self, old: torch.fx.Node, new: Any, path: str, keep: Collection[torch.fx.Node] = ()) -> None:
        """Give `new` to all users of `old` but those to keep."""
        self._check_same_shape(old, new, path)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user not in keep)

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
        self._record("replaced", own, by=[path])

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
        paths = self.matching(regions)
        inside: set[torch.fx.Node] = set()
        for path in paths:
            region = region_at(self, path)
            _check_same(region, region_at(other, path))
            inside.update(region.nodes)
        names = tuple(weights_read(node for node in self.fx.nodes if node in inside))
        outside = weights_read(node for node in self.fx.nodes if node not in inside)
        held = {name: other.weights.get(name) for name in names}
        for name, value in held.items():
            _check_fits(name, self.weights.get(name), value)
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
                self.add_module(name, value, shares)
            else:
                self.add_tensor(name, value, shares)
        for path in paths:
            self._record("replaced", path)
        return names

    @checked(EditError)
    def erase(self, node: torch.fx.Node) -> None:
        """Remove a node that has no users.

        Args:
            node: the node.
        Raises:
            EditError: the node has users.
        """
        self._check_editable()
        self._check_own(node)
        if node.users:
            names = ", ".join(n.name for n in node.users)
            raise EditError(f"{node.name} is used by {names}", where=scope(node), hint="rewire its users first")
        self.fx.erase_node(node)
        self._record("erased", scope(node), [node])

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
        with self.fx.inserting_before(before or self._first_operation()):
            node = self.fx.get_attr(name)
        node.meta["nn_module_stack"] = self._module_stack(name.rpartition(".")[0])
        self.infer(node)
        self._record("inserted", scope(node), [node])
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

        Leaf modules that go are recorded in `removals`. The runner does this after every pass.
        """
        self._check_editable()
        nodes = self.nodes
        eliminate_dead_code(self.fx)
        self._drop_unused_weights()
        self._record_erased(node for node in nodes if node._erased)

    def _drop_unused_weights(self) -> None:
        used = weights_read(self.fx.nodes)
        recorded = {removed.path for removed in self.removals if removed.module is not None}
        self.removals += tuple(
            Removed(path, self._by, Shares().module(module))
            for path, module in self.weights.leaves()
            if path not in used and path not in recorded
        )
        self.weights.keep_only(used)

    def _needed_by(self, nodes: Iterable[torch.fx.Node], keep: Iterable[Any]) -> set[torch.fx.Node]:
        """Return the nodes that nothing uses once some nodes and what depends on these alone are gone."""
        needed, stack = set(nodes), list(nodes)
        kept = {value for value in keep if isinstance(value, torch.fx.Node)}
        while stack:
            for node in stack.pop().all_input_nodes:
                if node not in kept and node.op != "placeholder" and needed.issuperset(node.users):
                    needed.add(node)
                    stack.append(node)
        return needed

    def _erase_unused(self, nodes: Iterable[torch.fx.Node]) -> list[torch.fx.Node]:
        """Erase those of the nodes that nothing uses, and what only they were computed from; return what is gone."""
        stack, gone = list(nodes), list[torch.fx.Node]()
        while stack:
            node = stack.pop(0)
            if not (node._erased or node.users or node.op in ("placeholder", "output")):
                stack += node.all_input_nodes
                self.fx.erase_node(node)
                gone.append(node)
        if weights_read(gone):
            self._drop_unused_weights()
        return gone

    @property
    def _by(self) -> str:
        """The pass that edits the graph, as text; empty outside of passes."""
        return self._recording.by if self._recording is not None else ""

    def _record(self, kind: EditKind, path: str, nodes: Iterable[torch.fx.Node] = (), by: Iterable[str] = ()) -> None:
        if self._recording is not None:
            self._recording.edits.append(Edit(kind, path, tuple(node.name for node in nodes), tuple(by)))

    def _record_erased(self, nodes: Iterable[torch.fx.Node]) -> None:
        """Record erased nodes, by module path."""
        by_path: dict[str, list[torch.fx.Node]] = {}
        for node in nodes:
            by_path.setdefault(scope(node), []).append(node)
        for path, gone in by_path.items():
            self._record("erased", path, gone)

    def _trace(
        self,
        code: Callable[..., Any] | nn.Module,
        args: Sequence[Any],
        before: torch.fx.Node,
        path: str,
        leaving: Iterable[torch.fx.Node] = (),
    ) -> tuple[Any, list[torch.fx.Node]]:
        """Trace code into the graph; return its value, and the new nodes."""
        self._check_editable()
        self._check_own(before, *(arg for arg in args if isinstance(arg, torch.fx.Node)))
        is_module = isinstance(code, nn.Module)
        if is_module and not path:
            raise EditError("a module is inserted without a path", hint="pass path=, where it is registered")
        tracer = Tracer(self, code if isinstance(code, nn.Module) else None, prefix=path, leaving=leaving)
        tracer.module_stack = self._module_stack(path.rpartition(".")[0] if is_module else path)
        nodes_before = set(self.fx.nodes)
        try:
            with self.fx.inserting_before(before), tracing(tracer):
                result = code(*[tracer.proxy(arg) if isinstance(arg, torch.fx.Node) else arg for arg in args])
                new_value = tracer.create_arg(result)
        except BaseException as error:
            for node in reversed([n for n in self.fx.nodes if n not in nodes_before]):
                self.fx.erase_node(node)
            for name, displaced in reversed(tracer.displaced.items()):
                if displaced is not None:
                    self._put(name, displaced)
            self.weights.keep_only(weights_read(self.fx.nodes))
            # within a pass the error is that of the pass, which names its line
            if self._by or isinstance(error, SdgraphError) or not isinstance(error, Exception):
                raise
            raise TraceError(
                f"the code that is inserted failed while being traced: {type(error).__name__}: {error}",
                where=path or tracer.failed_at,
                hint="it is called with values of the graph, whose sizes are free; check that it runs on tensors",
            ) from error
        self.guards = tuple(dict.fromkeys((*self.guards, *tracer.guards)))
        return new_value, [node for node in self.fx.nodes if node not in nodes_before]

    def _earliest_place(self, args: Sequence[Any]) -> torch.fx.Node:
        """Return the first operation before which all arguments exist."""
        order = {node: number for number, node in enumerate(self.fx.nodes)}
        nodes = [arg for arg in args if isinstance(arg, torch.fx.Node) and arg.op != "placeholder"]
        self._check_own(*nodes)
        return max(nodes, key=order.__getitem__).next if nodes else self._first_operation()

    def _first_operation(self) -> torch.fx.Node:
        """Return the first node that is no input."""
        first: torch.fx.Node = next(node for node in self.fx.nodes if node.op != "placeholder")
        return first

    def _module_stack(self, path: str) -> dict[str, Any]:
        """Return the module stack of a path: that of a node already there, or one made from its parts."""
        for node in self.fx.nodes:
            stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
            if path in stack:
                return {p: stack[p] for p in list(stack)[: list(stack).index(path) + 1]}
        holders = [p for p in reversed(list(above(path))) if p in self.classes]
        return {p: (p, self.classes.get(p, "")) for p in (*holders, path) if p}

    def _check_same_shape(self, old: torch.fx.Node, new: Any, path: str) -> None:
        """Refuse a new value that has another shape or dtype than the old one, at either call."""
        if not isinstance(new, torch.fx.Node) or not isinstance(new.meta["val"], torch.Tensor):
            raise EditError("the code must return one tensor", where=path, hint="return the new value alone")
        for was, now in zip(values(old), values(new), strict=True):
            if was.shape != now.shape or was.dtype != now.dtype:
                raise ShapeError(
                    f"the new value is {self.shape(new)} {now.dtype}, the old one is {self.shape(old)} {was.dtype}",
                    where=path,
                    hint="return a tensor of the old shape and dtype, at every size and model dtype",
                )

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
                    hint="find it in this graph: a copy has separate nodes",
                )

    def _keep_sites(self, region: Region) -> None:
        """Refuse a region with sites, which would vanish with it unnoticed."""
        for name, node in sites(self.fx).items():
            if node in region.nodes:
                raise EditError(
                    f"{region.path} has the site {name!r}", where=region.path,
                    hint="remove and replace modules before features are inherited",
                )  # fmt: skip

    def _settle_sizes(self, gone: Collection[torch.fx.Node]) -> None:
        """Move sizes that were read in a region that is gone, and that others use, to the scope of their source."""
        for node in gone:
            if not node._erased and not isinstance(node.meta["val"], torch.Tensor) and len(node.all_input_nodes) == 1:
                source = node.all_input_nodes[0]
                if source not in gone:
                    node.meta["nn_module_stack"] = dict(source.meta.get("nn_module_stack", {}))


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
