"""Feature inheritance: one node, and the straight-line graphs that follow from it.

`inherit(value, site)` marks a value that a call may take over from an earlier one. At a call that refreshes the site
the value is computed and kept; at any other, what was kept takes its place, and whatever only fed it is not computed at
all. That is decided before anything runs: each set of sites that are not refreshed gives one graph without branches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..errors import ScheduleError
from ..schedules import Schedule
from .inputs import Input
from .liveness import ancestors, eliminate_dead_code
from .specialize import copy_nodes


def inherit(value: torch.Tensor, site: str) -> torch.Tensor:
    """`value`, which later calls may inherit under the name `site`."""
    return value


@dataclass(frozen=True)
class Site:
    """A value that calls may inherit.

    Args:
        schedule: the calls at which it is computed anew.
        forecast: at the others it is the polynomial of this order through its last refreshes; 0 repeats the last one.
        invariant: it depends on conditioning alone, so that all generations with the same conditioning may share it.
    """

    schedule: Schedule
    forecast: int = 0
    invariant: bool = False

    def __post_init__(self) -> None:
        if self.forecast not in (0, 1, 2):
            raise ScheduleError(
                f"no forecast of order {self.forecast!r}", where=str(self.schedule), hint="0 (the last value), 1 or 2"
            )


def sites(nodes: fx.Graph) -> dict[str, fx.Node]:
    """The `inherit` nodes of a graph, by site, in graph order."""
    return {str(node.args[1]): node for node in nodes.nodes if node.target is inherit}


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
    return set(ancestors(nodes.output_node(), stop=lambda node: node.target is inherit and node.args[1] in stale))


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


def step(nodes: fx.Graph, stale: Collection[str] = ()) -> Step:
    """The graph for calls at which the sites `stale` are inherited.

    The others are refreshed if the output needs them: what only feeds stale sites is not computed, taken or given.
    Without any sites the graph returns its output as it is.
    """
    made = copy_nodes(nodes)
    if not sites(made):
        return Step(made, (), (), returns_tuple=False)
    given = [node for node in made.nodes if node.op == "placeholder"]
    arguments: dict[str, fx.Node] = {}
    for site, node in sites(made).items():
        if site in stale:
            with made.inserting_after([*given, *arguments.values()][-1]):
                arguments[site] = value = made.placeholder(f"inherited_{len(arguments)}")
            value.meta = {key: node.meta[key] for key in ("val", "probe", "nn_module_stack") if key in node.meta}
            node.replace_all_uses_with(value)
            made.erase_node(node)
    eliminate_dead_code(made, unneeded=arguments.values())
    results: dict[str, fx.Node] = {}
    for site, node in sites(made).items():
        results[site] = value = node.all_input_nodes[0]
        node.replace_all_uses_with(value)
        made.erase_node(node)
    output = made.output_node()
    output.args = ((output.args[0], *results.values()),)
    takes = tuple(site for site, node in arguments.items() if not node._erased)
    return Step(made, takes, tuple(results))
