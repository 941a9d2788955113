"""When two graphs are the same: their operations and joints, what those do not show, and the tensors they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from torch import fx

from .state import GraphState


def structure(graph: GraphState) -> str:
    """SHA-256 of the operations of a graph and how they are joined, whatever the nodes are called.

    Saved folders hold it, so the text that is hashed must not change.
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
    """Whether two graphs are the same but for their weights and the names of their nodes."""
    return structure(graph) == structure(other) and graph.details() == other.details()


def fingerprint(graph: GraphState) -> tuple[Hashable, ...]:
    """Equal for two graphs of one process that are alike, call the same functions and hold the same tensors."""
    # By identity, for different functions may have one name, which is all that `structure` knows of them.
    functions = tuple(id(node.target) for node in graph.fx.nodes if node.op == "call_function")
    held = {**dict(graph.weights.named_parameters(remove_duplicate=False)), **dict(graph.weights.named_buffers())}
    # By storage, for tensors on the meta device have no addresses.
    tensors = tuple(
        (name, t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.dtype) for name, t in held.items()
    )
    return structure(graph), functions, tensors, graph.details()
