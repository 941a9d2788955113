"""Losses on a teacher's paths: the student's call arrives where several calls of the teacher do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import TuningError
from ...options import Positive
from ..batch import Batch
from .base import Comparison, Loss, Values


@dataclass(frozen=True)
class Trajectory(Loss):
    """Trajectory regression: the mean squared error between a DDIM step of the student and the teacher's path.

    The step runs from one of the student's calls to the next, where the teacher has taken several with guidance. So the
    student learns to jump and to be guided at once, and the teacher is not called. Large models blur with one or two
    calls, because the mean over paths is no image; `Phased` may follow.

    Example:
        `sdgraph.tune(student, teacher, Paths(prompts, pipe, cache="paths", calls=4), losses=[Trajectory()], ...)`
    Source:
        Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed", 2021.
    """

    reads_teacher: ClassVar[bool] = False

    def check(self, batch: Batch) -> None:
        _check_path(self, batch)

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        target = _check_path(self, comparison.batch)
        return (_jump(comparison, comparison.student) - target).square().mean()


@dataclass(frozen=True)
class Phased(Loss):
    """Phased consistency without an adversary: from all points of a phase the student jumps to the same end of it.

    The phases lie between the student's calls. From a recorded point the student jumps to the end of its phase, and so
    it does, without gradients, from the next recorded point, one guided step of the teacher later; both should agree.
    At the last point of a phase the path itself is the target. Inference is plain DDIM at the edges of the phases.

    Args:
        huber: the size of differences from which the pseudo-Huber loss is linear.
    Example:
        `sdgraph.tune(student, teacher, Paths(prompts, pipe, cache="paths", calls=4, points="grid"), losses=[Phased()])`
    Source:
        Wang et al., "Phased Consistency Models", 2024.
    """

    reads_teacher: ClassVar[bool] = False
    reads_following: ClassVar[bool] = True

    huber: Positive = 1e-3

    def check(self, batch: Batch) -> None:
        _check_path(self, batch)

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        batch = comparison.batch
        end = _check_path(self, batch)
        assert batch.following is not None
        assert batch.following_timesteps is not None
        assert batch.target_alphas is not None
        assert comparison.following is not None
        arrived = comparison.noise_schedule.jump(
            batch.following, comparison.following, batch.following_timesteps, batch.target_alphas
        )
        last = torch.eq(batch.following, end).flatten(1).all(1)[:, None, None, None]
        difference = _jump(comparison, comparison.student) - torch.where(last, end, arrived.detach())
        return ((difference.square() + self.huber**2).sqrt() - self.huber).mean()


def _jump(comparison: Comparison, prediction: Tensor) -> Tensor:
    """Return where a DDIM step with a prediction arrives, at the noise of the target."""
    batch = comparison.batch
    assert batch.target_alphas is not None
    return comparison.noise_schedule.jump(batch.noisy, prediction.float(), batch.timesteps, batch.target_alphas)


def _check_path(loss: Loss, batch: Batch) -> Tensor:
    """Return the targets of a batch, or refuse a batch that has none, or has other captions than its paths."""
    if batch.target is None:
        raise TuningError(
            "the data have no paths of a teacher", where=str(loss), hint="pass sdgraph.tuning.Paths(prompts, pipe, ...)"
        )
    if batch.own is not None and not batch.own.all():
        raise TuningError(
            "a path is that of its caption, and rows have other captions",
            where=str(loss),
            hint="leave out random_conditioning",
        )
    return batch.target
