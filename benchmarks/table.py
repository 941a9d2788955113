"""Results of the benchmarks as Markdown tables.

python benchmarks/table.py                          # the newest of benchmarks/results/
python benchmarks/table.py RESULT.json
python benchmarks/table.py RESULT.json --into DOC   # between the markers of such results in a document

A marker names the file that is shown: `<!-- figures: FILE -->`, or `<!-- headline: FILE -->` for the short form.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import cases
import numpy as np
from tables import markdown

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- (?P<kind>figures|headline): (?P<file>\S+) -->\n.*?<!-- end of (?P=kind) -->", re.DOTALL)


def report(result: dict[str, Any]) -> str:
    """All tables of a result, with what it was measured on."""
    if "ways" in result:
        return frontier(result)
    return "\n\n".join([conditions(result), *cases.tables(result["cases"])])


def conditions(result: dict[str, Any]) -> str:
    settings = result["settings"]
    quick = " **A quick run: smoke test, no figures to quote.**" if settings["quick"] else ""
    malloc = "".join(f", `{name}={value}`" for name, value in result.get("malloc", {}).items())
    return (
        f"{result['device']}, {result['cores']} cores, {result['threads']} threads, {settings['dtype']}, batch "
        f"{settings['batch']}{malloc}; torch {result['torch']}, diffusers {result['diffusers']}, sdgraph "
        f"{result['sdgraph']} ({result['commit']}); {result['date'][:10]}.{quick}"
    )


def frontier(result: dict[str, Any]) -> str:
    """Quality against time, way by way."""
    rows = [("way", "MACs", "time", "PSNR", "its 10 % worst", "Fréchet", "shape and colour", "place")]
    margins = [margin(result["ways"], name) for name in result["ways"]] if result.get("solver") else []
    for name, each in result["ways"].items():
        psnr = [decibels(each[key]) for key in ("psnr", "psnr_low")]
        shares = (f"{100 * each[key]:.0f} %" for key in ("shape and colour", "place"))
        macs = "-" if each["macs"] is None else f"{each['macs']:.3f}"
        rows.append((name, macs, f"{each['time']:.3f}", *psnr, f"{each['frechet']:.3g}", *shares))
    if margins:  # older results have a table of their own that compares
        heading = "against fewer steps at its time, median and worst tenth"
        rows = [(*row, last) for row, last in zip(rows, (heading, *margins), strict=True)]
    return f"{circumstances(result)}\n\n{markdown(rows)}"


def margin(ways: dict[str, Any], name: str) -> str:
    """Return the PSNR of a way less that of fewer plain steps in its time, for the median image and the worst tenth."""
    way, differences = ways[name], []
    for key in ("psnr", "psnr_low"):
        plain = plain_psnr(ways, way["time"], key)
        if way["kind"] == "fewer steps" or way[key] is None or plain is None:
            return "-"
        differences.append(way[key] - plain)
    return f"{differences[0]:+.1f}, {differences[1]:+.1f} dB"


def circumstances(result: dict[str, Any]) -> str:
    quick = " **A quick run: smoke test, no figures to quote.**" if result["quick"] else ""
    return (
        f"{result['device']}, {result['threads']} threads, {result['dtype']}; torch {result['torch']}, diffusers "
        f"{result['diffusers']}; {result['images']} images of {result['steps']} {result.get('solver', 'DDIM')} steps, "
        f"{result['batch']} at a "
        f"time; MACs and time as shares of all steps; PSNR of the median image, and of the one that a tenth are not "
        f"better than ({result['date'][:10]}).{quick}"
    )


def headline(result: dict[str, Any]) -> str:
    """Return the short table of a result: of plans, the settings beside fewer steps in the same time; else memory."""
    if "ways" not in result:
        measured = [case for case in result["cases"] if case["case"].startswith("memory/")]
        return f"{conditions(result)}\n\n{cases.KINDS['memory'].table(measured)}"
    ways = result["ways"]
    settings = dict.fromkeys(name.rpartition(", ")[0] for name in ways if name.endswith(", fitted"))
    kinds = ("repeated", "line", "damped by half", "fitted")
    rows = [("setting", "time", "fewer steps", *kinds)]
    for setting in settings:
        series = [ways[f"{setting}, {kind}"] for kind in kinds]
        time = statistics.median(way["time"] for way in series)
        shown = (decibels(psnr) for psnr in (plain_psnr(ways, time, "psnr"), *(way["psnr"] for way in series)))
        rows.append((setting, f"{time / ways['25 steps']['time']:.2f}", *shown))
    told = "Time as a share of 25 steps. Fewer steps: interpolated between the plain runs that take less and more time."
    return f"{markdown(rows)}\n\n{told} {circumstances(result)}"


def plain_psnr(ways: dict[str, Any], time: float, key: str) -> float | None:
    """Return the PSNR of fewer plain steps in a time, interpolated; None outside of the measured times."""
    fewer = (way for way in ways.values() if way["kind"] == "fewer steps")
    plain = sorted((way["time"], way[key]) for way in fewer if way[key] is not None)
    if not plain or not plain[0][0] <= time <= plain[-1][0]:
        return None
    return float(np.interp(time, *zip(*plain, strict=True)))


def decibels(psnr: float | None) -> str:
    return "-" if psnr is None else f"{psnr:.1f} dB"


def newest() -> Path:
    results = {file: json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    if not results:
        raise SystemExit("no results yet: run benchmarks/overhead.py")
    return max(results, key=lambda file: results[file]["date"])


def filled(document: str, file: Path) -> str:
    """The document with the tables of a result between the markers of results of its sort, whatever their date."""
    name = file.resolve().relative_to(ROOT).as_posix()
    result = json.loads(file.read_text())

    def fill(found: re.Match[str]) -> str:
        if found["file"] != "none" and Path(found["file"]).name[len("2000-01-01") :] != file.name[len("2000-01-01") :]:
            return found[0]
        kind = found["kind"]
        text = headline(result) if kind == "headline" else report(result)
        return f"<!-- {kind}: {name} -->\n{text}\n<!-- end of {kind} -->"

    return MARKED.sub(fill, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="JSON file; default: the newest of benchmarks/results")
    parser.add_argument("--into", type=Path, help="document to fill in")
    chosen = parser.parse_args()
    file = chosen.result or newest()
    if chosen.into is None:
        print(report(json.loads(file.read_text())))
    else:
        chosen.into.write_text(filled(chosen.into.read_text(), file))


if __name__ == "__main__":
    main()
