"""Losses on the clean image that a prediction implies: its meaning, and its fine detail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...options import Bounds, Count
from .base import Comparison, Loss, Values


@dataclass(frozen=True)
class ImageFeatures(Loss):
    """Distillation of meaning: the error of an image encoder's features of the predicted clean image.

    The predictions of both models are decoded by the VAE and seen by the encoder. The squared error of the features is
    relative to their mean square, and weighted by the share of signal, because the image that follows from a very noisy
    input is a blur. Gradients pass through the encoder and the VAE, which stay as they are.

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

    def __str__(self) -> str:
        return f"ImageFeatures({type(self.encoder).__name__}, weight={self.weight})"

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch, noising = comparison.batch, comparison.noising
        mine = self._seen(noising.clean(batch.noisy, comparison.student, batch.timesteps))
        with torch.no_grad():
            its = self._seen(noising.clean(batch.noisy, comparison.teacher, batch.timesteps))
        errors = (mine - its).square().mean(1) / its.square().mean().clamp(min=1e-8)
        return (errors * noising.alphas[batch.timesteps]).mean()

    def _seen(self, latents: Tensor) -> Tensor:
        # A functional call with detached weights, so that neither module gathers gradients or changes its settings.
        vae = {name: p.detach().to(latents.device) for name, p in self.vae.named_parameters()}
        decoded = torch.func.functional_call(_Decoder(self.vae), {f"vae.{n}": p for n, p in vae.items()}, (latents,))
        encoder = {name: p.detach().to(latents.device) for name, p in self.encoder.named_parameters()}
        seen = torch.func.functional_call(self.encoder, encoder, (decoded.float(),))
        features: Tensor = seen[0] if isinstance(seen, tuple) else seen
        return features.float().flatten(1)


class _Decoder(nn.Module):
    """The decoding half of a VAE, from latents as the UNet has them."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        shift = self.vae.config.shift_factor or 0.0
        decoded: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor + shift).sample
        return decoded


@dataclass(frozen=True)
class Wavelet(Loss):
    """Distillation of detail: the absolute error of the high bands of the predicted clean latents.

    The bands are those of a Haar transform; the low band is left out. Errors are relative to the teacher's bands, and
    only samples with little noise count, because the high bands of a prediction from much noise are noise.

    Args:
        levels: how often the low band is split.
        below: the share of the schedule, from its clean end, that counts.
    Source:
        Zhang et al., "Wavelet Knowledge Distillation: Towards Efficient Image-to-Image Translation", 2022.
    """

    levels: Count = 2
    below: Annotated[float, Bounds(gt=0, le=1)] = 0.3

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch, noising = comparison.batch, comparison.noising
        counts = (batch.timesteps < self.below * len(noising)).float()[:, None]
        mine, its = (
            noising.clean(batch.noisy, prediction.float(), batch.timesteps)
            for prediction in (comparison.student, comparison.teacher)
        )
        error, size = mine.new_zeros(()), mine.new_zeros(())
        for a, b in zip(high_bands(mine, self.levels), high_bands(its, self.levels), strict=True):
            error = error + (counts * (a - b).abs().flatten(1)).sum()
            size = size + (counts * b.abs().flatten(1)).sum()
        return error / size.clamp(min=1e-8)


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
