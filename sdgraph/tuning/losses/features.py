"""Losses on features: what blocks, layers or attentions return."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import PathError, SpecError, TuningError, did_you_mean
from ...graph import Graph
from ...ir.nodes import values as values_of
from ...options import Bounds, Positive, Text
from ...runtime.feature_extractor import Tap
from .base import Comparison, Loss, TapPairs, Values

PRESETS = {
    "stage": r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)",
    "layer": r"((down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions)\.\d+)",
    "self-attention": r"(.+\.attn1)",
}


@dataclass(frozen=True)
class Features(Loss):
    """Distillation of features: the squared error of values inside the models, relative to the teacher's mean square.

    Every row of every pair of features counts alike, whatever its size. Where the widths differ, a 1x1 convolution that
    is trained along maps the student's features to the teacher's width. Values farther than two standard deviations
    from their mean in a row, in either model, are left out: a few outliers dominate the sum otherwise, and can make it
    diverge.

    Args:
        at: a preset, or module paths; a pair of paths names the student's and the teacher's. "stage" is the output of
            every block (BK-SDM), "layer" of every resnet and attention (SSD-1B), "self-attention" of every attn1
            (KOALA). A preset leaves out what one of the models does not have, or has at another resolution, as
            "bk-sdm-tiny" has its third block.
        sigma: standard deviations beyond which values are left out; None keeps all.
    Raises:
        SpecError: there is no such preset.
        TuningError: modules that are named have features of different resolutions.
    Example:
        `Features("stage")`, `Features(("mid_block", ("up_blocks.1", "up_blocks.2")), weight=0.5)`
    Source:
        Kim et al., "BK-SDM", 2024; masks: Fang et al., "TinyFusion: Diffusion Transformers Learned Shallow", 2025;
        normalisation: Zhang et al., "LAPTOP-Diff", 2024.
    """

    at: Text | Annotated[tuple[Text | tuple[Text, Text], ...], Bounds(length=1)] = "stage"
    sigma: Positive | None = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.at, str) and self.at not in PRESETS:
            hint = did_you_mean(self.at, PRESETS) or f"presets: {', '.join(PRESETS)}; or a tuple of module paths"
            raise SpecError(f"there are no features named {self.at!r}", where="Features", hint=hint)

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
        """Return the values that the loss compares, as `Loss.taps`.

        Args:
            student: the graph of the student.
            teacher: the graph of the teacher.
        Raises:
            PathError: the models share no such features, or lack a module that is named.
            TuningError: modules that are named have features of different resolutions.
        """
        if not isinstance(self.at, str):
            pairs = [(path, path) if isinstance(path, str) else path for path in self.at]
            taps = [(Tap(mine), Tap(its)) for mine, its in pairs]
            for mine, its in taps:
                if _resolution(mine, student) != _resolution(its, teacher):
                    raise TuningError(
                        f"the student's {mine.path} has another resolution than the teacher's {its.path}",
                        where=str(self),
                        hint="name modules of the same resolution",
                    )
            return taps
        known = set(student.paths())
        both = [Tap(p) for p in teacher.paths() if re.fullmatch(PRESETS[self.at], p) and p in known]
        shared = [tap for tap in both if _resolution(tap, student) == _resolution(tap, teacher)]
        if not shared:
            raise PathError(
                f"student and teacher share no features of the preset {self.at!r}",
                where="Features",
                hint="name pairs of paths, Features((('mid_block', 'mid_block'),))",
            )
        return [(tap, tap) for tap in shared]

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        return torch.stack([self._error(student.float(), teacher.float()) for student, teacher in values]).mean()

    def _error(self, student: Tensor, teacher: Tensor) -> Tensor:
        kept = torch.ones_like(teacher)
        if self.sigma is not None:
            kept = _within(student.detach(), self.sigma) * _within(teacher, self.sigma)
        error, size = ((kept * square).flatten(1).sum(1) for square in ((student - teacher).square(), teacher.square()))
        return (error / size.clamp(min=1e-8)).mean()


@dataclass(frozen=True)
class Similarity(Features):
    """Similarity-preserving distillation: samples that are similar to the teacher become similar to the student.

    It compares the matrices of products between the samples of a group, with rows of unit length, so the widths of the
    two models may differ. A group consists of consecutive samples of a batch, so that it does not depend on how a batch
    is divided into accumulated ones and processes; in the paper it is the batch.

    Args:
        at: the values to compare, as for `Features`.
        group: the number of samples that are compared with one another; `train_batch_size` is a multiple of it.
        weight: the factor of the term, as for `Loss`.
        until: the share of the run at whose end it is zero, as for `Loss`.
    Raises:
        TuningError: the samples of a forward pass are no whole groups; raised at the first step.
    Example:
        `Similarity("stage", group=8)`
    Source:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019.
    """

    group: Annotated[int, Bounds(ge=2)] = 8

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        rows = len(values[0][0])
        if rows % self.group:
            raise TuningError(
                f"{rows} samples of a forward pass are no whole groups of {self.group}",
                where=str(self),
                hint=f"pass a train_batch_size that is a multiple of {self.group}, or Similarity(group=...)",
            )
        return torch.stack([(self._products(a) - self._products(b)).square().mean() for a, b in values]).mean()

    def _products(self, features: Tensor) -> Tensor:
        """Return the products of the samples of all groups, (groups, group, group)."""
        flat = features.float().reshape(len(features) // self.group, self.group, -1)
        return normalize(flat @ flat.transpose(1, 2), dim=2)


def _resolution(tap: Tap, graph: Graph) -> tuple[int, ...]:
    """Return the shape of a value but for its samples and its width."""
    (value, _) = values_of(tap.node(graph))
    return tuple(value.shape[2:] if value.ndim == 4 else value.shape[1:-1])


def _within(values: Tensor, sigma: float) -> Tensor:
    """Return 1 where the values of a row lie within `sigma` standard deviations of their mean, 0 elsewhere."""
    within = tuple(range(1, values.ndim))
    deviation, mean = torch.std_mean(values, within, correction=0, keepdim=True)
    return ((values - mean).abs() <= sigma * deviation).float()
