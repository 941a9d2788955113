"""The boxes of a diagram, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

from .units import BLOCK

ENDS = ("conv_in", "conv_out")  # where the U begins and ends
# Sizes in inches. A row holds a layer of a down block on the left, and the layer that reads its skip on the right.
BOX_WIDTH, BOX_HEIGHT, GAP = 1.12, 0.36, 0.16
WIDE = 1.68  # of boxes outside of the U, which show their name
ROW, BAND, INDENT, MIDDLE = 0.56, 0.42, 0.30, 2.0

KINDS = ("R", "A")  # of layers, by the first letter of their labels: resnets, attentions


@dataclass
class Box:
    """A unit of a UNet in a diagram.

    Args:
        path: the module path.
        label: the text in the box.
        share: the share of the multiply-accumulates, of the graph before if the unit was removed.
        state: "kept", "removed", "changed" or "inserted".
        x, y: the place of the lower left corner, in inches.
    """

    path: str
    label: str
    share: float
    state: str = "kept"
    x: float = 0.0
    y: float = 0.0

    @property
    def kind(self) -> str:
        return self.label[0] if self.label[0] in KINDS and BLOCK.match(self.path) else ""

    @property
    def width(self) -> float:
        return BOX_WIDTH if BLOCK.match(self.path) or self.path in ENDS else WIDE
