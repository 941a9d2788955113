"""The ways of recovering a pruned UNet that `tuning.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scenes.judge import Judge
from torch import Tensor, nn
from tuning_data import drawn, generated

from sdgraph.tuning import AttentionMaps, Comparison, Denoising, Features, ImageFeatures, Loss, Output, Source

PRESETS = ("base", "small", "tiny")


@dataclass(frozen=True)
class StageSum(Features):
    """BK-SDM's feature loss: the mean squared errors of the stages, added up as they are."""

    sigma: float | None = None

    def __call__(self, comparison: Comparison, values: Any) -> Tensor:
        return torch.stack([(mine - its).square().mean() for mine, its in values]).sum()


class Meaning(nn.Module):
    """The features of the judge."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge.load()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.judge(images)[0]
        return features


@dataclass(frozen=True)
class Recipe:
    """A way of tuning.

    Args:
        losses: returns the terms, for a pipeline.
        options: further options of `sdgraph.tune`.
        data: returns what to train on, for a pipeline, a number of rows, and a folder to keep it in.
    """

    losses: Callable[[Any], tuple[Loss, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[Any, int, Path], Source] = drawn


OURS = (Output(), Features("stage"), Denoising(weight=0.01))
RECIPES = {
    "task loss": Recipe(lambda pipe: (Denoising(),)),
    "BK-SDM's losses": Recipe(lambda pipe: (Denoising(), Output(), StageSum("stage"))),
    "ours": Recipe(lambda pipe: OURS),
    "ours, output only": Recipe(lambda pipe: (Output(), Denoising(weight=0.01))),
    "ours, random conditioning": Recipe(lambda pipe: OURS, {"random_conditioning": True}),
    "ours, attention maps": Recipe(lambda pipe: (*OURS, AttentionMaps())),
    "ours, image features": Recipe(lambda pipe: (*OURS, ImageFeatures(Meaning(), pipe.vae, weight=0.1))),
    "ours, captions alone": Recipe(lambda pipe: OURS[:-1], {"random_conditioning": True}, generated),
}
FULL = {"base": tuple(RECIPES), "small": ("BK-SDM's losses", "ours"), "tiny": ("BK-SDM's losses", "ours")}
