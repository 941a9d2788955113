"""Sites: places of a graph that are not computed at every call, and the straight-line graphs that follow from them.

`inherit(value, site)` marks a value that a call may take over from an earlier one. At a call that refreshes the site
the value is computed and kept; at any other, what was kept takes its place. `bypass(value, instead, site)` marks a
value whose place another value of the same call takes, at calls that do not refresh the site. Whatever only fed a value
that is not used is not computed at all. That is decided before anything runs: each set of reused sites, those that are
not refreshed, gives one graph without branches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import fx

from ..errors import ScheduleError
from ..forecasts import REPEAT, Forecast, as_forecast
from ..options import check
from ..schedules import Drift, Schedule
from .inputs import Input
from .nodes import ancestors


def inherit(value: torch.Tensor, site: str) -> torch.Tensor:
    """Return a value that later calls may reuse. In the code of a pass it makes the value a site.

    Args:
        value: the value, of any shape.
        site: the name of the site.
    Example:
        `graph.insert_after(node, inherit, "features")`
    """
    return value


def bypass(value: torch.Tensor, instead: torch.Tensor, site: str) -> torch.Tensor:
    """Return `value`; at calls at which `site` is reused `instead`, a tensor of the same shape, takes its place."""
    return value


@dataclass(frozen=True)
class Site:
    """A value that is not computed at every call.

    Args:
        schedule: the calls at which it is computed anew.
        forecast: what it is at the others, from its last refreshes: a forecast, or its order (0 repeats the last one).
        invariant: whether it depends on conditioning alone, so that generations with equal conditioning may share it.
        bypassed: whether another value of the same call takes its place at the other calls, so that nothing is kept.
    """

    schedule: Schedule
    forecast: Annotated[Forecast, Any] = REPEAT  # or an order
    invariant: bool = False
    bypassed: bool = False

    def __post_init__(self) -> None:
        check(self, ScheduleError, "Site")
        object.__setattr__(self, "forecast", as_forecast(self.forecast))
        drifts = [inner for inner in self.schedule.specs() if isinstance(inner, Drift)]
        if drifts and (self.bypassed or drifts != [self.schedule]):
            raise ScheduleError(
                "Drift measures what a site inherits, so it is the whole schedule of a site that does",
                where=str(self.schedule),
                hint="Drift(...) alone, in InheritFeatures",
            )


def sites(nodes: fx.Graph) -> dict[str, fx.Node]:
    """Return the nodes of the sites of a graph, by name, in graph order."""
    return {str(node.args[-1]): node for node in nodes.nodes if node.target in (inherit, bypass)}


def changing_nodes(nodes: fx.Graph, inputs: Iterable[Input]) -> set[fx.Node]:
    """Return the nodes whose tensors depend on inputs that change from call to call.

    Sizes do not change: a call of another size begins another generation.
    """
    conditioning = {i.name for i in inputs if i.conditioning}
    changing: set[fx.Node] = set()
    for node in nodes.nodes:
        if node.op == "placeholder":
            depends = node.name not in conditioning
        else:
            depends = _holds_tensors(node) and not changing.isdisjoint(node.all_input_nodes)
        if depends:
            changing.add(node)
    return changing


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, tuple | list) else (value,)))


def live_nodes(nodes: fx.Graph, reused: Collection[str] = ()) -> set[fx.Node]:
    """Return the nodes that a call computes, and the reused sites at which the walk back from its output stops.

    Args:
        nodes: the nodes of the graph.
        reused: the names of the sites that the call reuses or bypasses.
    """

    def inputs(node: fx.Node) -> list[fx.Node]:
        if node.target is bypass:
            return [node.all_input_nodes[node.args[-1] in reused]]
        return [] if node.target is inherit and node.args[-1] in reused else node.all_input_nodes

    return set(ancestors(nodes.output_node(), inputs))
