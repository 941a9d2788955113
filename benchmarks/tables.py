"""Markdown tables and the figures in them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def ratio(mine: Sequence[float], eager: Sequence[float]) -> str:
    """Median and quartiles of the ratios of times taken in the same turn."""
    ratios = [m / e for m, e in zip(mine, eager, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
