"""Loops of calls that are no pipeline, and which of their calls compute everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdgraph import GraphUNet


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Loop:
    """A loop of a caller's own: DDIM without a scheduler, one call at a time."""

    def __init__(self, unet: Any, seed: int, prompt: Tensor):
        self.unet, self.latents, self.prompt = unet, noise(seed), prompt

    def __call__(self, timestep: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.unet(self.latents, timestep, self.prompt).sample
        self.latents = 0.95 * self.latents - 0.1 * output
        return output


def calls_that_compute(unet: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call from now on, whether it computes everything."""
    calls: list[bool] = []
    module = unet.backend.module

    def noted(given: frozenset[str], inherited: frozenset[str] = frozenset()) -> Any:
        calls.append(not inherited)
        return module(given, inherited)

    monkeypatch.setattr(unet.backend, "module", noted)
    return calls
