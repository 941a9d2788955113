"""The solvers of the frontier, by the names that its tables give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules

KARRAS = "DPM++ 2M Karras"


class AlignYourSteps(DPMSolverMultistepScheduler):
    """DPM-Solver++ 2M at the published timesteps for Stable Diffusion, log-linearly interpolated to a number of steps.

    Source:
        Sabour et al., "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models", 2024.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        levels = -self.lambda_t.double().numpy()  # log(sigma / alpha) of all training timesteps
        published = np.log(AysSchedules["StableDiffusionSigmas"][:-1])  # the last is 0, the end of the last step
        knots = np.append(published, levels[0])  # the paper's least noise
        wanted = np.interp(np.linspace(0, 1, num_inference_steps + 1)[:-1], np.linspace(0, 1, len(knots)), knots)
        timesteps = np.interp(wanted, levels, np.arange(len(levels))).round().astype(int)
        super().set_timesteps(device=device, timesteps=timesteps.tolist())


def _solver(kind: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda config: kind.from_config(config, **options)


# Trailing timesteps begin at pure noise, as the latents do. At 20 steps or fewer the model's own spacing is worse.
TRAILING = {"timestep_spacing": "trailing"}
SOLVERS: Mapping[str, Callable[[Any], Any]] = {
    KARRAS: _solver(DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "DPM++ 2M": _solver(DPMSolverMultistepScheduler, **TRAILING),
    "UniPC": _solver(UniPCMultistepScheduler, **TRAILING),
    "AYS": _solver(AlignYourSteps),
    "DDIM": _solver(DDIMScheduler, **TRAILING),
    "Euler": _solver(EulerDiscreteScheduler, **TRAILING),
    "DDIM of the model": _solver(DDIMScheduler),  # leading timesteps
}
