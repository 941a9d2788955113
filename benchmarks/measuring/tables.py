"""Markdown tables of results: quality against time, tuning, GPUs and CPU engines, and diffusers' tests.

The tables of `benchmarks/overhead.py` are in `measuring/cases`, one beside each case.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .pareto import front, margin
from .solvers import KARRAS

Result = Mapping[str, Any]
QUICK = "**A smoke test: no figures to quote.**"
SHORT = (0.25, 1.0)  # the times of the Pareto-optimal methods that are shown
BUDGETS = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20)  # calls of the teacher
WHOLE = "torch"  # what others are compared with on a GPU
REFERENCE = "PyTorch float32"  # and on the engines of a CPU
COUNTS = ("tests", "fail with diffusers' own", "fail only with ours", "pass with both", "of these, other numbers")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def ratio(mine: Sequence[float], eager: Sequence[float]) -> str:
    """Return the median and quartiles of the ratios of times that were taken in the same turn."""
    ratios = [m / e for m, e in zip(mine, eager, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


# -- quality against time ---------------------------------------------------------------------------------------------


def quality(result: Result) -> dict[str, str]:
    """Return the tables of `frontier.py`: plain solvers, other methods, and those that are Pareto-optimal."""
    methods = result["methods"]
    unit = next(method["unit"] for method in methods.values())
    conditions = (
        f"{result['device']}, {result['threads']} threads, {result['dtype']}; torch {result['torch']}, diffusers "
        f"{result['diffusers']}; {result['images']} held-out captions, {result['batch']} at a time. Time: of the "
        f"process, in units of {unit}; on ONNX Runtime, of the same there. PSNR in dB: median and 10th percentile of "
        f"the images, against {result['reference']}, and against the same solver without passes. Margin: PSNR less "
        f"that of the best plain solver in the same time ({result['date'][:10]}, {result['commit']})."
    )
    tables = {"conditions": f"{conditions} {QUICK}" if result["quick"] else conditions}
    tables["plain"] = _plain_solvers(methods)
    heading = (
        "method",
        "MACs",
        "time",
        "PSNR",
        "margin",
        "PSNR to same solver",
        "Fréchet",
        "shape and colour",
        "place",
    )
    rows = [heading]
    for name, method in methods.items():
        if method["kind"] != "plain":
            shares = (f"{100 * method[key]:.0f} %" for key in ("shape and colour", "place"))
            macs = "-" if method.get("macs") is None else f"{method['macs']:.3f}"
            same, gain = _pair(method, "same"), _margins(methods, name)
            times = (macs, f"{method['time']:.3f}")
            rows.append((name, *times, _pair(method, "psnr"), gain, same, f"{method['frechet']:.3g}", *shares))
    tables["methods"] = markdown(rows)
    rows = [("Pareto-optimal", "time", "PSNR", "margin")]
    for name in front(methods, "psnr"):
        if SHORT[0] <= methods[name]["time"] <= SHORT[1]:
            method = methods[name]
            rows.append((name, f"{method['time']:.2f}", _pair(method, "psnr"), _margins(methods, name)))
    tables["front"] = markdown(rows)
    return tables


def _plain_solvers(methods: Result) -> str:
    found = [method for method in methods.values() if method["kind"] == "plain"]
    solvers, steps = dict.fromkeys(method["solver"] for method in found), sorted({method["steps"] for method in found})
    rows = [("steps", *solvers)]
    for number in steps:
        cells = {method["solver"]: _pair(method, "psnr") for method in found if method["steps"] == number}
        rows.append((str(number), *(cells.get(solver, "-") for solver in solvers)))
    return markdown(rows)


def _pair(method: Result, key: str) -> str:
    """Return the median and the 10th percentile of a PSNR."""
    return ", ".join("-" if method[k] is None else f"{method[k]:.1f}" for k in (key, f"{key}_low"))


def _margins(methods: Result, name: str) -> str:
    gains = [margin(methods, name, key) for key in ("psnr", "psnr_low")]
    return "-" if None in gains else ", ".join(f"{each:+.1f}" for each in gains)


# -- tuning -----------------------------------------------------------------------------------------------------------


def tuning(result: Result) -> dict[str, str]:
    """Return the tables of `tuning.py`: the conditions, the recovered quality, and the teacher with fewer steps."""
    teacher, methods = result["methods"]["teacher"], result["methods"]
    point = teacher["points"][0]
    trained = " and ".join(dict.fromkeys(method["device"] for method in methods.values()))
    timed = " and ".join(dict.fromkeys(method.get("timed on", method["device"]) for method in methods.values()))
    conditions = (
        f"{trained}, float32; torch {teacher['torch']}, diffusers {teacher['diffusers']}; {result['steps']} "
        f"optimizer steps of {result['batch']} samples; {result['captions']} held-out captions, {point['steps']} steps "
        f"of {point['solver']}; time of a call as a share of the teacher's on {timed}; PSNR (median) and SSIM to the "
        f"teacher's images ({teacher['date'][:10]})."
    )
    rows = [("UNet", "parameters", "time", "shape and colour", "place", "Fréchet", "PSNR", "SSIM")]
    for name, method in methods.items():
        point = method["points"][0]
        shares = (f"{100 * point[key]:.1f} %" for key in ("shape and colour", "place"))
        close = (f"{point['psnr']:.1f} dB", f"{point['ssim']:.3f}") if "psnr" in point else ("-", "-")
        size = f"{method['parameters'] / 1e6:.2f} M"
        rows.append((name, size, f"{method['time']:.2f}", *shares, f"{point['frechet']:.0f}", *close))
    tables = {"conditions": f"{conditions} {QUICK}" if result["quick"] else conditions, "recovered": markdown(rows)}
    points = [
        {**point, "method": name, "time": method["time"] * point["steps"]}
        for name, method in methods.items()
        for point in method["points"]
        if len(method["points"]) > 1
    ]
    if points:
        tables["fewer-steps"] = _fewer_steps(points)
    return tables


def _fewer_steps(points: list[dict[str, Any]]) -> str:
    """Return the best in a given time, which shows the most captions right; the unit is a call of the teacher."""
    rows = [("time", "teacher", "its captions", "its Fréchet", "student", "captions", "Fréchet")]
    for budget in BUDGETS:
        affordable = [point for point in points if point["time"] <= budget]
        teacher = _best(point for point in affordable if point["method"] == "teacher")
        student = _best(point for point in affordable if point["method"] != "teacher")
        rows.append((f"{budget}", *teacher, *student))
    return markdown(rows)


def _best(points: Iterable[Result]) -> tuple[str, str, str]:
    """Return the cells of the best point: its name and its figures."""
    point = max(points, key=lambda point: (point["shape and colour"], -point["frechet"]), default=None)
    if point is None:
        return "-", "-", "-"
    method = "" if point["method"] == "teacher" else f"{point['method']}: "
    name = f"{method}{point['steps']} steps of {point['solver']}"
    return name, f"{100 * point['shape and colour']:.1f} %", f"{point['frechet']:.0f}"


def curves(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Return the figures at the first point by UNet and by optimizer steps, of UNets that several results have.

    Raises:
        SystemExit: the results were measured on different captions or with different solvers.
    """
    settings = {(result["captions"], result["sampling"], result["scenes"], result["batch"]) for result in results}
    if len(settings) > 1:
        raise SystemExit(f"the files were measured in different ways, {sorted(settings)}: name those of one study")
    found: dict[str, dict[int, Result]] = {}
    for result in sorted(results, key=lambda result: int(result["steps"])):
        for name, method in result["methods"].items():
            if "losses" in method and "untuned" not in name:
                found.setdefault(name, {})[result["steps"]] = method["points"][0]
    return {name: points for name, points in found.items() if len(points) > 1}


