"""The tables of what tuning recovers, and of the honest alternative, fewer steps of the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tables import markdown

BUDGETS = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20)  # calls of the teacher


def report(result: dict[str, Any]) -> str:
    """Return all tables of a result."""
    return "\n\n".join(filter(None, [table(result), frontier(result)]))


def table(result: dict[str, Any]) -> str:
    """Return the figures at the first point as Markdown, with what they were measured on."""
    rows = [("UNet", "parameters", "time", "shape and colour", "place", "Fréchet", "PSNR", "SSIM")]
    for name, way in result["ways"].items():
        point = way["points"][0]
        shares = (f"{100 * point[key]:.1f} %" for key in ("shape and colour", "place"))
        close = (f"{point['psnr']:.1f} dB", f"{point['ssim']:.3f}") if "psnr" in point else ("-", "-")
        size = f"{way['parameters'] / 1e6:.2f} M"
        rows.append((name, size, f"{way['time']:.2f}", *shares, f"{point['frechet']:.0f}", *close))
    teacher, ways = result["ways"]["teacher"], result["ways"].values()
    point = teacher["points"][0]
    trained = " and ".join(dict.fromkeys(way["device"] for way in ways))
    timed = " and ".join(dict.fromkeys(way.get("timed on", way["device"]) for way in ways))
    quick = " **A quick run: smoke test, no figures to quote.**" if result["quick"] else ""
    return (
        f"{trained}, float32; torch {teacher['torch']}, diffusers {teacher['diffusers']}; {result['steps']} "
        f"optimizer steps of {result['batch']} samples; {result['captions']} held-out captions, {point['steps']} steps "
        f"of {point['solver']}; time of a call as a share of the teacher's on {timed}; PSNR (median) and SSIM to the "
        f"teacher's images ({teacher['date'][:10]}).{quick}\n\n{markdown(rows)}"
    )


def frontier(result: dict[str, Any]) -> str:
    """Return what is the best in a given time as Markdown: the teacher with its best solver, and the best student.

    The best is what shows the most captions right, shapes and colours. The unit of time is a call of the teacher. Empty
    if no way was measured at several numbers of steps.
    """
    points = [
        {**point, "way": name, "time": way["time"] * point["steps"]}
        for name, way in result["ways"].items()
        for point in way["points"]
        if len(way["points"]) > 1
    ]
    if not points:
        return ""
    rows = [("time", "teacher", "shape and colour", "Fréchet", "student", "shape and colour", "Fréchet")]
    for budget in BUDGETS:
        affordable = [point for point in points if point["time"] <= budget]
        teacher = best(point for point in affordable if point["way"] == "teacher")
        student = best(point for point in affordable if point["way"] != "teacher")
        rows.append((f"{budget}", *teacher, *student))
    return markdown(rows)


def best(points: Iterable[dict[str, Any]]) -> tuple[str, str, str]:
    """Return the cells of the best point: what it is, and its figures."""
    point = max(points, key=lambda point: (point["shape and colour"], -point["frechet"]), default=None)
    if point is None:
        return "-", "-", "-"
    way = "" if point["way"] == "teacher" else f"{point['way']}: "
    what = f"{way}{point['steps']} steps of {point['solver']}"
    return what, f"{100 * point['shape and colour']:.1f} %", f"{point['frechet']:.0f}"
