"""Losses on how alike the samples of a batch are to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import TuningError
from ...options import Bounds
from .base import Comparison, Values
from .features import Features


@dataclass(frozen=True)
class Similarity(Features):
    """Similarity-preserving distillation: samples that are alike to the teacher shall be alike to the student.

    It compares the matrices of products between the samples of a group, with rows of unit length, so the widths of the
    two models may differ. A group is so many samples of a batch in a row, and so the same however a batch is parted
    into accumulated ones and processes; in the paper it is the batch.

    Args:
        at: see `Features`.
        group: the number of samples that are compared with one another; `train_batch_size` is a multiple of it.
    Raises:
        TuningError: the samples of a forward pass are no whole groups; raised at the first step.
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
