"""Rank correlations, and a predictor that learns to rank sets of removals from a few that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightgbm
import numpy as np
from scipy import stats

FOLD = 4  # sets that are left out at a time
ROUNDS = 60  # trees
LEARNER: dict[str, Any] = {
    "objective": "lambdarank",
    "num_leaves": 4,
    "min_data_in_leaf": 1,
    "min_data_in_bin": 1,
    "feature_pre_filter": False,
    "seed": 0,
    "deterministic": True,
    "num_threads": 1,
    "verbosity": -1,
}


def correlation(scores: Sequence[float], results: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, None where it is not defined."""
    if len(scores) < 3 or len(set(scores)) < 2 or len(set(results)) < 2:
        return None
    return float(stats.spearmanr(scores, results).statistic)


class Ranker:
    """LambdaRank over the features of sets.

    Args:
        rows: the features of sets whose result is known.
        results: their results, of which larger ones are better.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]], results: Sequence[float]) -> None:
        self._names = sorted(rows[0])
        labels = stats.rankdata(results, method="dense").astype(int) - 1
        data = lightgbm.Dataset(self._matrix(rows), labels, group=[len(rows)])
        self._ranker = lightgbm.train({**LEARNER, "label_gain": list(range(len(rows)))}, data, ROUNDS)

    def scores(self, rows: Sequence[Mapping[str, float]]) -> list[float]:
        """Return a score of each set; larger ones are predicted to be better."""
        return [float(score) for score in self._ranker.predict(self._matrix(rows))]

    def _matrix(self, rows: Sequence[Mapping[str, float]]) -> Any:
        return np.array([[row[name] for name in self._names] for row in rows])


def left_out(rows: Sequence[Mapping[str, float]], results: Sequence[float]) -> list[float]:
    """Return the rank that each set has among all by a predictor that has not seen it."""
    ranks, order = [0.0] * len(rows), np.random.default_rng(0).permutation(len(rows))
    for fold in np.array_split(order, max(2, len(rows) // FOLD)):
        seen = [n for n in range(len(rows)) if n not in fold]
        every = stats.rankdata(Ranker([rows[n] for n in seen], [results[n] for n in seen]).scores(rows))
        for number in fold:
            ranks[number] = float(every[number])
    return ranks
