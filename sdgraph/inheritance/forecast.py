"""What a site that is not refreshed is taken to be."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch


def forecast(known: Sequence[tuple[int, torch.Tensor]], number: int) -> torch.Tensor:
    """The value at call `number`, from those at some earlier ones: the polynomial through them (Lagrange's form).

    One value is repeated, through two goes a line, through three a parabola. At equal distances that is TaylorSeer's
    forecast by finite differences (Liu et al., 2025) of order 0, 1, 2.

    Args:
        known: call numbers, all different, and values of one shape.
    """
    if len(known) == 1:
        return known[0][1]
    at = [n for n, _ in known]
    weights = [prod((number - m) / (n - m) for m in at if m != n) for n in at]
    total = known[0][1] * weights[0]
    for (_, value), weight in zip(known[1:], weights[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total
