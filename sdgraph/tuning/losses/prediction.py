"""Losses on what the student predicts: the noise, and the expert that a timestep is routed to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import PathError, TuningError
from ...graph import Graph
from ...options import Paths, Positive
from ...runtime.feature_extractor import Tap
from ..batch import Batch
from ..noise_schedule import NoiseSchedule
from .base import Comparison, Loss, TapPairs, Values


@dataclass(frozen=True)
class Denoising(Loss):
    """The loss that diffusion models are trained with: the mean squared error to what the UNet should predict.

    Rows with the caption of another image count as 0: their noise says nothing about that caption.

    Args:
        snr_gamma: the limit of the min-SNR weights of timesteps, 5 in the paper; None weighs all alike.
    Example:
        `Denoising(weight=0.01)`
    Source:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Hang et al., 2023 (min-SNR).
    """

    snr_gamma: Positive | None = None

    def check(self, batch: Batch) -> None:
        if batch.noise is None:
            raise TuningError(
                "the data are a teacher's own trajectories, where no noise was added that could be predicted",
                where=str(self),
                hint="leave this loss out",
            )

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch = comparison.batch
        self.check(batch)
        assert batch.noise is not None
        target = comparison.noise_schedule.target(batch.clean, batch.noise, batch.timesteps)
        difference = comparison.student - target
        if batch.own is not None:
            difference = difference * batch.own[:, None, None, None]
        return _mean(difference, comparison.noise_schedule, batch.timesteps, self.snr_gamma)


@dataclass(frozen=True)
class Output(Loss):
    """Distillation of the output: the mean squared error to the teacher's prediction.

    Args:
        snr_gamma: the limit of the min-SNR weights of timesteps, as for `Denoising`.
    Example:
        `Output(snr_gamma=5.0)`
    Source:
        Kim et al., "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", 2024.
    """

    snr_gamma: Positive | None = None

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        difference = comparison.student - comparison.teacher
        return _mean(difference, comparison.noise_schedule, comparison.batch.timesteps, self.snr_gamma)


@dataclass(frozen=True)
class Guidance(Loss):
    """Distillation of the guided prediction: the mean squared error to the teacher's, in units of the guidance scale.

    Classifier-free guidance multiplies what a caption changes, and so its error. `Output` weighs that error like any
    other. It needs `guidance_pairs=True`.

    Args:
        scale: the guidance scale of the pipeline.
        snr_gamma: the limit of the min-SNR weights of timesteps, as for `Denoising`.
    Example:
        `sdgraph.tune(..., losses=[*DEFAULT, Guidance(7.5)], guidance_pairs=True)`
    Source:
        Ours. Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022.
    """

    scale: Positive = 7.5
    snr_gamma: Positive | None = None

    def check(self, batch: Batch) -> None:
        if not batch.pairs:
            raise TuningError(
                "the batch has no pairs of rows with a caption and without", where=str(self), hint="guidance_pairs=True"
            )

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        self.check(comparison.batch)
        difference = comparison.student - comparison.teacher
        captioned, empty = difference[0::2], difference[1::2]
        guided = captioned - empty + empty / self.scale
        return _mean(guided, comparison.noise_schedule, comparison.batch.timesteps[0::2], self.snr_gamma)


@dataclass(frozen=True)
class RoutingPrior(Loss):
    """The cross-entropy of routing to an expert for each of equal parts of the schedule, the first for the least noise.

    It makes experts specialise by noise level; without it they tend to collapse. With `until` its weight decays to
    zero, so that timesteps may be routed differently later.

    Args:
        at: a pattern of the modules that return the logits of experts, (B, E).
    Example:
        `RoutingPrior(weight=0.01, until=0.5)`
    Source:
        Fang et al., "Remix-DiT: Mixing Diffusion Transformers for Multi-Expert Denoising", 2024.
    """

    at: Paths = "**.routing"

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
        """Return the values that the loss compares, as `Loss.taps`.

        Args:
            student: the graph of the student.
            teacher: the graph of the teacher.
        Raises:
            PathError: no module of the student matches `at`.
        """
        try:
            return [(Tap(path), None) for path in student.matching(self.at)]
        except PathError as error:
            raise PathError(
                f"the student has no experts: no module matches {self.at!r}",
                where=str(self),
                hint="apply MECondConv, or leave this loss out",
            ) from error

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        share = comparison.batch.timesteps / len(comparison.noise_schedule)
        terms = [cross_entropy(logits.float(), (share * logits.shape[1]).long()) for logits, _ in values]
        return torch.stack(terms).mean()


def _mean(difference: Tensor, noise_schedule: NoiseSchedule, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
    errors = difference.float().square().mean((1, 2, 3))
    return errors.mean() if snr_gamma is None else (errors * noise_schedule.min_snr(timesteps, snr_gamma)).mean()
