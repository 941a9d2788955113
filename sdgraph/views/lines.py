"""The nodes that have a line of the text, and the values that a run of lines reads and returns."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx


def is_line(node: fx.Node) -> bool:
    """Return whether a node has a line; sizes, dtypes, parameters and items of tuples are written inside lines."""
    val = node.meta.get("val")
    if node.op == "get_attr" or (node.target is operator.getitem and is_tuple(node.args[0])):
        return False
    if isinstance(val, int | float):
        return node.meta.get("size") is None
    return isinstance(val, torch.Tensor | tuple | list)


def is_tuple(arg: Any) -> bool:
    """Return whether an argument is a node whose value is a tuple."""
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), tuple | list)


def _read_lines(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the lines that a node's arguments come from; an item of a tuple comes from the tuple."""
    for arg in node.all_input_nodes:
        if arg.target is operator.getitem and is_tuple(arg.args[0]):
            yield arg.args[0]  # type: ignore[misc]
        elif arg.op == "placeholder" or is_line(arg):
            yield arg


def inputs_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes outside of a run of lines that it reads, in the order of use."""
    known = set(inside)
    return list(dict.fromkeys(arg for node in inside for arg in _read_lines(node) if arg not in known))


def outputs_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes of a run of lines that are read outside; the last node if none is."""
    known = set(inside)

    def is_read(node: fx.Node) -> bool:
        users = [u for user in node.users for u in (user.users if _is_item(user, node) else (user,))]
        return any(u not in known and (u.op == "output" or is_line(u)) for u in users)

    return [node for node in inside if is_read(node)] or [inside[-1]]


def _is_item(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[0] is node and is_tuple(node)
