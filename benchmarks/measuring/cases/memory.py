"""`memory/MODEL/SIZE`: the memory of a process that runs a bundle."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from diffusers import DDIMScheduler
from onnxruntime import GraphOptimizationLevel

import sdgraph
from sdgraph.exporters import onnx, ort

from .. import random_unets, timing
from ..tables import markdown
from .settings import CALLS, INHERIT, Settings

SIZES = ("sd15/64",)
QUICK: tuple[str, ...] = ("tiny/16",)
PROVIDER = "CPUExecutionProvider"
# The runners of a bundle, and their settings of ONNX Runtime's sessions.
RUNNERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "ONNX Runtime": {},
    "an arena for each session": {"session.use_env_allocators": 0},
    "no arena": {"enable_cpu_mem_arena": False},
    "weights as they lie in the file": {
        "session.disable_prepacking": 1,
        "graph_optimization_level": GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    },
}


def run(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return the memory and time of a UNet that reuses features, by its runner, each in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        unet = sdgraph.apply(random_unets.build(model, "cpu", torch.float32), INHERIT, verify=False)
        report = onnx.export(unet, bundle, calls=CALLS, progress=False)
        del unet
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            runners = {name: pool.submit(_taken, name, bundle, settings, model, size).result() for name in RUNNERS}
    return {"weight_bytes": report.weight_bytes, "runners": runners}


@torch.no_grad()
def _taken(runner: str, bundle: Path, settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Return the memory of this process, when all is open and at its peak, and the seconds of generations."""
    before = timing.resident()
    files = timing.mapped(psutil.Process().memory_info())
    unet: Any
    if runner == "torch":
        unet = sdgraph.apply(random_unets.build(model, "cpu", torch.float32), INHERIT, verify=False)
    else:
        unet = ort.ORTUNet.from_pretrained(bundle, provider=PROVIDER, session_options=RUNNERS[runner], verify=False)
    config = SimpleNamespace(config=SimpleNamespace(**unet.config), device=unet.device, dtype=unet.dtype)
    call = random_unets.call(config, settings.batch, int(size), int(size))  # type: ignore[arg-type]
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(CALLS)
    opened = timing.resident()

    def generation() -> None:
        own = call["encoder_hidden_states"].clone()
        for timestep in scheduler.timesteps:
            unet(**{**call, "timestep": timestep, "encoder_hidden_states": own})

    with timing.Peak() as peak:
        generation()
    seconds = [timing.timed(generation, "cpu") for _ in range(settings.at_least)]
    sizes = {"opened": opened, "own": peak.own + files, "total": peak.total}
    return {"seconds": seconds, **{name: size - before for name, size in sizes.items()}}


def table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("model", "latents", "run by", "when open", "at most", "of that its own", "seconds")]
    for case in cases:
        _, model, size = case["case"].split("/")
        for name, each in case["runners"].items():
            sizes = (f"{each[key] / 1e9:.3g} GB" for key in ("opened", "total", "own"))
            rows.append((model, f"{size}x{size}", name, *sizes, f"{statistics.median(each['seconds']):.3g}"))
    weights = ", ".join(f"{case['weight_bytes'] / 1e9:.3g} GB" for case in cases)
    return (
        f"{markdown(rows)}\n\nGenerations of 10 calls in a separate process, less its memory before; the weights are "
        f"{weights}. Pages of the memory-mapped weight file are shared, and not its own."
    )
