"""The judge: a small classifier that reads back what is in an image of a scene, and where."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .pipeline import JUDGE, MODEL, check_files
from .scene import COLOURS, PLACES, SHAPES, SIZES, Scene

ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}


def labels(scene: Scene) -> Tensor:
    """What is at each place: (5, 3) indices of shape, colour and size, in the order of `PLACES`; 0 is nothing."""
    found = torch.zeros(len(PLACES), len(ATTRIBUTES), dtype=torch.long)
    for thing in scene.things:
        row = tuple(PLACES).index(thing.place)
        for column, (name, values) in enumerate(ATTRIBUTES.items()):
            found[row, column] = 1 + values.index(getattr(thing, name))
    return found


def heads(features: int) -> nn.ModuleDict:
    """One linear layer for each attribute, from features to logits for all places."""
    return nn.ModuleDict(
        {name: nn.Linear(features, len(PLACES) * (1 + len(values))) for name, values in ATTRIBUTES.items()}
    )


def readings(heads: nn.ModuleDict, features: Tensor) -> dict[str, Tensor]:
    """Logits (B, 5, values) of each attribute."""
    return {name: head(features).unflatten(1, (len(PLACES), -1)) for name, head in heads.items()}


def reading_loss(logits: dict[str, Tensor], truth: Tensor) -> Tensor:
    """Cross-entropy of readings with `truth`, (B, 5, 3) as `labels` gives them."""
    losses = [F.cross_entropy(logits[name].flatten(0, 1), truth[..., i].flatten()) for i, name in enumerate(ATTRIBUTES)]
    return torch.stack(losses).sum()


class Judge(nn.Module):
    """(B, 3, 64, 64) images in [-1, 1] to features (B, 128), and to the logits of `labels` for each attribute."""

    def __init__(self, features: int = 128):
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
                for a, b in pairwise(widths)
            ),
            nn.Flatten(),
            nn.Linear(widths[-1] * 4 * 4, features),
            nn.SiLU(),
        )
        self.heads = heads(features)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.body(images)
        return features, readings(self.heads, features)

    def loss(self, images: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy of the readings of `images` with `truth`, (B, 5, 3) as `labels` gives them."""
        return reading_loss(self(images)[1], truth)

    @classmethod
    def load(cls, folder: Path = MODEL) -> Judge:
        """The trained one; `pipeline.AssetError` if it is missing or damaged."""
        check_files(folder)
        judge = cls()
        judge.load_state_dict(load_file(folder / JUDGE))
        return judge.eval()

    @torch.no_grad()
    def look(self, images: Iterable[np.ndarray], batch: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, 128) and readings (N, 5, 3), as `labels` has them, of N 64x64x3 uint8 images."""
        pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
        features, readings = [], []
        for part in pixels.split(batch):
            found, logits = self(part.float() / 127.5 - 1)
            features.append(found)
            readings.append(torch.stack([logits[name].argmax(-1) for name in ATTRIBUTES], -1))
        return torch.cat(features).numpy(), torch.cat(readings).numpy()
