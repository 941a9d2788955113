"""`experts/MODEL/SIZE`: a pruned UNet with conditional convolutions against the same with plain ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import sdgraph
from sdgraph.passes import InheritFeatures, MECondConv, PruneBlocks
from sdgraph.schedules import Uniform

from .. import random_unets, timing
from ..tables import markdown, ratio
from .settings import CALLS, Settings

SIZES = ("sd15/32",)
QUICK: tuple[str, ...] = ("tiny/16",)


def run(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return the time and memory of conditional convolutions in a pruned UNet, by routing, in whole generations."""
    unet = random_unets.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = random_unets.call(unet, settings.batch, int(size), int(size))
    prompt = call.pop("encoder_hidden_states")
    del call["timestep"]
    prune, by_timestep = PruneBlocks("bk-sdm-base"), MECondConv(routing="timestep")
    rank = min(8, unet.config.block_out_channels[0] // 3)  # three experts of it, also in the tiny model
    passes = {
        "plain": (prune,),
        "timestep": (prune, by_timestep),
        "timestep, mixed at every 10th call": (prune, by_timestep, InheritFeatures("**.mix", Uniform(10))),
        f"timestep, rank {rank}": (prune, MECondConv(rank=rank)),
        "input": (prune, MECondConv(routing="input")),
    }
    made = {name: sdgraph.apply(unet, each, verify=False) for name, each in passes.items()}
    kept: dict[str, int] = {}

    def generation(name: str) -> None:
        own = prompt.clone()
        for timestep in range(999, 0, -1000 // CALLS):
            made[name](**call, timestep=timestep, encoder_hidden_states=own)
        kept[name] = made[name].cache_bytes()

    calls = {name: partial(generation, name) for name in made}
    samples = timing.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    sizes = {
        name: {"parameters": sum(p.numel() for p in one.parameters()), "kept_bytes": kept[name]}
        for name, one in made.items()
    }
    return {"samples": samples, "sizes": sizes}


def table(cases: Sequence[dict[str, Any]]) -> str:
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
