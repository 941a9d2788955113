"""The graph that passes edit: one flat fx graph, its weights, its inputs and its sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch

from .errors import EditError, PathError, SpecError, did_you_mean
from .forecasts import Forecast, Order, as_forecast
from .ir.editor import EditableGraph, first_operation, module_stack
from .ir.nodes import scope
from .ir.sites import Site, inherit, sites
from .options import checked
from .schedules import SamplingRun, Schedule
from .views.drawing import draw_graph
from .views.text import format_graph
from .views.timetable import Timetable, timetable


class Graph(EditableGraph):
    """A traced model that passes read and edit.

    It has the fields of `sdgraph.ir.state.GraphState`: `fx` (the nodes), `weights`, `inputs`, `dims`, `config`,
    `guards`, `passes`, `removals` and more.
    """

    def __str__(self) -> str:
        return format_graph(self)

    @checked(SpecError)
    def text(self, depth: int = 3, within: str | None = "") -> str:
        """Return the graph as text, one line per region.

        Args:
            depth: levels of nesting that are shown: 2 shows blocks, 3 layers, 4 units.
            within: the path of a region whose single operations are shown instead.
        Raises:
            PathError: there is no region `within`.
        """
        return format_graph(self, depth, within or "")

    @checked(SpecError)
    def draw(self, path: str | os.PathLike[str], before: Graph | None = None) -> None:
        """Draw the UNet to a file.

        Args:
            path: the file, `.svg` or `.png`.
            before: an earlier graph; what was removed, changed or inserted since is marked.
        """
        draw_graph(self, path, before)

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
        if name in sites(self.fx):
            raise EditError(f"there is a site {name!r} already", where=scope(node), hint="name it otherwise")
        if not isinstance(node.meta["val"], torch.Tensor):
            raise EditError(f"{node.name} is no tensor", where=scope(node), hint="inherit a tensor")
        made = Site(schedule, as_forecast(forecast))  # before the graph is edited
        after = node if node.op != "placeholder" else first_operation(self).prev
        with self.fx.inserting_after(after):
            site = self.fx.call_function(inherit, (node, name))
        site.meta["nn_module_stack"] = module_stack(self, path) if path else dict(node.meta.get("nn_module_stack", {}))
        self.infer(site)
        node.replace_all_uses_with(site, delete_user_cb=lambda user: user is not site)
        self._sites[name] = made
        return site

    @checked(PathError)
    def reschedule(self, name: str, schedule: Schedule) -> None:
        """Give a site another schedule.

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

    def timetable(self, calls: Any, **sizes: int) -> Timetable:
        """Return what each call of a generation computes, inherits, forecasts and bypasses, and what it costs.

        Args:
            calls: a diffusers scheduler after `set_timesteps`, the timesteps of the calls, or their number. Of a number
                the timesteps are supposed to be evenly spaced, as those of Stable Diffusion's own schedulers; the table
                says so.
            sizes: sizes of the calls at which costs are quoted, such as `B=2, H=64, W=64, L=77`; by default the
                model's own, for one sample.
        Raises:
            ScheduleError: a schedule does not fit the calls.
            SpecError: the graph does not cover the sizes.
        Example:
            `pipe.scheduler.set_timesteps(25)`, then `print(unet.graph.timetable(pipe.scheduler, B=2))`
        """
        return timetable(self.at(**sizes) if sizes else self, SamplingRun.of(calls))

    def decide(self, about: str, code: Callable[..., Any], *args: Any) -> Any:
        """Return the result of `code(*args)` and record it with the pass.

        A pass calls this for every decision that depends on the values of weights. A saved UNet is loaded by running
        its passes again on the shapes of weights alone, and then the recorded result is returned instead. New weights
        that are computed from old ones need no decision, because their values are saved.

        Args:
            about: what is decided, such as a module path; the report names it.
            code: returns numbers, text, or lists and dicts of them (`tensor.item()`, `tensor.tolist()`).
        Returns:
            The result as it comes back from a file: tuples are lists.
        Raises:
            DecisionError: the result cannot be recorded, or the recorded decision is about something else.
        """
        return self._decisions.decide(str(about), lambda: code(*args))
