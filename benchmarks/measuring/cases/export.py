"""`export/MODEL`: time, memory and size of an export."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sdgraph
from sdgraph.exporters import onnx

from .. import random_unets, timing
from ..tables import markdown
from .settings import INHERIT, Settings

SIZES = ("sd15", "sdxl")
QUICK: tuple[str, ...] = ("tiny",)


def run(settings: Settings, model: str) -> dict[str, Any]:
    """Return the time, memory and size of an export of a UNet that reuses features; SDXL in float16."""
    dtype = torch.float16 if model == "sdxl" else torch.float32
    unet = random_unets.build(model, "cpu", dtype)
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    before = timing.resident()
    start = time.perf_counter()
    inheriting = sdgraph.apply(unet, INHERIT, verify=False)
    with tempfile.TemporaryDirectory() as folder, timing.Peak() as peak:
        report = onnx.export(inheriting, Path(folder) / "bundle", progress=False)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": weights,
        "file_bytes": report.file_bytes,
        "models": len(report.nodes),
        "seconds": time.perf_counter() - start,
        "stages": report.seconds,
        "resident_before": before,
        "own_peak": peak.own,
        "resident_peak": peak.total,
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
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
        "the UNet's own weights included. Pages of the memory-mapped weight file are shared, and not its own."
    )
