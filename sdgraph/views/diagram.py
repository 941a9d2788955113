"""A UNet as a picture: the U of its blocks, and what passes have done to it."""

from __future__ import annotations

import os

from ..ir.state import GraphState
from .drawing import Drawing
from .figure import paper
from .layout import Layout
from .plan import Plan


def picture(graph: GraphState, path: str | os.PathLike[str], before: GraphState | None = None) -> None:
    """Draw a UNet: going down on the left, up on the right, skip connections across.

    Each box is a layer's resnet (R), attention (A, with its number of transformer blocks) or sampler; its bar
    and figure are its share of the multiply-accumulates. In an SVG each box is an element whose id is its
    module path, and its label one whose id is the path and `:kept`, `:removed`, `:changed` or `:inserted`.

    Args:
        path: the file to write, `.svg` or `.png`.
        before: the graph before some passes, to show what they removed, changed and inserted.
    Raises:
        ExtraError: matplotlib is not installed.
        SpecError: another suffix.
        PathError: the graph has no blocks of a UNet.
    """
    plan = Plan(graph, before)
    layout = Layout(plan.boxes, up_blocks=len(graph.config.get("up_block_types") or ()))
    with paper(path) as figure:
        Drawing(plan, layout, figure)
