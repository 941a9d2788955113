"""A loss on the routing of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import PathError
from ...graph import Graph
from ...options import Paths
from ..feature_extractor import Tap
from .base import Comparison, Loss, TapPairs, Values


@dataclass(frozen=True)
class RoutingPrior(Loss):
    """The cross-entropy of routing to an expert for each of equal parts of the schedule, the first for the least noise.

    It parts experts that would do without each other otherwise. With `until` it fades, so that they may meet again.

    Args:
        at: a pattern of the modules that return the logits of experts, (B, E).
    Example:
        `RoutingPrior(weight=0.01, until=0.5)`
    Source:
        Fang et al., "Remix-DiT: Mixing Diffusion Transformers for Multi-Expert Denoising", 2024.
    """

    at: Paths = "**.routing"

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
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
