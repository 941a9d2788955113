"""What a way gains over the plain solvers in the same time, and which ways no other one beats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Figures = Mapping[str, Mapping[str, Any]]


def best_plain(ways: Figures, time: float, key: str) -> float | None:
    """Return the best figure that a plain solver has in a time, interpolated between its numbers of steps.

    Args:
        ways: the figures of all ways by name.
        time: the time, in the unit of the figures.
        key: the figure, a PSNR.
    Returns:
        The figure in dB; None outside of the measured times of all solvers.
    """
    found = []
    for solver in {way["solver"] for way in ways.values()}:
        points = sorted(
            (way["time"], way[key])
            for way in ways.values()
            if way["kind"] == "plain" and way["solver"] == solver and way[key] is not None
        )
        if points and points[0][0] <= time <= points[-1][0]:
            found.append(float(np.interp(time, *zip(*points, strict=True))))
    return max(found, default=None)


def margin(ways: Figures, name: str, key: str) -> float | None:
    """Return the PSNR of a way less that of the best plain solver in its time; None for plain ways and outside."""
    way = ways[name]
    if way["kind"] in ("plain", "reference") or way[key] is None:
        return None
    plain = best_plain(ways, way["time"], key)
    return None if plain is None else way[key] - plain


def front(ways: Figures, key: str) -> list[str]:
    """Return the names of the ways in the order of their times for which no other way is as quick and better.

    Ways in other units of time and the reference are left out.
    """
    units = [way["unit"] for way in ways.values()]
    common = max(set(units), key=units.count)
    names: list[str] = []
    for name in sorted(ways, key=lambda name: (ways[name]["time"], -(ways[name][key] or 0))):
        way = ways[name]
        if way["kind"] == "reference" or way["unit"] != common or way[key] is None:
            continue
        if not names or way[key] > ways[names[-1]][key]:
            names.append(name)
    return names