def learning_curves(found: Mapping[str, Mapping[int, Result]]) -> str:
    """Return the figures of `curves` as a table."""
    columns = sorted({steps for points in found.values() for steps in points})
    rows = [("UNet", *(f"{steps} steps" for steps in columns))]
    for name, points in found.items():
        cells = (points.get(steps) for steps in columns)
        rows.append((name, *(f"{100 * p['shape and colour']:.1f} %, {p['psnr']:.1f} dB" if p else "-" for p in cells)))
    return markdown(rows)


# -- pruning ----------------------------------------------------------------------------------------------------------


def features(method: Result) -> dict[str, float]:
    """Return the features of a set of removals from which its rank is learned."""
    return {
        **method["scores"],
        **{f"predicted {cost}": share for cost, share in method["predicted"].items()},
        "regions": float(len(method["paths"])),
    }


def distinct(methods: Iterable[Result]) -> list[Result]:
    """Return the tuned sets of removals, each once."""
    return list({tuple(sorted(method["paths"])): method for method in methods if "tuned" in method}.values())


def pruning(result: Result) -> dict[str, str]:
    """Return the tables of `pruning.py`: the sets, how well criteria rank them, predictions, and fewer steps."""
    methods = {name: method for name, method in result["methods"].items() if "infeasible" not in method}
    whole, sets = methods["whole"], {name: m for name, m in methods.items() if "tuned" in m}
    timed = " and ".join(dict.fromkeys(method["timed on"] for method in sets.values()))
    conditions = (
        f"{timed}, float32; torch {whole['torch']}, diffusers {whole['diffusers']}; {result['steps']} optimizer steps "
        f"of {result['batch']} samples; {result['captions']} held-out captions, {result['sampling']} steps of "
        f"{KARRAS}; time of a call as a share of the whole UNet's; PSNR (median) to the whole UNet's images "
        f"({whole['date'][:10]})."
    )
    rows = [("set", "regions", "parameters", "time", "PSNR untuned", "captions untuned", "PSNR tuned", "captions")]
    for name, method in {"whole": whole, **sets}.items():
        figures = [_images(method.get(each)) for each in ("untuned", "tuned")]
        regions = str(len(method["paths"]))
        size = f"{method['parameters'] / 1e6:.2f} M"
        rows.append((name, regions, size, f"{method['time']:.2f}", *figures[0], *figures[1]))
    tables = {"conditions": f"{conditions} {QUICK}" if result["quick"] else conditions, "sets": markdown(rows)}
    tables["ranks"] = _ranks(distinct(sets.values()))
    rows = [("set", "predicted time", "time", "off by", "predicted error", "error")]
    for name, method in sets.items():
        predicted, error = method["predicted"]["time"], method["scores"].get("output error, pairs", float("nan"))
        off = f"{100 * (predicted / method['time'] - 1):+.1f} %"
        rows.append((name, f"{predicted:.3f}", f"{method['time']:.3f}", off, f"{error:.3g}", f"{method['error']:.3g}"))
    tables["predicted"] = markdown(rows)
    rows = [("whole UNet", "time", "PSNR", "captions")]
    for name, method in methods.items():
        if method["kind"] == "steps":
            rows.append((name, f"{method['time']:.2f}", *_images(method["untuned"])))
    tables["steps"] = markdown(rows)
    lost = [f"{name}: {m['infeasible']}" for name, m in result["methods"].items() if "infeasible" in m]
    if lost:
        tables["infeasible"] = "No set meets the budget of " + "; ".join(lost) + "."
    return tables


