"""The noise schedule of training: from clean latents to noised ones, and from a prediction back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TuningError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule with discrete timesteps: noised = sqrt(alpha) clean + sqrt(1 - alpha) noise.

    Args:
        alphas: the cumulative products of 1 - beta, (T,).
        prediction: the quantity that the UNet predicts: "epsilon", "v_prediction" or "sample".
    Example:
        `NoiseSchedule.of(pipe.scheduler).noised(clean, noise, timesteps)`
    Source:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020; "v_prediction": Salimans and Ho, "Progressive
        Distillation for Fast Sampling of Diffusion Models", 2022.
    """

    alphas: Tensor
    prediction: str

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """Return the noise schedule of a diffusers scheduler.

        Args:
            scheduler: the scheduler, with `alphas_cumprod` and a prediction type.
        Raises:
            TuningError: the scheduler has no such schedule, as those of flow matching.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        if alphas is None or prediction not in PREDICTIONS:
            raise TuningError(
                f"{type(scheduler).__name__} has no noise schedule with alphas_cumprod and a prediction type of "
                f"{', '.join(PREDICTIONS)}",
                where="scheduler",
                hint="pass the pipeline's own scheduler, or a DDPMScheduler of its configuration",
            )
        return cls(torch.as_tensor(alphas, dtype=torch.float32), prediction)

    def to(self, device: torch.device) -> NoiseSchedule:
        """Return the schedule on a device.

        Args:
            device: the device.
        """
        return NoiseSchedule(self.alphas.to(device), self.prediction)

    def __len__(self) -> int:
        return len(self.alphas)

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noised latents, (B, C, H, W).

        Args:
            clean: the clean latents, (B, C, H, W).
            noise: the noise, (B, C, H, W).
            timesteps: the timesteps, (B,).
        """
        signal, spread = self._at(timesteps)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the prediction, (B, C, H, W).

        Args:
            clean: the clean latents, (B, C, H, W).
            noise: the noise that is added to them, (B, C, H, W).
            timesteps: the timesteps, (B,).
        """
        signal, spread = self._at(timesteps)
        return {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[self.prediction]

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents (B, C, H, W) that a prediction implies.

        Where a schedule ends without signal, none follow from predicted noise; those that are returned are finite.

        Args:
            noisy: the noised latents, (B, C, H, W).
            prediction: the prediction of a UNet for them, (B, C, H, W).
            timesteps: the timesteps, (B,).
        """
        signal, spread = self._at(timesteps)
        if self.prediction == "epsilon":
            return (noisy - spread * prediction) / signal.clamp(min=1e-4)
        return signal * noisy - spread * prediction if self.prediction == "v_prediction" else prediction

    def jump(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
        """Return the latents (B, C, H, W) that a step of DDIM arrives at.

        Args:
            noisy: the noised latents, (B, C, H, W).
            prediction: the prediction of a UNet for them, (B, C, H, W).
            timesteps: the timesteps, (B,).
            alphas: the cumulative products of 1 - beta where the step ends, (B,).
        Source:
            Song et al., "Denoising Diffusion Implicit Models", 2021.
        """
        signal, spread = self._at(timesteps)
        clean = self.clean(noisy, prediction, timesteps)
        noise = (noisy - signal * clean) / spread
        end = alphas[:, None, None, None]
        return end.sqrt() * clean + (1 - end).sqrt() * noise

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the weights of the squared errors, (B,).

        Args:
            timesteps: the timesteps, (B,).
            gamma: the signal-to-noise ratio above which all timesteps have the same weight on the clean latents.
        Source:
            Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023.
        """
        alpha = self.alphas[timesteps]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=gamma)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)  # weight / snr, also where there is no signal
        return weight / (snr + 1) if self.prediction == "v_prediction" else weight

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas[timesteps][:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()
