"""Results of `benchmarks/overhead.py` as Markdown tables.

python benchmarks/table.py                      # the newest of benchmarks/results
python benchmarks/table.py RESULT.json
python benchmarks/table.py --into README.md     # between its markers
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- figures: (?P<file>.*?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def report(result: dict[str, Any]) -> str:
    """All tables of a result, with what it was measured on."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        kinds.setdefault(case["case"].partition("/")[0], []).append(case)
    makers = {
        "forward": forward,
        "apply": apply,
        "prune": prune,
        "inherit": inherit,
        "experts": experts,
        "attention": attention,
    }
    return "\n\n".join([conditions(result), *(makers[kind](cases) for kind, cases in kinds.items())])


def conditions(result: dict[str, Any]) -> str:
    settings = result["settings"]
    quick = " **A quick run: smoke test, no figures to quote.**" if settings["quick"] else ""
    return (
        f"{result['device']}, {result['cores']} cores, {result['threads']} threads, {settings['dtype']}, batch "
        f"{settings['batch']}; torch {result['torch']}, diffusers {result['diffusers']}, sdgraph {result['sdgraph']} "
        f"({result['commit']}); {result['date'][:10]}.{quick}"
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
    rows = [("bk-sdm-base", "latents", "convolutions", "parameters", "time/plain")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name, each in case["sizes"].items():
            times = ratio(case["samples"][name], case["samples"]["plain"])
            kind = "plain" if name == "plain" else f"MECondConv, by {name}"
            rows.append((model, f"{size}x{size}", kind, f"{each['parameters'] / 1e6:.4g} M", times))
    return markdown(rows)


def attention(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "self-attention", "its time/full", "UNet's time/full")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name in case["alone"]:
            each = (ratio(case[key][name], case[key]["full"]) for key in ("alone", "samples"))
            rows.append((model, f"{size}x{size}", name, *each))
    return markdown(rows) + "\n\nAt the latents' resolution; other levels have full attention."


def ratio(mine: Sequence[float], eager: Sequence[float]) -> str:
    """Median and quartiles of the ratios of times taken in the same turn."""
    ratios = [m / e for m, e in zip(mine, eager, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def newest() -> Path:
    results = {file: json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    ours = [file for file, result in results.items() if "cases" in result]  # frontier.py's have none
    if not ours:
        raise SystemExit("no results yet: run benchmarks/overhead.py")
    return max(ours, key=lambda file: results[file]["date"])


def filled(document: str, file: Path) -> str:
    """The document with the tables of a result between its markers, and the name of the file in the first of them."""
    tables = report(json.loads(file.read_text()))
    marker = f"<!-- figures: {file.resolve().relative_to(ROOT).as_posix()} -->"
    return MARKED.sub(lambda match: f"{marker}\n{tables}\n{match[3]}", document)


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
