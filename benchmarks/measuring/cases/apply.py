"""`apply/MODEL`: time and memory of tracing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import sdgraph

from .. import random_unets, timing
from ..tables import markdown
from .settings import Settings

SIZES = ("sd15", "sdxl")
QUICK: tuple[str, ...] = ("small",)


def run(settings: Settings, model: str) -> dict[str, Any]:
    """Return the time and memory of `trace` and `apply`."""
    unet = random_unets.build(model, settings.device, settings.of(model))
    parameters = sum(p.numel() for p in unet.parameters())
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    before, device = timing.resident(), timing.on_device(settings.device)
    start = time.perf_counter()
    graph = sdgraph.trace(unet)
    traced = time.perf_counter()
    result = sdgraph.apply(unet, [], verify=False)
    applied = time.perf_counter()
    nodes = len(graph.nodes)
    del graph
    after = timing.resident()
    checking = time.perf_counter()
    sdgraph.apply(unet, [])
    return {
        "parameters": parameters,
        "weight_bytes": weights,
        "nodes": nodes,
        "trace_seconds": traced - start,
        "apply_seconds": applied - traced,
        "apply_verified_seconds": time.perf_counter() - checking,
        "not_shared_bytes": timing.not_shared(result, unet),
        "resident_bytes": after - before,
        "device_bytes": timing.on_device(settings.device) - device,
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
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
