"""Losses on how alike the samples of a batch are to a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import Comparison, Values
from .features import Features


@dataclass(frozen=True)
class Similarity(Features):
    """Similarity-preserving distillation: samples that are alike to the teacher shall be alike to the student.

    It compares the matrices of products between the samples of a batch, with rows of unit length, so the widths of the
    two models may differ. Use batches of 8 and more.

    Args:
        at: see `Features`.
    Source:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019.
    """

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        terms = [(_products(mine) - _products(its)).square().sum() / len(mine) ** 2 for mine, its in values]
        return torch.stack(terms).mean()


def _products(features: Tensor) -> Tensor:
    flat = features.float().flatten(1)
    return normalize(flat @ flat.T, dim=1)
