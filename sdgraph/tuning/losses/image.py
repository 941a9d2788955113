"""Losses on the clean image that a prediction implies: its meaning, and its fine detail."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...errors import TuningError
from ...options import Bounds, Count
from ...runtime.latents import unscaled
from .base import Comparison, Loss, Values


@dataclass(frozen=True)
class ImageFeatures(Loss):
    """Distillation of meaning: the error of an image encoder's features of the predicted clean image.

    The predictions of both models are decoded by the VAE and seen by the encoder. The squared error of the features of
    a row is relative to their mean square, and weighted by the share of signal, because the image that follows from a
    very noisy input is a blur. Gradients pass through copies of the encoder and the VAE, in evaluation mode, and in
    float32 if they are in float16, where small gradients vanish.

    Args:
        encoder: a module from images (B, 3, H, W) in [-1, 1] to features (B, ...), such as CLIP's image encoder behind
            its own resizing; of a tuple, the first element counts.
        vae: the VAE of the pipeline.
    Example:
        `ImageFeatures(encoder, pipe.vae, weight=0.1)`
    Source:
        A-SDM, semantic-aware supervision; Johnson et al., "Perceptual Losses for Real-Time Style Transfer", 2016.
    """

    encoder: nn.Module
    vae: Annotated[AutoencoderKL, Any]  # or another class that decodes as it does

    @functools.cached_property
    def _copies(self) -> tuple[Any, nn.Module]:
        """The VAE and the encoder as they are computed with."""
        return _frozen(self.vae), _frozen(self.encoder)

    def __str__(self) -> str:
        return f"ImageFeatures({type(self.encoder).__name__}, weight={self.weight})"

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch, noise_schedule = comparison.batch, comparison.noise_schedule
        mine = self._seen(noise_schedule.clean(batch.noisy, comparison.student, batch.timesteps))
        with torch.no_grad():
            its = self._seen(noise_schedule.clean(batch.noisy, comparison.teacher, batch.timesteps))
        errors = (mine - its).square().mean(1) / its.square().mean(1).clamp(min=1e-8)
        return (errors * noise_schedule.alphas[batch.timesteps]).mean()

    def _seen(self, latents: Tensor) -> Tensor:
        vae, encoder = self._copies
        decoded = vae.to(latents.device).decode(unscaled(vae.config, latents).to(vae.dtype)).sample
        dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
        seen = encoder.to(latents.device)(decoded.to(dtype))
        features: Tensor = seen[0] if isinstance(seen, tuple) else seen
        return features.float().flatten(1)


def _frozen(module: nn.Module) -> nn.Module:
    result = copy.deepcopy(module).eval().requires_grad_(False)
    return result.float() if any(p.dtype == torch.float16 for p in result.parameters()) else result


@dataclass(frozen=True)
class Wavelet(Loss):
    """Distillation of detail: the absolute error of the high bands of the predicted clean latents.

    The bands are those of a Haar transform; the low band is left out. The error of a row is relative to the teacher's
    bands. Rows with much noise count as 0, because the high bands of a prediction from much noise are noise.

    Args:
        levels: the number of times that the low band is split.
        below: the share of the schedule, from its clean end, that counts.
    Example:
        `Wavelet(levels=2, below=0.3, weight=0.1)`
    Source:
        Zhang et al., "Wavelet Knowledge Distillation: Towards Efficient Image-to-Image Translation", 2022.
    """

    levels: Count = 2
    below: Annotated[float, Bounds(gt=0, le=1)] = 0.3

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch, noise_schedule = comparison.batch, comparison.noise_schedule
        counts = (batch.timesteps < self.below * len(noise_schedule)).float()
        mine, its = (
            noise_schedule.clean(batch.noisy, prediction.float(), batch.timesteps)
            for prediction in (comparison.student, comparison.teacher)
        )
        if mine.shape[-1] % 2 or mine.shape[-2] % 2:
            raise TuningError(
                f"latents of {mine.shape[-2]} x {mine.shape[-1]} have no bands",
                where=str(self),
                hint="give them even sides",
            )
        a, b = (torch.cat([band.flatten(1) for band in high_bands(one, self.levels)], 1) for one in (mine, its))
        return (counts * (a - b).abs().sum(1) / b.abs().sum(1).clamp(min=1e-8)).mean()


def high_bands(image: Tensor, levels: int) -> list[Tensor]:
    """Return the three high bands of every level of a Haar transform, (B, 3 C, H / 2^level, W / 2^level).

    Args:
        image: (B, C, H, W).
        levels: the number of levels; the transform ends early at an odd size.
    """
    bands = []
    for _ in range(levels):
        if image.shape[-1] % 2 or image.shape[-2] % 2:
            break
        a, b = image[..., ::2, ::2], image[..., ::2, 1::2]
        c, d = image[..., 1::2, ::2], image[..., 1::2, 1::2]
        bands.append(torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2)
        image = (a + b + c + d) / 2
    return bands
