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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- (?P<kind>figures|headline): (?P<file>\S+) -->\n.*?<!-- end of (?P=kind) -->", re.DOTALL)


def report(result: dict[str, Any]) -> str:
    """All tables of a result, with what it was measured on."""
    if "ways" in result:
        return frontier(result)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        kinds.setdefault(case["case"].partition("/")[0], []).append(case)
    makers = {
        "forward": forward,
        "apply": apply,
        "prune": prune,
        "inherit": inherit,
        "experts": experts,
        "layers": layers,
        "attention": attention,
        "export": export,
        "deploy": deploy,
        "memory": memory,
    }
    return "\n\n".join([conditions(result), *(makers[kind](cases) for kind, cases in kinds.items())])


def conditions(result: dict[str, Any]) -> str:
    settings = result["settings"]
    quick = " **A quick run: smoke test, no figures to quote.**" if settings["quick"] else ""
    malloc = "".join(f", `{name}={value}`" for name, value in result.get("malloc", {}).items())
    return (
        f"{result['device']}, {result['cores']} cores, {result['threads']} threads, {settings['dtype']}, batch "
        f"{settings['batch']}{malloc}; torch {result['torch']}, diffusers {result['diffusers']}, sdgraph "
        f"{result['sdgraph']} ({result['commit']}); {result['date'][:10]}.{quick}"
    )


def forward(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("traced, no passes", "latents", "eager", "time/eager", "eager/eager", "largest difference", "samples")]
    for case in cases:
        _, model, size = case["case"].split("/")
        samples = case["samples"]
        rows.append(
            (
                model,
                f"{size}x{size}",
                f"{1000 * statistics.median(samples['eager']):.4g} ms",
                ratio(samples["traced"], samples["eager"]),
                ratio(samples["eager again"], samples["eager"]),
                f"{case['largest_difference']:.3g}",
                f"{len(samples['eager'])}",
            )
        )
    return markdown(rows) + "\n\nMedian of the ratios within each turn, and their quartiles."


def apply(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "weights", "nodes", "trace", "apply", "apply, verified", "weights copied", "process grows by")]
    for case in cases:
        grown = case["resident_bytes"] + case["device_bytes"]
        rows.append(
            (
                case["case"].split("/")[1],
                f"{case['weight_bytes'] / 1e9:.3g} GB",
                f"{case['nodes']}",
                f"{case['trace_seconds']:.1f} s",
                f"{case['apply_seconds']:.1f} s",
                f"{case['apply_verified_seconds']:.1f} s",
                f"{case['not_shared_bytes']} B",
                f"{grown / 1e6:.0f} MB",
            )
        )
    return markdown(rows)


def prune(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "UNet", "nodes", "parameters", "GMACs", "MACs/whole", "time/eager")]
    for case in cases:
        _, model, size = case["case"].split("/")
        whole = case["sizes"]["traced"]
        for name, cost in case["sizes"].items():
            rows.append(
                (
                    model,
                    f"{size}x{size}",
                    name,
                    f"{cost['nodes']}",
                    f"{cost['parameters'] / 1e6:.4g} M",
                    f"{cost['macs'] / 1e9:.4g}",
                    f"{cost['macs'] / whole['macs']:.3f}",
                    ratio(case["samples"][name], case["samples"]["eager"]),
                )
            )
    return markdown(rows)


def inherit(cases: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            *("model", "latents", "inheriting", "eager/time", "bound by MACs", "share of the bound"),
            *("time/DeepCache's", "kept", "kept/DeepCache's", "largest difference"),
        )
    ]
    for case in cases:
        _, model, size = case["case"].split("/")
        samples, kept = case["samples"], case["kept_bytes"]
        for name, table in case["timetables"].items():
            gains = [e / m for m, e in zip(samples[name], samples["eager"], strict=True)]
            theirs = f"{name}, DeepCache"
            rows.append(
                (
                    model,
                    f"{size}x{size}",
                    name,
                    f"{statistics.median(gains):.2f}",
                    f"{table['bound']:.2f}",
                    f"{statistics.median(gains) / table['bound']:.2f}",
                    ratio(samples[name], samples[theirs]),
                    f"{kept[name] / 1e6:.2f} MB",
                    f"{kept[name] / kept[theirs]:.3f}",
                    f"{case['largest_difference'][name]:.3g}",
                )
            )
    return markdown(rows) + "\n\nWhole generations. Kept: between calls."


