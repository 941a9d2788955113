"""The record of edits: the events of a graph, what they removed, and the run of a pass that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .decisions import Decisions

EditKind = Literal["inserted", "replaced", "erased"]


@dataclass(frozen=True)
class Edit:
    """An edit of a graph. It prints as a line of text.

    Args:
        kind: "inserted", "replaced" or "erased".
        path: the module path of the edit; "" is the model itself.
        nodes: the names of the nodes that were inserted, replaced or erased; empty for a whole region.
        by: the names of the nodes or the path of the weights that take the place of those that were replaced.
    """

    kind: EditKind
    path: str
    nodes: tuple[str, ...] = ()
    by: tuple[str, ...] = ()

    def __str__(self) -> str:
        where, nodes = self.path or "(top level)", _listed(self.nodes)
        if self.by:
            return f"{where}: {nodes} -> {_listed(self.by)}" if nodes else f"{where} -> {_listed(self.by)}"
        return f"{where}: {self.kind} {nodes}" if nodes else f"{self.kind} {where}"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


@dataclass
class Recording:
    """The run of a pass over a graph: what it decides, and what it edits.

    Args:
        by: the pass as text; empty for edits outside of passes.
        decisions: the decisions of the run.
        edits: the edits so far, in order.
    """

    by: str = ""
    decisions: Decisions = field(default_factory=Decisions)
    edits: list[Edit] = field(default_factory=list)
