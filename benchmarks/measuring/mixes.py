"""Mixes of UNets over calls beside their parts: margins in the same time, Pareto fronts, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np

from .tables import QUICK, markdown

Result = Mapping[str, Any]
QUALITIES = {"psnr": "PSNR", "shape and colour": "captions"}
MARGIN = {"psnr": 0.1, "shape and colour": 0.0}  # dB and share by which a mix has to be better to count


def quality(method: Result, key: str) -> float:
    """Return a figure of a method's images: the share of captions shown right, or the PSNR to the converged image."""
    return float(method["converged"][key])


def timed(result: Result) -> dict[str, Result]:
    """Return the methods that have times and figures."""
    return {name: m for name, m in result["methods"].items() if "time" in m and "converged" in m}


def affordable(methods: Iterable[Result], time: float, key: str) -> float | None:
    """Return the best figure that a UNet which is no mix has in a time, interpolated between its numbers of steps.

    Args:
        methods: the methods.
        time: the time, in calls of the teacher.
        key: the figure.
    Returns:
        The figure; None outside of the measured times of all of them.
    """
    parts = sorted((m for m in methods if m["kind"] != "mix"), key=lambda m: (m["what"], m["solver"], m["time"]))
    found = []
    for _, line in groupby(parts, key=lambda m: (m["what"], m["solver"])):
        points = [(m["time"], quality(m, key)) for m in line]
        times, values = zip(*points, strict=True)
        if times[0] <= time:  # beyond the last one, that one is still affordable
            found.append(float(np.interp(time, times, values)))
            found += [value for t, value in points if t <= time]
    return max(found, default=None)


def margin(methods: Mapping[str, Result], name: str, key: str) -> float | None:
    """Return the figure of a mix less the best that its parts, and all other methods, reach in its time."""
    method = methods[name]
    if method["kind"] != "mix":
        return None
    best = affordable(methods.values(), method["time"], key)
    return None if best is None else quality(method, key) - best


def front(methods: Mapping[str, Result], key: str) -> list[str]:
    """Return the names of the Pareto-optimal methods, by time."""
    names: list[str] = []
    for name in sorted(methods, key=lambda name: (methods[name]["time"], -quality(methods[name], key))):
        if not names or quality(methods[name], key) > quality(methods[names[-1]], key):
            names.append(name)
    return names


def winners(methods: Mapping[str, Result], key: str) -> list[str]:
    """Return the Pareto-optimal mixes that none of their parts reaches in the same time, the best margin first."""
    margins = {name: margin(methods, name, key) for name in front(methods, key)}
    found = {name: each for name, each in margins.items() if each is not None and each > MARGIN[key]}
    return sorted(found, key=lambda name: -found[name])


def tables(result: Result) -> dict[str, str]:
    """Return the tables of `switching.py`: conditions, mixes that win, both fronts, and all methods."""
    methods = timed(result)
    first = next(iter(methods.values()))
    steps = " steps of ".join(map(str, reversed(result["converged"])))
    conditions = (
        f"{' and '.join(dict.fromkeys(m['timed on'] for m in methods.values()))}, float32; torch {first['torch']}, "
        f"diffusers {first['diffusers']}; {result['captions']} held-out captions. Time: in calls of the teacher, "
        f"medians of turns; a switch takes {result['switched']:.3f} of the sum of its calls. PSNR: median, to the "
        f"teacher's image of {steps}, and to its image of the same solver and steps. Margin: over the best that "
        f"teacher, student, masks and inherited features reach in the same time, between their numbers of steps "
        f"({first['date'][:10]})."
    )
    made = {"conditions": f"{conditions} {QUICK}" if result["quick"] else conditions}
    count = sum(m["kind"] == "mix" for m in methods.values())
    rows = [("quality", "mixes", "on the Pareto front", "better than all parts", "best of them", "margin")]
    for key, title in QUALITIES.items():
        names = winners(methods, key)
        on = sum(methods[name]["kind"] == "mix" for name in front(methods, key))
        best = (names[0], _gain(methods, names[0], key)) if names else ("none", "-")
        rows.append((title, str(count), str(on), str(len(names)), *best))
    made["summary"] = markdown(rows)
    for key, title in QUALITIES.items():
        rows = [(f"on the front of {title}", "time", "PSNR", "captions", "margin")]
        rows += [(name, *_cells(methods[name]), _gain(methods, name, key)) for name in front(methods, key)]
        made[f"front-{'psnr' if key == 'psnr' else 'captions'}"] = markdown(rows)
    rows = [("method", "time", "PSNR", "captions", "PSNR to same steps", "margin of PSNR", "margin of captions")]
    for name, method in methods.items():
        same = "-" if method["same"] is None else f"{method['same']:.1f} dB"
        rows.append((name, *_cells(method), same, *(_gain(methods, name, key) for key in QUALITIES)))
    made["all"] = markdown(rows)
    return made


def _cells(method: Result) -> tuple[str, str, str]:
    shown, psnr = quality(method, "shape and colour"), quality(method, "psnr")
    return f"{method['time']:.2f}", f"{psnr:.1f} dB", f"{100 * shown:.1f} %"


def _gain(methods: Mapping[str, Result], name: str, key: str) -> str:
    gain = margin(methods, name, key)
    if gain is None:
        return "-"
    return f"{gain:+.1f} dB" if key == "psnr" else f"{100 * gain:+.1f} %"
