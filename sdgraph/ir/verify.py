"""Equality of graphs: of their operations, of what operations do not show, and of the tensors that they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from torch import fx

from .state import GraphState


def structure(graph: GraphState) -> str:
    """Return the SHA-256 of the operations of a graph and their arguments, regardless of the names of nodes.

    Saved folders contain this digest, so the text that is hashed must not change.
    """
    number: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for node in graph.fx.nodes:
        number[node] = len(number)
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        arguments = fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), lambda n: f"%{number[n]}")
        digest.update(f"{node.op} {target} {arguments}\n".encode())
    return digest.hexdigest()


def alike(graph: GraphState, other: GraphState) -> bool:
    """Return whether two graphs are equal except for their weights and the names of their nodes."""
    return structure(graph) == structure(other) and graph.details() == other.details()


def fingerprint(graph: GraphState) -> tuple[Hashable, ...]:
    """Return a value that is equal for graphs that are alike, call the same functions and hold the same tensors.

    It is valid within one process.
    """
    # By identity, because `structure` knows functions by name only, and different functions may share a name.
    functions = tuple(id(node.target) for node in graph.fx.nodes if node.op == "call_function")
    held = {**dict(graph.weights.named_parameters(remove_duplicate=False)), **dict(graph.weights.named_buffers())}
    # By storage, because tensors on the meta device have no addresses.
    tensors = tuple(
        (name, t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.dtype) for name, t in held.items()
    )
    return structure(graph), functions, tensors, graph.details()
