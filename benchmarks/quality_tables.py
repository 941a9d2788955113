"""Tables of quality against time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from margins import front, margin
from tables import markdown

SHORT = (0.25, 1.0)  # the times of the headline
KEYS = ("psnr", "psnr_low")


def report(result: Mapping[str, Any]) -> str:
    """Return the plain solvers by steps, then every other way."""
    tables = [circumstances(result), plain(result["ways"]), others(result["ways"])]
    return "\n\n".join(tables)


def plain(ways: Mapping[str, Any]) -> str:
    """Return the PSNR of the plain solvers, a row for each number of steps."""
    found = [way for way in ways.values() if way["kind"] == "plain"]
    solvers, steps = dict.fromkeys(way["solver"] for way in found), sorted({way["steps"] for way in found})
    rows = [("steps", *solvers)]
    for number in steps:
        cells = {way["solver"]: pair(way, "psnr") for way in found if way["steps"] == number}
        rows.append((str(number), *(cells.get(solver, "-") for solver in solvers)))
    return markdown(rows)


def others(ways: Mapping[str, Any]) -> str:
    """Return the figures of the ways that are not plain."""
    heading = ("way", "time", "PSNR", "against plain", "PSNR to same solver", "Fréchet", "shape and colour", "place")
    rows = [heading]
    for name, way in ways.items():
        if way["kind"] != "plain":
            shares = (f"{100 * way[key]:.0f} %" for key in ("shape and colour", "place"))
            same, gains = pair(way, "same"), gain(ways, name)
            rows.append((name, f"{way['time']:.3f}", pair(way, "psnr"), gains, same, f"{way['frechet']:.3g}", *shares))
    return markdown(rows)


def headline(result: Mapping[str, Any]) -> str:
    """Return the ways between 0.25 and 1 of the time that no way beats in PSNR, and what they gain."""
    ways = result["ways"]
    rows = [("way", "time", "PSNR", "against plain")]
    for name in front(ways, "psnr"):
        if SHORT[0] <= ways[name]["time"] <= SHORT[1]:
            rows.append((name, f"{ways[name]['time']:.2f}", pair(ways[name], "psnr"), gain(ways, name)))
    return f"{markdown(rows)}\n\n{circumstances(result)}"


def pair(way: Mapping[str, Any], key: str) -> str:
    """Return a PSNR of the median image and of the worst tenth."""
    return ", ".join("-" if way[k] is None else f"{way[k]:.1f}" for k in (key, f"{key}_low"))


def gain(ways: Mapping[str, Any], name: str) -> str:
    """Return what a way gains over the best plain solver in its time, for the median image and the worst tenth."""
    gains = [margin(ways, name, key) for key in KEYS]
    return "-" if None in gains else ", ".join(f"{each:+.1f}" for each in gains)


def circumstances(result: Mapping[str, Any]) -> str:
    """Return what was measured, on what, and how to read it."""
    unit = next(way["unit"] for way in result["ways"].values())
    return (
        f"{_machine(result)}; {result['images']} held-out captions, {result['batch']} at a time. Time: of the process, "
        f"in units of {unit}, on ONNX Runtime of the same there. PSNR in dB, of the median image and of the one that a "
        f"tenth are not better than, to {result['reference']} and to the same solver without passes. Against plain: "
        f"less the best plain solver in the same time ({result['date'][:10]}).{_quick(result)}"
    )


def older(result: Mapping[str, Any]) -> str:
    """Return the table of a result from before there were several solvers."""
    rows = [("way", "MACs", "time", "PSNR", "its 10 % worst", "Fréchet", "shape and colour", "place")]
    for name, way in result["ways"].items():
        psnrs = ("-" if way[key] is None else f"{way[key]:.1f} dB" for key in KEYS)
        shares = (f"{100 * way[key]:.0f} %" for key in ("shape and colour", "place"))
        macs = "-" if way["macs"] is None else f"{way['macs']:.3f}"
        rows.append((name, macs, f"{way['time']:.3f}", *psnrs, f"{way['frechet']:.3g}", *shares))
    told = (
        f"{_machine(result)}; {result['images']} images of {result['steps']} DDIM steps, {result['batch']} at a time; "
        "MACs and time as shares of all steps; PSNR of the median image, and of the one that a tenth are not better "
        f"than ({result['date'][:10]}).{_quick(result)}"
    )
    return f"{told}\n\n{markdown(rows)}"


def _machine(result: Mapping[str, Any]) -> str:
    return (
        f"{result['device']}, {result['threads']} threads, {result['dtype']}; torch {result['torch']}, diffusers "
        f"{result['diffusers']}"
    )


def _quick(result: Mapping[str, Any]) -> str:
    return " **A quick run: smoke test, no figures to quote.**" if result["quick"] else ""
