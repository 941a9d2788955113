"""The graph as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph


def text(graph: Graph, depth: int = 3, within: str = "") -> str:
    return str(graph.fx)
