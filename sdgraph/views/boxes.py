"""A box of a diagram: one unit of a UNet, what became of it, and its place."""

from __future__ import annotations

from dataclasses import dataclass

from .units import BLOCK

ENDS = ("conv_in", "conv_out")  # where the U begins and ends
# Sizes in inches. A row holds one layer, left the one going down, right the one going up that takes its skip.
BOX_WIDTH, BOX_HEIGHT, GAP = 1.12, 0.36, 0.16
WIDE = 1.68  # of boxes outside of the U, which show their name
ROW, BAND, INDENT, MIDDLE = 0.56, 0.42, 0.30, 2.0

KINDS = ("R", "A")  # of layers, by the first letter of their labels: resnets, attentions


@dataclass
class Box:
    """One unit of the UNet, in whichever of the two graphs it is."""

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
