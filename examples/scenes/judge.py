"""The judge: a small classifier that recognises which objects are in an image of a scene, and where."""

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
    """Return the labels of a scene: indices (5, 3) of shape, colour and size by place, in the order of `PLACES`.

    The index 0 means that there is no object.
    """
    labels = torch.zeros(len(PLACES), len(ATTRIBUTES), dtype=torch.long)
    for thing in scene.things:
        row = tuple(PLACES).index(thing.place)
        for column, (name, values) in enumerate(ATTRIBUTES.items()):
            labels[row, column] = 1 + values.index(getattr(thing, name))
    return labels


def heads(features: int) -> nn.ModuleDict:
    """Create a linear layer for each attribute, from features to the logits of all places."""
    return nn.ModuleDict(
        {name: nn.Linear(features, len(PLACES) * (1 + len(values))) for name, values in ATTRIBUTES.items()}
    )


def readings(heads: nn.ModuleDict, features: Tensor) -> dict[str, Tensor]:
    """Return the logits (B, 5, values) of each attribute, from features (B, F)."""
    return {name: head(features).unflatten(1, (len(PLACES), -1)) for name, head in heads.items()}


def reading_loss(logits: dict[str, Tensor], truth: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, 5, values) by attribute with the labels `truth`, (B, 5, 3)."""
    losses = [F.cross_entropy(logits[name].flatten(0, 1), truth[..., i].flatten()) for i, name in enumerate(ATTRIBUTES)]
    return torch.stack(losses).sum()


class Judge(nn.Module):
    """The classifier: images (B, 3, 64, 64) in [-1, 1] to features (B, 128) and logits (B, 5, values) by attribute."""

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
        """Return the cross-entropy of the logits of `images` (B, 3, 64, 64) with the labels `truth`, (B, 5, 3)."""
        return reading_loss(self(images)[1], truth)

    @classmethod
    def load(cls, folder: Path = MODEL) -> Judge:
        """Load the trained judge.

        Raises:
            pipeline.AssetError: a file is missing or damaged.
        """
        check_files(folder)
        judge = cls()
        judge.load_state_dict(load_file(folder / JUDGE))
        return judge.eval()

    @torch.no_grad()
    def look(self, images: Iterable[np.ndarray], batch: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Return the features (N, 128) and the predicted labels (N, 5, 3) of N uint8 images (64, 64, 3)."""
        pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
        features, readings = [], []
        for part in pixels.split(batch):
            part_features, logits = self(part.float() / 127.5 - 1)
            features.append(part_features)
            readings.append(torch.stack([logits[name].argmax(-1) for name in ATTRIBUTES], -1))
        return torch.cat(features).numpy(), torch.cat(readings).numpy()
