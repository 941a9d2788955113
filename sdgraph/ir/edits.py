"""The record of what edits took out of a graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Removed:
    """A module that an edit took out of a graph.

    Args:
        path: the path that the module had.
        by: the pass that removed it, as text; empty for an edit outside of passes.
        module: a leaf module with its weights, which later passes may use; None for a region, which holds several.
    """

    path: str
    by: str = ""
    module: nn.Module | None = field(default=None, repr=False)
