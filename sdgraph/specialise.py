"""Specialising: a straight-line graph for one kind of call, over the same weights."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from .errors import EditError


def without(nodes: fx.Graph, absent: Collection[str]) -> fx.Graph:
    """The graph for calls that leave out the optional inputs `absent`.

    What would be computed from an absent input is absent; adding it leaves the other side; an absent attention mask is
    none.

    Raises:
        EditError: the output depends on an absent input in another way.
    """
    made, gone = copy_nodes(nodes), set()
    for node in list(made.nodes):
        if node.op == "placeholder":
            if node.name in absent:
                gone.add(node)
            continue
        if gone.isdisjoint(node.all_input_nodes):
            continue
        present = [a for a in node.args if a not in gone]
        if node.target in (operator.add, torch.add) and len(present) == 1:
            node.replace_all_uses_with(present[0])
        elif node.target is torch.nn.functional.scaled_dot_product_attention:
            node.update_kwarg("attn_mask", None)
            continue
        elif node.op == "output":
            raise EditError("the output depends on an optional input", where=", ".join(n.name for n in gone))
        gone.add(node)
    for node in reversed(list(made.nodes)):
        if not node.users and (node.op not in ("placeholder", "output") or node in gone):
            made.erase_node(node)
    return made


def copy_nodes(nodes: fx.Graph) -> fx.Graph:
    """The same nodes, with their names and meta, in a graph of their own."""
    made = fx.Graph()
    made.output(made.graph_copy(nodes, {}))
    return made
