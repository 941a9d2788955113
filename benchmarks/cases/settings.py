"""How to measure, and what several cases share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdgraph.passes import HoistInvariants, InheritFeatures

CALLS = 10  # of a generation
INHERIT = (HoistInvariants(), InheritFeatures.deep_cache(3))


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        seconds: of timing, per case.
        at_least: samples of each call, whatever the time.
        dtype: of UNets on a GPU and of SDXL; on a CPU the others are in float32.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    seconds: float = 120.0
    at_least: int = 9
    quick: bool = False

    def of(self, model: str) -> torch.dtype:
        """SDXL in float32 takes 10 GB: on a CPU it is built in bfloat16."""
        name = "bfloat16" if model == "sdxl" and self.dtype == "float32" else self.dtype
        found: torch.dtype = getattr(torch, name)
        return found
