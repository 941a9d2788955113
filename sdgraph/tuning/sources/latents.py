"""Images as latents of a pipeline's VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import TuningError


@torch.no_grad()
def encoded(vae: Any, images: Tensor) -> Tensor:
    """Return the distributions of latents that a VAE sees in images.

    Args:
        vae: the VAE, a diffusers `AutoencoderKL`.
        images: (B, 3, H, W) in [-1, 1].
    Returns:
        Means and standard deviations, (B, 2, C, H/8, W/8), on the CPU, without the scaling factor.
    Raises:
        TuningError: the VAE has no such distribution.
    """
    code = vae.encode(images.to(vae.device, vae.dtype))
    if not hasattr(code, "latent_dist"):
        raise TuningError(
            f"{type(vae).__name__} does not encode images as distributions",
            where="pipe.vae",
            hint="load the pipeline's own AutoencoderKL; its approximations are for previews",
        )
    return torch.stack([code.latent_dist.mean, code.latent_dist.std], 1).cpu()


def scaled(vae_config: Any, latents: Tensor) -> Tensor:
    """Return latents as the UNet expects them, (B, C, H, W): the inverse of what pipelines do before they decode.

    Args:
        vae_config: the configuration of the VAE.
        latents: as the VAE encodes them.
    """
    mean, std = getattr(vae_config, "latents_mean", None), getattr(vae_config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = (latents - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    else:
        latents = latents - (getattr(vae_config, "shift_factor", None) or 0.0)
    return latents * float(vae_config.scaling_factor)
