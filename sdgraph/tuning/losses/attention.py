"""Semantic-aware supervision on attention: which word is where in the image."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PathError
from ...graph import Graph
from ...options import Text
from ...runtime.feature_extractor import Tap
from .base import Comparison, Loss, TapPairs, Values

CROSS = r".+\.attn2"


@dataclass(frozen=True)
class AttentionMaps(Loss):
    """Distillation of cross-attention maps: the Kullback-Leibler divergence between the words that a place attends to.

    A map is the mean over heads of softmax(q k / sqrt(d)), (B, places, words). The divergence runs from the teacher's
    map to the student's, and is the mean over places and attentions. The A-SDM papers do not say how they compare maps;
    the divergence is our decision, because maps are distributions.

    Args:
        at: module paths of attentions; by default all cross-attentions that both models have.
    Example:
        `AttentionMaps()`, `AttentionMaps(("up_blocks.1.attentions.0.transformer_blocks.0.attn2",), weight=0.1)`
    Source:
        A-SDM, semantic-aware supervision; maps as word positions: Hertz et al., "Prompt-to-Prompt", 2022.
    """

    at: tuple[Text, ...] = ()

    def taps(self, student: Graph, teacher: Graph) -> TapPairs:
        """Return the values that the loss compares, as `Loss.taps`.

        Args:
            student: the graph of the student.
            teacher: the graph of the teacher.
        Raises:
            PathError: the models share no cross-attention.
        """
        known = set(student.paths())
        paths = self.at or [p for p in teacher.paths() if re.fullmatch(CROSS, p) and p in known]
        if not paths:
            raise PathError("student and teacher share no cross-attention", where=str(self), hint="leave this loss out")
        return [(Tap(path, part), Tap(path, part)) for path in paths for part in ("query", "key")]

    def __call__(self, comparison: Comparison, values: Values) -> Tensor:
        terms = []
        for (query, other_query), (key, other_key) in zip(values[::2], values[1::2], strict=True):
            mine, its = attention_map(query, key), attention_map(other_query, other_key)
            terms.append((its * (its.clamp(min=1e-9).log() - mine.clamp(min=1e-9).log())).sum(-1).mean())
        return torch.stack(terms).mean()


def attention_map(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean over heads of the attention of queries to keys, (B, places, words).

    Args:
        query: (B, heads, places, features).
        key: (B, heads, words, features).
    """
    scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
    weights: Tensor = scores.softmax(-1)
    return weights.mean(1)
