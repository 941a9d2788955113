"""`layers/BATCH`: single convolutions, plain and as four experts, with full kernels and of rank 8."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sdgraph.passes.me_cond_conv import ConditionalConv2d, LowRankConv2d

from .. import timing
from ..tables import markdown, ratio
from .settings import Settings

SIZES = ("2", "8")
QUICK: tuple[str, ...] = ()
LAYERS = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # channels and side of 3x3 convolutions


def run(settings: Settings, batch: str) -> dict[str, Any]:
    """Return times of single convolutions of Stable Diffusion 1.5 at 512x512 pixels, plain and as four experts."""
    found = {}
    for channels, side in LAYERS:
        like = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
        convs = [nn.Conv2d(channels, channels, 3, padding=1, **like) for _ in range(4)]
        experts = ConditionalConv2d(convs, 4, 1280, "softmax", 1.0)
        x, embedding = torch.randn(int(batch), channels, side, side, **like), torch.randn(int(batch), 1280, **like)
        by_input = ConditionalConv2d(convs, 4, channels, "softmax", 1.0)
        low_rank = LowRankConv2d(convs[:1], 4, 1280, "softmax", 1.0, rank=8)
        calls = {
            "plain": partial(convs[0], x),
            "timestep": partial(experts, x, embedding, torch.tensor([500], device=settings.device)),
            "input": partial(by_input, x),
            "timestep, rank 8": partial(low_rank, x, embedding),
        }
        seconds = settings.seconds / len(LAYERS)
        found[f"{channels} channels, {side}x{side}"] = timing.in_turns(
            calls, settings.device, seconds, settings.at_least
        )
    return {"layers": found}


def table(cases: Sequence[dict[str, Any]]) -> str:
    methods = [name for name in next(iter(cases[0]["layers"].values())) if name != "plain"]
    rows = [("3x3 convolution", "batch", "plain", *(f"by {name}/plain" for name in methods))]
    for case in cases:
        for name, samples in case["layers"].items():
            plain = f"{1000 * statistics.median(samples['plain']):.3g} ms"
            ratios = (ratio(samples[method], samples["plain"]) for method in methods)
            rows.append((name, case["case"].split("/")[1], plain, *ratios))
    return markdown(rows) + "\n\nFour experts."
