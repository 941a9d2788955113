"""Costs of calls: seconds, measured on this machine or read from a file of another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ScheduleError, SpecError
from ..inheritance.cache import no_value
from ..runtime.unet import GraphUNet
from ..text import from_json, read_text
from . import TIMES_FORMAT

Cost = Callable[[frozenset[str]], float]  # maps the reused sites of a call to its cost
TURNS = 7  # the first two are not counted


def seconds_here(unet: GraphUNet, flat: Mapping[str, Tensor]) -> Cost:
    """Return a cost in seconds, measured here in turns with calls that compute everything.

    Args:
        unet: the UNet, whose variants are timed.
        flat: the inputs of a call.
    """

    @torch.no_grad()
    def timed(reused: frozenset[str], values: Mapping[str, Tensor]) -> float:
        _wait(flat["sample"])
        start = time.perf_counter()
        unet.backend.compute(flat, reused, values.__getitem__)
        _wait(flat["sample"])
        return time.perf_counter() - start

    with torch.no_grad():
        _, values = unet.backend.compute(flat, frozenset(), no_value)
    whole = statistics.median(timed(frozenset(), values) for _ in range(TURNS))

    def cost(reused: frozenset[str]) -> float:
        ratios = [timed(reused, values) / timed(frozenset(), values) for _ in range(TURNS)] if reused else [1.0]
        return whole * statistics.median(ratios[2:] or ratios)  # the speed of the machine may have changed since

    return cost


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def seconds_of(path: Path) -> Cost:
    """Return a cost in seconds, as `sdgraph bench --out` measured it on the machine of a bundle.

    Args:
        path: a JSON file with the seconds of graphs under "variants", and under "reused" the sites that each does not
            compute.
    Raises:
        SpecError: the file cannot be read, or holds no times of variants.
        ScheduleError: a variant is not among those that were measured; raised where its cost is asked for.
    """
    hint = "'time', 'macs', or the JSON file of `sdgraph bench BUNDLE --out FILE`"
    text = read_text(path, SpecError, where="cost", hint=hint)
    try:
        figures: Any = from_json(text)
        if figures["format"] != TIMES_FORMAT:
            raise ValueError(f"it has format {figures['format']}, and this sdgraph reads format {TIMES_FORMAT}")
        reused = {name: frozenset(map(str, sites)) for name, sites in figures["reused"].items()}
        seconds = {reused[name]: float(took) for name, took in figures["variants"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{path} has no times of calls ({type(error).__name__}: {error})",
            where="cost",
            hint=hint,
        ) from error

    def cost(reused: frozenset[str]) -> float:
        if reused not in seconds:
            raise ScheduleError(
                f"{path} has no time of a call without {', '.join(sorted(reused)) or 'anything left out'}",
                where="cost",
                hint="export the candidates, each with its own schedule, and measure that bundle",
            )
        return seconds[reused]

    return cost
