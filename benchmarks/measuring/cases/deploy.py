"""`deploy/MODEL/SIZE`: ONNX Runtime on the CPU against eager."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

import sdgraph
from sdgraph.exporters import onnx, ort

from .. import random_unets, timing
from ..tables import markdown
from .settings import CALLS, INHERIT, Settings

SIZES = ("sd15/32",)
QUICK: tuple[str, ...] = ("tiny/16",)


def run(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return times of ONNX Runtime on the CPU and of eager: each variant of a call, and whole generations."""
    unet = random_unets.build(model, "cpu", torch.float32, sample_size=int(size))
    call = random_unets.call(unet, settings.batch, int(size), int(size))
    inheriting = sdgraph.apply(unet, INHERIT, verify=False)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(CALLS)
    prompt = call.pop("encoder_hidden_states")

    def generation(one: Any) -> torch.Tensor:
        own = prompt.clone()
        for timestep in scheduler.timesteps:
            output = one(call["sample"], timestep, encoder_hidden_states=own, return_dict=False)[0]
        return output

    with tempfile.TemporaryDirectory() as folder:
        onnx.export(inheriting, Path(folder) / "bundle", calls=CALLS, progress=False)
        running = ort.ORTUNet.from_pretrained(Path(folder) / "bundle", provider="CPUExecutionProvider")
        methods = {"eager": partial(generation, unet), "inherit": partial(generation, inheriting)}
        methods |= {"ONNX Runtime, inherit": partial(generation, running)}
        flat = {"sample": call["sample"], "timestep": torch.tensor([500.0]), "encoder_hidden_states": prompt}
        sizes = running.manifest.check(flat)
        first = running.manifest.variants[0]
        known = dict(zip(first.writes, running.backend.run(first, flat, sizes)[1:], strict=True))
        for one in running.manifest.variants:
            given = {**flat, **{f"reused.{site}": known[site] for site in one.reads}}
            module = inheriting.variant(frozenset(flat), frozenset(one.reads))
            methods[f"{one.file}, torch"] = partial(module, *given.values())
            methods[f"{one.file}, ONNX Runtime"] = partial(running.backend.run, one, given, sizes)
        largest = float((methods["inherit"]() - methods["ONNX Runtime, inherit"]()).abs().max())
        samples = timing.in_turns(methods, "cpu", settings.seconds, settings.at_least)
    return {"samples": samples, "largest_difference": largest}


def table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "on the CPU", "seconds", "eager/time", "torch/time")]
    for case in cases:
        _, model, size = case["case"].split("/")
        samples = case["samples"]
        for name, mine in samples.items():
            graph = name.removesuffix(", ONNX Runtime")
            torchs = samples.get(f"{graph}, torch") if graph != name else samples.get("inherit")
            whole = samples["eager"] if "onnx" not in name else None
            gains = [
                f"{statistics.median(o / m for o, m in zip(other, mine, strict=True)):.2f}" if other else ""
                for other in (whole, torchs if "ONNX Runtime" in name else None)
            ]
            rows.append((model, f"{size}x{size}", name, f"{statistics.median(mine):.3g}", *gains))
    return markdown(rows) + "\n\nGenerations of 10 calls, then single calls by graph."
