"""Costs of calls: seconds, measured on this machine or read from a file of another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
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
MemberCost = Callable[[str, frozenset[str]], float]  # the same, of a call of the UNet that is named first
TURNS = 7  # the first two are not counted


def seconds_here(unets: Mapping[str, GraphUNet], flat: Mapping[str, Tensor]) -> MemberCost:
    """Return a cost in seconds, measured here in turns with calls of the first UNet that compute everything.

    Args:
        unets: the UNets by name, whose variants are timed.
        flat: the inputs of a call.
    """

    @torch.no_grad()
    def timed(unet: GraphUNet, reused: frozenset[str], values: Mapping[str, Tensor]) -> float:
        _wait(flat["sample"])
        start = time.perf_counter()
        unet.backend.compute(flat, reused, values.__getitem__)
        _wait(flat["sample"])
        return time.perf_counter() - start

    known: dict[str, Mapping[str, Tensor]] = {}

    @torch.no_grad()
    def values(name: str) -> Mapping[str, Tensor]:
        if name not in known:
            known[name] = unets[name].backend.compute(flat, frozenset(), no_value)[1]
        return known[name]

    first = next(iter(unets))
    yardstick = partial(timed, unets[first], frozenset(), values(first))
    whole = statistics.median(yardstick() for _ in range(TURNS))

    def cost(member: str, reused: frozenset[str]) -> float:
        if member == first and not reused:
            return whole
        ratios = [timed(unets[member], reused, values(member)) / yardstick() for _ in range(TURNS)]
        return whole * statistics.median(ratios[2:])  # the speed of the machine may have changed since

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
