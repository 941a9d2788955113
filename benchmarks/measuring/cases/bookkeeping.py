"""`bookkeeping/ACCOUNT`: the cost per call of everything around the computation, on the scenes' model.

Two samples, one thread, the model's own size; on a CPU, the time that the process spends. A turn makes the calls of a
generation that reuses features twice: once as they are, and once with modules that answer at once with what they
computed before. The second one has the cost of arguments, checks, the tracker and the feature cache alone. The account
of the calls is `expecting`, or that of their latents.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch.fx.graph_module import _WrappedCall

import sdgraph

from .. import random_unets, timing
from ..tables import markdown, ratio
from .settings import Settings

MODEL = Path(__file__).parents[3] / "examples/scenes/model/unet"
PASSES = "HoistInvariants(), InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"
CALLS = 20
SIZES = QUICK = ("expecting", "latents")


def run(settings: Settings, account: str) -> dict[str, Any]:
    """Return times of a call with and without its computation, seconds per call."""
    torch.set_num_threads(1)
    source = UNet2DConditionModel.from_pretrained(MODEL).eval().to(settings.device)
    unet = sdgraph.apply(source, PASSES, verify=False)
    size = int(source.config.sample_size)
    call = random_unets.call(source, 2, size, size)
    timesteps = [float(950 - 40 * number) for number in range(CALLS)]

    def generation() -> None:
        prompt, latents = call["encoder_hidden_states"].clone(), call["sample"]
        with unet.expecting(timesteps) if account == "expecting" else contextlib.nullcontext():
            for timestep in timesteps:
                output = unet(**{**call, "sample": latents, "timestep": timestep, "encoder_hidden_states": prompt})[0]
                latents = 0.98 * latents - 0.05 * output

    answers: dict[int, Any] = {}
    with remembered(answers):
        generation()
    samples: dict[str, list[float]] = {"whole": [], "bookkeeping": []}
    end = time.perf_counter() + settings.seconds
    while len(samples["whole"]) < settings.at_least or time.perf_counter() < end:
        samples["whole"].append(timing.spent(generation, settings.device) / CALLS)
        with remembered(answers):
            samples["bookkeeping"].append(timing.spent(generation, settings.device) / CALLS)
    return {"samples": samples, "calls": CALLS}


@contextlib.contextmanager
def remembered(answers: dict[int, Any]) -> Iterator[None]:
    """A context in which graph modules answer with what they computed at their first call."""
    compute = _WrappedCall.__call__

    def answer(wrapped: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if id(module) not in answers:
            answers[id(module)] = compute(wrapped, module, *args, **kwargs)
        return answers[id(module)]

    with mock.patch.object(_WrappedCall, "__call__", answer):
        yield


def table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [("account", "bookkeeping, ms per call", "of a call", "samples")]
    for case in cases:
        samples = case["samples"]
        milliseconds = f"{1000 * median(samples['bookkeeping']):.3g}"
        shares = ratio(samples["bookkeeping"], samples["whole"])
        rows.append((case["case"].split("/")[1], milliseconds, shares, f"{len(samples['whole'])}"))
    return markdown(rows) + "\n\nMedians; the ratios within each turn, and their quartiles."
