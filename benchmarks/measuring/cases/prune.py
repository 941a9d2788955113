"""`prune/MODEL/SIZE`: the presets, time against multiply-accumulates.

`prune/sd15/32/study` adds the sets that the criteria of `benchmarks/pruning.py` chose on the small model, whose regions
have the same paths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sdgraph
from sdgraph.passes import PruneBlocks

from .. import random_unets, timing
from ..record import RESULTS
from ..tables import markdown, ratio
from .settings import Settings

SIZES = ("sd15/64",)
QUICK: tuple[str, ...] = ("small/32",)
STUDY = RESULTS / "cpu-float32-pruning-80-steps.json"
PRESETS = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")


def run(settings: Settings, model: str, size: str, study: str = "") -> dict[str, Any]:
    """Return the time of a call and the multiply-accumulates of each preset, and of each set of the study."""
    unet = random_unets.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = random_unets.call(unet, settings.batch, int(size), int(size))
    whole = sdgraph.apply(unet, [], verify=False)
    results = {"traced": whole}
    for preset in PRESETS:
        results[preset] = sdgraph.apply(whole, ["CleanUp", f"PruneBlocks({preset!r})"], verify=False)
    chosen = dict[tuple[str, ...], str]()  # of equal sets the first
    for name, method in json.loads(STUDY.read_text())["methods"].items() if study else ():
        if method["kind"] in ("criterion", "predictor") and "paths" in method:
            chosen.setdefault(tuple(method["paths"]), name)
    for paths, name in chosen.items():
        results[name] = sdgraph.apply(whole, ["CleanUp", PruneBlocks(paths)], verify=False)
    calls: dict[str, Any] = {"eager": lambda: unet(**call)}
    calls |= {name: lambda result=result: result(**call) for name, result in results.items()}
    samples = timing.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    sizes = {
        name: {
            "nodes": len(result.graph.nodes),
            "parameters": sum(p.numel() for p in result.parameters()),
            "macs": result.graph.macs,
        }
        for name, result in results.items()
    }
    return {"samples": samples, "sizes": sizes}


def table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "UNet", "nodes", "parameters", "GMACs", "MACs/whole", "time/eager")]
    for case in cases:
        _, model, size, *_ = case["case"].split("/")
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
