"""Images as latents of a pipeline's VAE."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..errors import TuningError


def as_pipelines_run_it(vae: Any) -> Any:
    """Return a VAE, or a copy in float32 where its configuration says that it overflows in float16, as SDXL's does."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    return copy.deepcopy(vae).float() if upcast else vae


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
        latents: the latents as the VAE encodes them, (B, C, H, W).
    """
    mean, std = _statistics(vae_config, latents)
    return (latents - mean) / std * float(vae_config.scaling_factor)


def unscaled(vae_config: Any, latents: Tensor) -> Tensor:
    """Return latents as a VAE decodes them, (B, C, H, W): the inverse of `scaled`."""
    mean, std = _statistics(vae_config, latents)
    return latents / float(vae_config.scaling_factor) * std + mean


def _statistics(vae_config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and deviations of the channels of latents, (1, C, 1, 1), where pipelines heed them."""
    mean, std = getattr(vae_config, "latents_mean", None), getattr(vae_config, "latents_std", None)
    if mean is None or std is None:
        mean, std = [getattr(vae_config, "shift_factor", None) or 0.0], [1.0]
    return tuple(latents.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (mean, std))  # type: ignore[return-value]
