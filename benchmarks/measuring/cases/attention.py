"""`attention/MODEL/SIZE`: self-attention at the latents' resolution alone, and the whole UNet, with global-regional
attention against full."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import sdgraph
from sdgraph.passes import GRIAttention
from sdgraph.passes.gri_attention import attend, self_attentions

from .. import random_unets, timing
from ..tables import markdown, ratio
from .settings import Settings

SIZES = ("sd15/64", "sd15/96", "sd15/128")
QUICK: tuple[str, ...] = ("small/32",)
GRI = ((16, 4), (16, 8), (8, 4))  # windows and pools


def run(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return times of global-regional and full attention: the operation alone, and the whole UNet."""
    unet = random_unets.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = random_unets.call(unet, settings.batch, int(size), int(size))
    whole = sdgraph.apply(unet, (), verify=False)
    node = next(node for node, _, level in self_attentions(whole.graph) if level == 0)
    shape = (settings.batch, *node.args[0].meta["val"].shape[1:])
    q, k, v = torch.randn(3, *shape, dtype=unet.dtype, device=unet.device)
    side = int(size)
    alone: dict[str, Any] = {"full": lambda: F.scaled_dot_product_attention(q, k, v)}
    inside: dict[str, Any] = {"full": partial(whole, **call)}
    for window, pool in GRI:
        if window >= side:
            continue
        name = f"window {window}, pool {pool}"
        alone[name] = partial(attend, q, k, v, side, side, window, pool)
        inside[name] = partial(sdgraph.apply(whole, GRIAttention(window, pool), verify=False), **call)
    seconds = settings.seconds / 2
    return {
        "alone": timing.in_turns(alone, settings.device, seconds, settings.at_least),
        "samples": timing.in_turns(inside, settings.device, seconds, settings.at_least),
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "self-attention", "its time/full", "UNet's time/full")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name in case["alone"]:
            each = (ratio(case[key][name], case[key]["full"]) for key in ("alone", "samples"))
            rows.append((model, f"{size}x{size}", name, *each))
    return markdown(rows) + "\n\nAt the latents' resolution; other levels have full attention."