def _images(point: Result | None) -> tuple[str, str]:
    if point is None:
        return "-", "-"
    return (f"{point['psnr']:.1f} dB" if "psnr" in point else "-", f"{100 * point['shape and colour']:.1f} %")


def _ranks(sets: Sequence[Result]) -> str:
    """Return the rank correlation of each criterion with the results, as a table; 1 is a perfect order."""
    from .ranking import correlation, left_out  # which need extras that other tables do without

    results = {
        "PSNR untuned": [method["untuned"]["psnr"] for method in sets],
        "PSNR tuned": [method["tuned"]["psnr"] for method in sets],
        "captions tuned": [method["tuned"]["shape and colour"] for method in sets],
    }
    criteria = {name: [-method["scores"][name] for method in sets] for name in sets[0]["scores"]}
    criteria["measured error of the set"] = [-method["error"] for method in sets]
    criteria["PSNR untuned"] = results["PSNR untuned"]
    criteria["time left"] = [method["time"] for method in sets]
    if len(sets) > 3:
        criteria["LambdaRank, on sets left out"] = left_out([features(m) for m in sets], results["PSNR tuned"])
    rows: list[tuple[str, ...]] = [("criterion", *results)]
    for name, scores in criteria.items():
        found = (correlation(scores, each) for each in results.values())
        rows.append((name, *("-" if each is None else f"{each:+.2f}" for each in found)))
    return markdown(rows)


# -- engines, and diffusers' tests ------------------------------------------------------------------------------------


def gpu(result: Result) -> dict[str, str]:
    """Return the tables of `gpu.py`."""
    rows = [("model", "batch", "steps", "method", "seconds per image", "torch's / its", "largest difference")]
    for case in result["cases"]:
        for count in result["steps"]:
            whole = case["methods"][WHOLE]["seconds"][str(count)]
            for name, method in case["methods"].items():
                head = (case["model"], str(case["batch"]), str(count), name)
                if "failed" in method:
                    rows.append((*head, method["failed"].partition("\n")[0][:60], "", ""))
                    continue
                seconds = method["seconds"][str(count)]
                gain = statistics.median(w / s for w, s in zip(whole, seconds, strict=True))
                per_image = statistics.median(seconds) / case["batch"]
                rows.append((*head, f"{per_image:.4g}", f"{gain:.2f}", f"{method['difference'][str(count)]:.3g}"))
    conditions = f"{result['device']}, {result['dtype']}, torch {result['torch']}, onnxruntime {result['onnxruntime']}"
    return {"conditions": conditions, "images": markdown(rows)}


