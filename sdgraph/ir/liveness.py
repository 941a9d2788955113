"""What a value is computed from, and the removal of what nothing is computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import fx


def ancestors(
    node: fx.Node, inputs: Callable[[fx.Node], list[fx.Node]] = lambda node: node.all_input_nodes
) -> Iterator[fx.Node]:
    """Yield a node and all nodes that its value is computed from, depth first.

    Args:
        inputs: returns those inputs of a node that are followed.
    """
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        sources = inputs(current)
        stack += [source for source in sources if source not in seen]
        seen.update(sources)


def eliminate_dead_code(nodes: fx.Graph, unneeded: Collection[fx.Node] = ()) -> None:
    """Remove the nodes that nothing uses.

    Args:
        unneeded: inputs that may be removed too; all other inputs stay.
    """
    for node in reversed(nodes.nodes):
        stays = node.op == "output" or (node.op == "placeholder" and node not in unneeded)
        if not node.users and not stays:
            nodes.erase_node(node)
