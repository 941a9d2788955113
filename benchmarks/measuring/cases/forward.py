"""`forward/MODEL/SIZE`: a traced UNet without passes against eager, and eager against itself, which is the noise of the
machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import sdgraph

from .. import random_unets, timing
from ..tables import markdown, ratio
from .settings import Settings

SIZES = ("small/32", "sd15/16", "sd15/32", "sd15/64")
QUICK: tuple[str, ...] = ("small/32",)


def run(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return times of a traced UNet without passes, and of eager."""
    unet = random_unets.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = random_unets.call(unet, settings.batch, int(size), int(size))
    traced = sdgraph.apply(unet, [])
    largest = float((unet(**call)[0] - traced(**call)[0]).abs().max())
    calls = {
        "eager": lambda: unet(**call),
        "traced": lambda: traced(**call),
        "eager again": lambda: unet(**call),
    }
    samples = timing.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    return {"samples": samples, "largest_difference": largest, "nodes": len(traced.graph.nodes)}


def table(cases: Sequence[dict[str, Any]]) -> str:
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
