"""Sites: places of a graph that are not computed at every call, and the straight-line graphs that follow from them.

`inherit(value, site)` marks a value that a call may take over from an earlier one. At a call that refreshes the site
the value is computed and kept; at any other, what was kept takes its place. `bypass(value, instead, site)` marks a
value whose place another value of the same call takes, at calls that do not refresh the site. Whatever only fed a value
that is not used is not computed at all. That is decided before anything runs: each set of stale sites, those that are
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
from .nodes import ancestors, eliminate_dead_code
from .specialize import drop_inputs


def inherit(value: torch.Tensor, site: str) -> torch.Tensor:
    """Return `value`, which later calls may inherit under the name `site`."""
    return value


def bypass(value: torch.Tensor, instead: torch.Tensor, site: str) -> torch.Tensor:
    """Return `value`; at calls at which `site` is stale `instead`, a tensor of the same shape, takes its place."""
    return value


@dataclass(frozen=True)
class Site:
    """A value that is not computed at every call.

    Args:
        schedule: the calls at which it is computed anew.
        forecast: what it is at the others, from its last refreshes: a forecast, or its order (0 repeats the last one).
        invariant: it depends on conditioning alone, so that all generations with the same conditioning may share it.
        bypassed: at the other calls another value of the same call takes its place, so that nothing is kept.
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
    """The nodes of the sites of a graph, by name, in graph order."""
    return {str(node.args[-1]): node for node in nodes.nodes if node.target in (inherit, bypass)}


def changing_nodes(nodes: fx.Graph, inputs: Iterable[Input]) -> set[fx.Node]:
    """The nodes whose tensors depend on inputs that change from call to call. Sizes do not: a call of another size
    begins another generation."""
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


def live_nodes(nodes: fx.Graph, stale: Collection[str] = ()) -> set[fx.Node]:
    """What a call at which the sites `stale` are inherited comes by on its way from the output back to the inputs: the
    nodes it computes, and the stale sites at which it stops."""

    def inputs(node: fx.Node) -> list[fx.Node]:
        if node.target is bypass:
            return [node.all_input_nodes[node.args[-1] in stale]]
        return [] if node.target is inherit and node.args[-1] in stale else node.all_input_nodes

    return set(ancestors(nodes.output_node(), inputs))


@dataclass(frozen=True)
class Step:
    """The graph of one kind of call.

    Args:
        nodes: its arguments are the call's inputs, then the inherited values; it returns the output, then the refreshed
            values, as one tuple (the output alone if the graph has no sites).
        takes: sites whose values are arguments, in order.
        gives: sites whose values are returned, in order.
    """

    nodes: fx.Graph
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    returns_tuple: bool = True


def step(nodes: fx.Graph, absent: Collection[str] = (), stale: Collection[str] = ()) -> Step:
    """Return the graph for a call that leaves out the optional inputs `absent`, and at which the sites in `stale` are
    inherited or bypassed.

    Every other site that the output depends on is computed, and its value is returned; nodes that only feed values that
    are not used are removed. A graph without sites returns its output as it is.

    Raises:
        EditError: the output cannot be computed without the absent inputs.
    """
    variant = drop_inputs(nodes, absent)
    if not sites(variant):
        return Step(variant, (), (), returns_tuple=False)
    given = [node for node in variant.nodes if node.op == "placeholder"]
    arguments: dict[str, fx.Node] = {}
    for site, node in sites(variant).items():
        if node.target is bypass:
            node.replace_all_uses_with(node.args[site in stale])  # type: ignore[arg-type]
            variant.erase_node(node)
        elif site in stale:
            with variant.inserting_after([*given, *arguments.values()][-1]):
                arguments[site] = value = variant.placeholder(f"inherited_{len(arguments)}")
            value.meta = {key: node.meta[key] for key in ("val", "probe", "nn_module_stack") if key in node.meta}
            node.replace_all_uses_with(value)
            variant.erase_node(node)
    eliminate_dead_code(variant, unneeded=arguments.values())
    results: dict[str, fx.Node] = {}
    for site, node in sites(variant).items():
        results[site] = value = node.all_input_nodes[0]
        node.replace_all_uses_with(value)
        variant.erase_node(node)
    output = variant.output_node()
    output.args = ((output.args[0], *results.values()),)
    takes = tuple(site for site, node in arguments.items() if not node._erased)
    return Step(variant, takes, tuple(results))
