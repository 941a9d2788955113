"""Feature inheritance: one node, and the straight-line graphs that follow from it.

`inherit(value, site)` marks a value that a call may take over from an earlier one. At a call that refreshes the site
the value is computed and kept; at any other, what was kept takes its place, and whatever only fed it is not computed at
all. That is decided before anything runs: each set of sites that are not refreshed gives one graph without branches.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from .specialise import copy_nodes


def inherit(value: torch.Tensor, site: str) -> torch.Tensor:
    """`value`, which later calls may inherit under the name `site`."""
    return value


def sites(nodes: fx.Graph) -> dict[str, fx.Node]:
    """The `inherit` nodes of a graph, by site, in graph order."""
    return {str(node.args[1]): node for node in nodes.nodes if node.target is inherit}


@dataclass(frozen=True)
class Step:
    """The graph of one kind of call.

    Args:
        nodes: its arguments are the call's inputs, then the inherited values; it returns the output, then the refreshed
            values, as one tuple.
        takes: sites whose values are arguments, in order.
        gives: sites whose values are returned, in order.
    """

    nodes: fx.Graph
    takes: tuple[str, ...]
    gives: tuple[str, ...]


def step(nodes: fx.Graph, stale: Collection[str] = ()) -> Step:
    """The graph for calls at which the sites `stale` are inherited and all others are refreshed.

    A stale site whose value only feeds other stale sites is not taken. Without any sites the graph returns its output
    as it is.
    """
    made = copy_nodes(nodes)
    if not sites(made):
        return Step(made, (), ())
    given = [node for node in made.nodes if node.op == "placeholder"]
    arguments: dict[str, fx.Node] = {}
    results: dict[str, fx.Node] = {}
    for site, node in sites(made).items():
        if site in stale:
            with made.inserting_after([*given, *arguments.values()][-1]):
                value = made.placeholder(f"inherited_{len(arguments)}")
            value.meta = {key: node.meta[key] for key in ("val", "probe", "nn_module_stack") if key in node.meta}
            arguments[site] = value
        else:
            value = results[site] = node.args[0]  # type: ignore[assignment]
        node.replace_all_uses_with(value)
        results = {name: value if old is node else old for name, old in results.items()}
        made.erase_node(node)
    output = made.output_node()
    output.args = ((output.args[0], *results.values()),)
    for node in reversed(list(made.nodes)):
        if not node.users and node.op != "output" and node not in given:
            made.erase_node(node)
    takes = tuple(site for site, node in arguments.items() if not node._erased)
    return Step(made, takes, tuple(results))
