"""Margins over the best plain solver in the same time, and the Pareto-optimal methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Figures = Mapping[str, Mapping[str, Any]]


def best_plain(methods: Figures, time: float, key: str) -> float | None:
    """Return the best figure that a plain solver has in a time, interpolated between its numbers of steps.

    Args:
        methods: the figures of all methods by name.
        time: the time, in the unit of the figures.
        key: the figure, a PSNR.
    Returns:
        The figure in dB; None outside of the measured times of all solvers.
    """
    found = []
    for solver in {method["solver"] for method in methods.values()}:
        points = sorted(
            (method["time"], method[key])
            for method in methods.values()
            if method["kind"] == "plain" and method["solver"] == solver and method[key] is not None
        )
        if points and points[0][0] <= time <= points[-1][0]:
            found.append(float(np.interp(time, *zip(*points, strict=True))))
    return max(found, default=None)


def margin(methods: Figures, name: str, key: str) -> float | None:
    """Return the PSNR of a method less that of the best plain solver in its time; None for plain methods."""
    method = methods[name]
    if method["kind"] in ("plain", "reference") or method[key] is None:
        return None
    plain = best_plain(methods, method["time"], key)
    return None if plain is None else method[key] - plain


def front(methods: Figures, key: str) -> list[str]:
    """Return the names of the Pareto-optimal methods, by time.

    Methods in other units of time and the reference are left out.
    """
    units = [method["unit"] for method in methods.values()]
    common = max(set(units), key=units.count)
    names: list[str] = []
    for name in sorted(methods, key=lambda name: (methods[name]["time"], -(methods[name][key] or 0))):
        method = methods[name]
        if method["kind"] == "reference" or method["unit"] != common or method[key] is None:
            continue
        if not names or method[key] > methods[names[-1]][key]:
            names.append(name)
    return names
