"""`inherit/MODEL/SIZE`: feature inheritance, whole generations: time against multiply-accumulates, and against the
DeepCache package at the same settings."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler

import sdgraph
from sdgraph.passes import InheritFeatures

from .. import random_unets, timing
from ..tables import markdown, ratio
from .settings import CALLS, Settings

SIZES = ("sd15/32",)
QUICK: tuple[str, ...] = ("tiny/16",)
DEEP_CACHE = ((2, 0), (3, 0), (5, 0), (5, 1), (5, 2))  # intervals and branches


def run(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return the time of whole generations and the kept memory at DeepCache's settings, ours and the package's."""
    unet = random_unets.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = random_unets.call(unet, settings.batch, int(size), int(size))
    prompt = call.pop("encoder_hidden_states")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(CALLS, device=settings.device)
    kept: dict[str, int] = {}

    def generation(name: str, one: Any, bytes_kept: Callable[[], int]) -> torch.Tensor:
        own = prompt.clone()  # another tensor is another generation
        for timestep in scheduler.timesteps:
            output = one(call["sample"], timestep, encoder_hidden_states=own, **rest)[0]
        kept[name] = bytes_kept()
        return output

    rest = {key: value for key, value in call.items() if key not in ("sample", "timestep")}
    calls: dict[str, Any] = {"eager": partial(generation, "eager", unet, lambda: 0)}
    tables, largest = {}, {}
    for interval, branch in DEEP_CACHE:
        name = f"interval {interval}, branch {branch}"
        mine = sdgraph.apply(unet, InheritFeatures.deep_cache(interval, branch), verify=False)
        # the package replaces methods of modules: other modules, but the same weights
        theirs = copy.deepcopy(unet, {id(p): p for p in unet.parameters()})
        helper = DeepCacheSDHelper(SimpleNamespace(unet=theirs, scheduler=scheduler))
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        calls[name] = partial(generation, name, mine, mine.cache_bytes)
        calls[f"{name}, DeepCache"] = partial(
            generation, f"{name}, DeepCache", theirs, partial(_bytes, helper.cached_output)
        )
        tables[name] = mine.graph.timetable(CALLS)
        largest[name] = float((calls[name]() - calls[f"{name}, DeepCache"]()).abs().max())
    samples = timing.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    bounds = {name: {"bound": table.bound, "macs": table.macs} for name, table in tables.items()}
    return {"samples": samples, "timetables": bounds, "kept_bytes": kept, "largest_difference": largest}


def _bytes(kept: Any) -> int:
    """Return the bytes of all storages of tensors in nested containers."""
    found: dict[int, int] = {}

    def look(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            look(list(one.values()))
        elif isinstance(one, list | tuple):
            for each in one:
                look(each)

    look(kept)
    return sum(found.values())


def table(cases: Sequence[dict[str, Any]]) -> str:
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
