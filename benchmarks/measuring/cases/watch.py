"""`watch/PLAN`: the cost per call of noticing changed weights or modules, on the scenes' model.

Two samples, one thread, the model's own size; on a CPU, the time that the process spends. A turn times a whole call of
a traced UNet without passes, and by itself what a UNet with the plan does at the beginning of every call: to look at
its modules, and at the weights that kept values depend on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import sdgraph

from .. import random_unets, timing
from ..tables import markdown, ratio
from .settings import Settings

MODEL = Path(__file__).parents[3] / "examples/scenes/model/unet"
PLANS = {
    "none": "",
    "hoist": "HoistInvariants()",
    "inherit": "HoistInvariants(), InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')",
}
SIZES = tuple(PLANS)
QUICK = SIZES


def run(settings: Settings, plan: str) -> dict[str, Any]:
    """Return times of a whole call, and of the watch of a UNet with the plan."""
    torch.set_num_threads(1)
    source = UNet2DConditionModel.from_pretrained(MODEL).eval().to(settings.device)
    plain, planned = (sdgraph.apply(source, passes, verify=False) for passes in ("", PLANS[plan]))
    size = int(source.config.sample_size)
    call = random_unets.call(source, 2, size, size)
    planned(**call)

    def watch() -> None:
        planned.follow_changes()
        planned.watch.weights(True)

    calls = {"call": lambda: plain(**call), "watch": watch}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + settings.seconds
    while len(samples["call"]) < settings.at_least or time.perf_counter() < end:
        for name, each in calls.items():  # the watch after a call, which leaves it cold caches
            samples[name].append(timing.spent(each, settings.device))
    return {"samples": samples, "tensors": len(planned.tensors())}


def table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("plan", "watch/call of two samples", "samples")]
    for case in cases:
        samples = case["samples"]
        rows.append((case["case"].split("/")[1], ratio(samples["watch"], samples["call"]), f"{len(samples['call'])}"))
    return markdown(rows) + "\n\nMedian of the ratios within each turn, and their quartiles."
