"""Losses on the prediction: against the noise that was added, and against the teacher's prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import TuningError
from .base import Comparison, Loss, Values


@dataclass(frozen=True)
class Denoising(Loss):
    """The loss that diffusion models are trained with: the mean squared error to what the UNet should predict.

    Rows with the caption of another image count as 0: their noise says nothing about that caption.

    Args:
        snr_gamma: weigh timesteps by min-SNR with this limit, 5 in the paper; None weighs all alike.
    Source:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Hang et al., 2023 (min-SNR).
    """

    snr_gamma: float | None = None

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch = comparison.batch
        if batch.noise is None:
            raise TuningError(
                "the data are a teacher's own trajectories, where no noise was added that could be predicted",
                where=str(self),
                hint="leave this loss out",
            )
        target = comparison.noising.target(batch.clean, batch.noise, batch.timesteps)
        difference = comparison.student - target
        if batch.own is not None:
            difference = difference * batch.own[:, None, None, None]
        return _mean(comparison, difference, self.snr_gamma)


@dataclass(frozen=True)
class Output(Loss):
    """Distillation of the output: the mean squared error to the teacher's prediction.

    Args:
        snr_gamma: see `Denoising`.
    Source:
        Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", 2024.
    """

    snr_gamma: float | None = None

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        return _mean(comparison, comparison.student - comparison.teacher, self.snr_gamma)


def _mean(comparison: Comparison, difference: Tensor, snr_gamma: float | None) -> Tensor:
    errors = difference.float().square().mean((1, 2, 3))
    if snr_gamma is None:
        return errors.mean()
    return (errors * comparison.noising.min_snr(comparison.batch.timesteps, snr_gamma)).mean()
