"""The graph that passes edit: one flat fx graph, its weights, its inputs and its sizes."""

from __future__ import annotations

import os
from typing import Any

from .errors import SpecError
from .ir.editor import EditableGraph
from .options import checked
from .schedules import SamplingRun
from .views.drawing import draw_graph
from .views.text import format_graph
from .views.timetable import Timetable, timetable
from .views.widths import Widths


class Graph(EditableGraph):
    """A traced model that passes read and edit, that prints itself, and that knows its timetable.

    It has the fields of `sdgraph.ir.state.GraphState`: `fx` (the nodes), `weights`, `inputs`, `dims`, `config`,
    `guards`, `passes`, `removals` and more.
    """

    def __str__(self) -> str:
        return format_graph(self)

    @checked(SpecError)
    def text(self, depth: int = 3, within: str | None = "") -> str:
        """Return the graph as text, one line per region.

        Args:
            depth: levels of nesting that are shown: 2 shows blocks, 3 layers, 4 units.
            within: the path of a region whose single operations are shown instead.
        Raises:
            PathError: there is no region `within`.
        """
        return format_graph(self, depth, within or "")

    @checked(SpecError)
    def draw(self, path: str | os.PathLike[str], before: Graph | None = None) -> None:
        """Draw the UNet to a file.

        Args:
            path: the file, `.svg` or `.png`.
            before: an earlier graph; what was removed, changed or inserted since is marked.
        """
        draw_graph(self, path, before)

    def widths(self) -> Widths:
        """Return the widths of the graph: the channels, heads and features that several weights share.

        Example:
            `print(unet.graph.widths())`
        """
        return Widths.of(self)

    def timetable(self, calls: Any, **sizes: int) -> Timetable:
        """Return what each call of a generation computes, inherits, forecasts and bypasses, and what it costs.

        Args:
            calls: a diffusers scheduler after `set_timesteps`, the timesteps of the calls, or their number. Of a number
                the timesteps are supposed to be evenly spaced, as those of Stable Diffusion's own schedulers; the table
                says so.
            sizes: sizes of the calls at which costs are quoted, such as `B=2, H=64, W=64, L=77`; by default the
                model's own, for one sample.
        Raises:
            ScheduleError: a schedule does not fit the calls.
            SpecError: the graph does not cover the sizes.
        Example:
            `pipe.scheduler.set_timesteps(25)`, then `print(unet.graph.timetable(pipe.scheduler, B=2))`
        """
        return timetable({"": self.at(**sizes) if sizes else self}, SamplingRun.of(calls))