def engines(result: Result) -> dict[str, str]:
    """Return the tables of `providers.py`."""
    rows = [("model", "threads", "engine", "seconds per call", "PyTorch float32 / its", "PSNR")]
    for row in result["rows"]:
        head = (row["model"], str(row["threads"]), row["engine"])
        if "failed" in row:
            rows.append((*head, row["failed"], "", ""))
            continue
        mine, its = row["samples"][row["engine"]], row["samples"][REFERENCE]
        gain = statistics.median(a / b for a, b in zip(its, mine, strict=True))
        rows.append((*head, f"{statistics.median(mine):.3g}", f"{gain:.2f}", f"{row['psnr']:.1f} dB"))
    first = result["rows"][0]
    conditions = (
        f"{result['device']}; torch {result['torch']}, onnxruntime {result['onnxruntime']}; calls of {first['batch']} "
        f"samples, in turns with PyTorch in float32; PSNR to its prediction ({result['date'][:10]}, "
        f"{result['commit']}). {result['note']}"
    )
    return {"conditions": conditions.rstrip(), "engines": markdown(rows)}


def images(result: Result) -> dict[str, str]:
    """Return the tables of `images.py`."""
    rows = [("engine", "UNet", "steps", "seconds per image", "relative", "first image", "peak memory", "PSNR")]
    first, call = result["rows"][0], result["job"]["call"]
    for row in result["rows"]:
        name = f"{row['engine']} {row['dtype']}{', channels last' * row['channels_last']}"
        steps = str(row["steps"] or call["num_inference_steps"])
        head = (name, "with passes" if row["passes"] else "source", steps)
        if row["failure"] is not None:
            rows.append((*head, row["failure"], "", "", "", ""))
            continue
        relative = f"{row['seconds'] / first['seconds']:.2f}"
        memory, psnr = f"{row['memory'] / 1e9:.1f} GB", "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        rows.append((*head, f"{row['seconds']:.3g}", relative, f"{row['first']:.0f} s", memory, psnr))
    missing = "".join(f" {engine}: {reason}." for engine, reason in result["missing"].items())
    conditions = (
        f"{result['device']}, {result['threads']} threads, images of {call['width']}x{call['height']}; torch "
        f"{result['torch']}, onnxruntime {result['on'].get('onnxruntime', 'none')} ({result['date'][:10]}, "
        f"{result['commit']}). PSNR to the images of the first row.{missing}"
    )
    return {"conditions": conditions, "images": markdown(rows)}


def drop_in(result: Result) -> dict[str, str]:
    """Return the tables of `drop_in.py`."""
    rows = [("UNet", "suite", "tests", "fail with both", "fail only with ours", "pass with both", "other numbers")]
    for mode, suites in result["modes"].items():
        for suite, found in suites.items():
            values = (found[key] for key in COUNTS)
            rows.append((mode, suite, *(str(v if isinstance(v, int) else len(v)) for v in values)))
    return {"conditions": f"diffusers {result['diffusers']} ({result['date'][:10]}).", "suites": markdown(rows)}


def channels(result: Result) -> dict[str, str]:
    """Return the table of `channels.py`."""
    whole, *others = result["rows"]
    parts = list(whole["macs by part"])
    rows = [("way", "budget of", "share", "parameters", "MACs", "time/whole", "predicted", "error of the noise")]
    spent = [("way", "budget of", "share", "MACs", *parts, "time/whole")]
    for row in (whole, *others):
        head = (row["name"], row["of"], f"{row['budget']:g}")
        if "failure" in row:
            rows.append((*head, "-", "-", "-", "-", f"fails: {row['failure']}"))
            continue
        share = f"{row['parameters'] / 1e6:.2f} M ({row['parameters'] / whole['parameters']:.3f})"
        time, macs = ratio(row["samples"], whole["samples"]), f"{row['macs'] / whole['macs']:.3f}"
        guess = f"{row['predicted']:.3f}" if "predicted" in row else "-"
        rows.append((*head, share, macs, time, guess, f"{row['error']:.3g}"))
        left = [f"{row['macs by part'][part] / whole['macs by part'][part]:.2f}" for part in parts]
        spent.append((*head, macs, *left, time))
    conditions = (
        f"{result['device']}, {result['threads']} threads, float32, batch {2 * result['captions']}; torch "
        f"{result['torch']}, diffusers {result['diffusers']}, Torch-Pruning {result['torch_pruning']} "
        f"({result['date'][:10]}, {result['commit']}). Squared error of the predicted noise relative to its square, "
        f"before any tuning, the mean over the {result['sampling']} calls of a generation of {result['captions']} "
        "captions. The median of the ratios of times within each turn, and their quartiles. MACs are shares of the "
        "whole UNet's, in the second table part by part."
    )
    conditions = f"{conditions} {QUICK}" if result["quick"] else conditions
    return {"conditions": conditions, "channels": markdown(rows), "parts": markdown(spent)}
