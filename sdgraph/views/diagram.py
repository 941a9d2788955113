"""A UNet as a diagram: the U of its blocks, and the effect of passes."""

from __future__ import annotations

import os

from ..ir.state import GraphState
from .drawing import Drawing
from .figure import paper
from .layout import Layout
from .plan import Plan


def picture(graph: GraphState, path: str | os.PathLike[str], before: GraphState | None = None) -> None:
    """Draw a UNet: down blocks on the left, up blocks on the right, skip connections across.

    A box is a layer's resnet (R), attention (A, with the number of transformer blocks) or sampler. Its bar and figure
    are its share of the multiply-accumulates. In an SVG the id of a box is its module path, and the id of its label is
    the path with `:kept`, `:removed`, `:changed` or `:inserted`.

    Args:
        path: the file to write, `.svg` or `.png`.
        before: the graph before some passes, whose effect is shown.
    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: the file has another suffix.
        PathError: the graph has no blocks of a UNet.
    """
    plan = Plan(graph, before)
    layout = Layout(plan.boxes, up_blocks=len(graph.config.get("up_block_types") or ()))
    with paper(path) as figure:
        Drawing(plan, layout, figure)
