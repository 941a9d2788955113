"""The graph that passes edit: one flat fx graph, its weights, its inputs and its sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import EditError, ModeError, PathError, ShapeError, did_you_mean
from .inheritance.timetable import Timetable, timetable
from .ir.edits import Removed
from .ir.guards import Guard, check_condition, probing
from .ir.interception import tracing
from .ir.liveness import eliminate_dead_code
from .ir.nodes import scope, values, weights_read
from .ir.paths import above, matching
from .ir.region import Region, region_at, regions_of
from .ir.sites import Site, inherit, sites
from .ir.state import GraphState
from .ir.tracer import Tracer
from .ir.weights import Shares, Weights
from .schedules import Run, Schedule
from .views.diagram import picture
from .views.text import text


class Graph(GraphState):
    """A traced model that passes read and edit.

    It has the fields of `sdgraph.ir.state.GraphState`: `fx` (the nodes), `weights`, `inputs`, `dims`, `config`,
    `guards`, `passes` and more.
    """

    # -- reading -------------------------------------------------------------------------------------------------

    def region(self, path: str) -> Region:
        """The nodes under a module path.

        Raises:
            PathError: naming the nearest paths, or the pass that removed it.
        """
        return region_at(self, path)

    def regions(self) -> dict[str, Region]:
        """All regions by path, in graph order, outer before inner."""
        return regions_of(self)

    def matching(self, patterns: str | Iterable[str]) -> list[str]:
        """Paths of the regions that patterns name, in graph order.

        `*` stands for anything within a name, `**` for anything; a negative number counts from the last of its
        siblings that are there; `{a,b}` is either: `up_blocks.-1.{resnets,attentions}.*`.

        Raises:
            PathError: a pattern that names nothing; with the nearest paths.
        """
        return matching(patterns, self.paths(), self.region)

    def __str__(self) -> str:

        return text(self)

    def text(self, depth: int = 3, within: str = "") -> str:
        """Readable form: one line per region down to `depth` levels of nesting (2: blocks, 3: layers, 4: units), or
        the single operations of the region `within`."""

        return text(self, depth, within)

    def picture(self, path: str | os.PathLike[str], before: Graph | None = None) -> None:
        """Draw the UNet to an SVG or PNG file; with `before`, what was removed and what was changed since is marked."""

        picture(self, path, before)

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
        self.propagate(anew=True)

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
            raise EditError("a module is inserted without a path", hint="pass path=, where it is registered")
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
            self.weights.keep_only(weights_read(self.fx.nodes))
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
        self.removals += (Removed(region.path, self._editor),)
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
            raise EditError(f"{node.name} is used by {names}", where=scope(node), hint="rewire its users first")
        self.fx.erase_node(node)

    def add_parameter(self, name: str, tensor: torch.Tensor, before: torch.fx.Node | None = None) -> torch.fx.Node:
        """A new trainable parameter, and the node that reads it."""
        if self.weights.get(name) is not None:
            raise EditError(f"there is a weight {name!r} already", hint="choose another name")
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
        `schedule` refreshes it; see `sdgraph.Site`.

        Args:
            path: the scope of the new node; by default that of the value.
        Returns:
            the node that all earlier users of `node` now take.
        """
        self._check_editable()
        if name in sites(self.fx):
            raise EditError(f"there is a site {name!r} already", where=scope(node), hint="name it otherwise")
        if not isinstance(node.meta["val"], torch.Tensor):
            raise EditError(f"{node.name} is no tensor", where=scope(node), hint="inherit a tensor")
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
            raise PathError(f"no site {name!r}", hint=did_you_mean(name, self.sites) or f"sites: {list(self.sites)}")
        self._sites[name] = replace(self._sites[name], schedule=schedule)

    def timetable(self, calls: int | Sequence[float] | torch.Tensor) -> Timetable:
        """What each call of a generation refreshes, inherits and costs.

        Args:
            calls: how many, or their timesteps: `scheduler.timesteps`.
        Raises:
            ScheduleError: a schedule does not fit.
        """

        return timetable(self, Run.of(calls))

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
        if any(guard.condition == condition and guard.outcome for guard in self.guards):
            return
        guards = tuple(dict.fromkeys((*self.guards, Guard(condition, True, because))))
        symbols = probing(guards, self.dims.symbols, len(self.config.get("down_block_types", ())))
        self.guards = guards
        if symbols != self.dims.symbols:
            self.probe_at(symbols)

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

    def eliminate_dead_code(self) -> None:
        """Remove what no longer reaches the output: nodes (inputs stay), then modules and tensors."""
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

    sweep = eliminate_dead_code  # its former name, for passes that were written with it

    def check_no_adapters(self) -> None:
        """Refuse what would leave out LoRA layers, which are around the leaves of the graph and no part of it.

        Raises:
            ModeError: there are some.
        """
        for path, module in self.weights.named_modules():
            if hasattr(module, "lora_A"):
                raise ModeError(
                    "LoRA is loaded, and its layers are no part of the graph",
                    where=path,
                    hint="unet.fuse_lora() and unet.unload_lora() first",
                )

    def copy(self) -> Graph:
        """A graph of its own over the same weights' storage."""
        self.check_no_adapters()
        weights, shares = Weights(), Shares()
        for path in weights_read(self.fx.nodes):
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
            _sites=dict(self._sites),
            _meta=dict(self._meta),
        )

    def _keep_sites(self, region: Region) -> None:
        """Sites would vanish with their region, and nobody would know."""
        for name, node in sites(self.fx).items():
            if node in region.nodes:
                raise EditError(
                    f"{region.path} has the site {name!r}", where=region.path,
                    hint="remove and replace modules before features are inherited",
                )  # fmt: skip

    def _leave(self, region: Region) -> None:
        """Sweep; what stays of a region that is gone, because others asked for the same size, goes to its source."""
        self.eliminate_dead_code()
        for node in region.nodes:
            if not node._erased and not isinstance(node.meta["val"], torch.Tensor) and len(node.all_input_nodes) == 1:
                source = node.all_input_nodes[0]
                if source not in region.nodes:
                    node.meta["nn_module_stack"] = dict(source.meta.get("nn_module_stack", {}))

    def _first_operation(self) -> torch.fx.Node:
        return next(n for n in self.nodes if n.op != "placeholder")

    def _stack(self, path: str) -> dict[str, Any]:
        """The module stack of a path: that of a node already there, or one made from its parts."""
        for node in self.fx.nodes:
            stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
            if path in stack:
                return {p: stack[p] for p in list(stack)[: list(stack).index(path) + 1]}
        holders = [p for p in reversed(list(above(path))) if p in self.classes]
        return {p: (p, self.classes.get(p, "")) for p in (*holders, path) if p}

    def _same_shape(self, old: torch.fx.Node, new: Any, path: str) -> None:
        if not isinstance(new, torch.fx.Node) or not isinstance(new.meta["val"], torch.Tensor):
            raise EditError("the code must return one tensor", where=path, hint="return the new value alone")
        for before, after in zip(values(old), values(new), strict=True):
            if before.shape != after.shape or before.dtype != after.dtype:
                one, two = f"{self.shape(new)} {after.dtype}", f"{self.shape(old)} {before.dtype}"
                raise ShapeError(
                    f"the new value is {one}, the old one is {two}",
                    where=path,
                    hint="return a tensor of the old shape and dtype, at every size and model dtype",
                )