def experts(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("bk-sdm-base", "latents", "convolutions", "parameters", "kept", "seconds", "time/plain")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name, each in case["sizes"].items():
            times = ratio(case["samples"][name], case["samples"]["plain"])
            kind = "plain" if name == "plain" else f"MECondConv, by {name}"
            sizes = f"{each['parameters'] / 1e6:.4g} M", f"{each['kept_bytes'] / 1e6:.4g} MB"
            seconds = f"{statistics.median(case['samples'][name]):.3g}"
            rows.append((model, f"{size}x{size}", kind, *sizes, seconds, times))
    return markdown(rows) + "\n\nGenerations of 10 calls. Kept: between calls."


def layers(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("3x3 convolution", "batch", "plain", "by timestep/plain", "by input/plain")]
    for case in cases:
        for name, samples in case["layers"].items():
            plain = f"{1000 * statistics.median(samples['plain']):.3g} ms"
            ratios = (ratio(samples[routing], samples["plain"]) for routing in ("timestep", "input"))
            rows.append((name, case["case"].split("/")[1], plain, *ratios))
    return markdown(rows) + "\n\nFour experts."


def attention(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "self-attention", "its time/full", "UNet's time/full")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name in case["alone"]:
            each = (ratio(case[key][name], case[key]["full"]) for key in ("alone", "samples"))
            rows.append((model, f"{size}x{size}", name, *each))
    return markdown(rows) + "\n\nAt the latents' resolution; other levels have full attention."


def export(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "dtype", "graphs", "weights", "bundle/weights", "seconds", "peak memory/weights", "its own")]
    for case in cases:
        weights = case["weight_bytes"]
        rows.append(
            (
                case["case"].split("/")[1],
                case["dtype"],
                f"{case['models']}",
                f"{weights / 1e9:.3g} GB",
                f"{case['file_bytes'] / weights:.4f}",
                f"{case['seconds']:.0f}",
                f"{case['resident_peak'] / weights:.2f}",
                f"{case['own_peak'] / weights:.2f}",
            )
        )
    return (
        markdown(rows)
        + "\n\nUNets that inherit, `HoistInvariants` and DeepCache's site; memory is all that the process takes, "
        "the UNet's own weights included; not its own are pages of the mapped file of weights."
    )


def deploy(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "on the CPU", "seconds", "eager/time", "torch/time")]
    for case in cases:
        _, model, size = case["case"].split("/")
        samples = case["samples"]
        for name, mine in samples.items():
            graph = name.removesuffix(", ONNX Runtime")
            torchs = samples.get(f"{graph}, torch") if graph != name else samples.get("inherit")
            whole = samples["eager"] if "onnx" not in name else None
            gains = [
                f"{statistics.median(o / m for o, m in zip(other, mine, strict=True)):.2f}" if other else ""
                for other in (whole, torchs if "ONNX Runtime" in name else None)
            ]
            rows.append((model, f"{size}x{size}", name, f"{statistics.median(mine):.3g}", *gains))
    return markdown(rows) + "\n\nGenerations of 10 calls, then single calls by graph."


def memory(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "run by", "when open", "at most", "of that its own", "seconds")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name, each in case["ways"].items():
            sizes = (f"{each[key] / 1e9:.3g} GB" for key in ("opened", "total", "own"))
            rows.append((model, f"{size}x{size}", name, *sizes, f"{statistics.median(each['seconds']):.3g}"))
    weights = ", ".join(f"{case['weight_bytes'] / 1e9:.3g} GB" for case in cases)
    return (
        f"{markdown(rows)}\n\nGenerations of 10 calls by a process of its own, without what it took before; the "
        f"weights are {weights}. Not its own are pages of the mapped file of weights."
    )


def ratio(mine: Sequence[float], eager: Sequence[float]) -> str:
    """Median and quartiles of the ratios of times taken in the same turn."""
    ratios = [m / e for m, e in zip(mine, eager, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def frontier(result: dict[str, Any]) -> str:
    """Quality against time, way by way."""
    rows = [("way", "MACs", "time", "PSNR", "its 10 % worst", "Fréchet", "shape and colour", "place")]
    for name, each in result["ways"].items():
        psnr = [decibels(each[key]) for key in ("psnr", "psnr_low")]
        shares = (f"{100 * each[key]:.0f} %" for key in ("shape and colour", "place"))
        macs = "-" if each["macs"] is None else f"{each['macs']:.3f}"
        rows.append((name, macs, f"{each['time']:.3f}", *psnr, f"{each['frechet']:.3g}", *shares))
    return f"{circumstances(result)}\n\n{markdown(rows)}"


def circumstances(result: dict[str, Any]) -> str:
    quick = " **A quick run: smoke test, no figures to quote.**" if result["quick"] else ""
    return (
        f"{result['device']}, {result['threads']} threads, {result['dtype']}; torch {result['torch']}, diffusers "
        f"{result['diffusers']}; {result['images']} images of {result['steps']} DDIM steps, {result['batch']} at a "
        f"time; MACs and time as shares of all steps; PSNR of the median image, and of the one that a tenth are not "
        f"better than ({result['date'][:10]}).{quick}"
    )


def headline(result: dict[str, Any]) -> str:
    """Of a frontier DeepCache's settings beside what costs the same: fewer steps, a forecast, a search; else memory."""
    if "ways" not in result:
        cases = [case for case in result["cases"] if case["case"].startswith("memory/")]
        return f"{conditions(result)}\n\n{memory(cases)}"
    ways = result["ways"]
    steps = sorted((each["time"], each["psnr"]) for each in ways.values() if each["kind"] == "fewer steps")
    times, quality = zip(*((time, psnr) for time, psnr in steps if psnr is not None), strict=True)
    rows = [("DeepCache's interval", "time", "DeepCache", "fewer steps", "with a forecast", "and a searched schedule")]
    for name, each in ways.items():
        interval = re.fullmatch(r"DeepCache (\d+), branch 0", name)
        if interval:
            fewer = float(np.interp(each["time"], times, quality))
            ours = (f"DeepCache {interval[1]}, forecast", f"as much as DeepCache {interval[1]}, searched, forecast")
            shown = (decibels(one) for one in (each["psnr"], fewer, *(ways[our]["psnr"] for our in ours)))
            rows.append((interval[1], f"{each['time']:.2f}", *shown))
    told = "Fewer steps: between the two numbers of steps that take more and less."
    return f"{markdown(rows)}\n\n{told} {circumstances(result)}"


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
