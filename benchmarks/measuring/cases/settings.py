"""Settings of the measurement, and constants that several cases share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdgraph.passes import HoistInvariants, InheritFeatures

CALLS = 10  # of a generation
INHERIT = (HoistInvariants(), InheritFeatures.deep_cache(3))


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Args:
        device: the device that is measured.
        batch: the number of samples of a call.
        seconds: the time of measuring, per case.
        at_least: the least number of samples of each call.
        dtype: the name of the dtype of the UNets; see `of`.
        quick: whether this is a smoke test.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    seconds: float = 120.0
    at_least: int = 9
    quick: bool = False

    def of(self, model: str) -> torch.dtype:
        """Return the dtype of a model; SDXL in float32 would take 10 GB, so it is built in bfloat16."""
        name = "bfloat16" if model == "sdxl" and self.dtype == "float32" else self.dtype
        found: torch.dtype = getattr(torch, name)
        return found
