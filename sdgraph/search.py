"""`search`: the refresh steps that cost the least quality, for a budget of multiply-accumulates.

What inheriting does is measured on calibration prompts: for each group of sites, the error at call j of what was
refreshed at call i. Errors of different calls are made comparable by how far a disturbance of each moves the final
latents. The best refreshes of a group are then a shortest path from the first call to the end, whose edges are the
stretches without a refresh; the price of a refresh, one for all groups, is set so that the budget is met.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .apply import apply
from .errors import ScheduleError, SourceError, SpecError
from .graph import Graph
from .pass_ import Chain, Pass
from .schedules import Explicit, Run, Uniform
from .timetable import Timetable
from .unet import GraphUNet, no_value

Array = np.ndarray[Any, np.dtype[np.float64]]
HALVINGS = 40  # of the interval, 15 decades, in which the price of a refresh is sought


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        passes: the candidates with their schedules, but for those that are better never inherited.
        timetable: what the calls do.
        predicted: mean squared error of the final latents, as the sum of what was measured call by call.
        measured: the same of whole generations with these passes, on the same prompts.
    """

    passes: Chain
    timetable: Timetable
    predicted: float
    measured: float

    def __str__(self) -> str:
        error = f"  error of the final latents: {self.predicted:.3g} predicted, {self.measured:.3g} measured"
        return "\n".join([*map(str, self.passes.passes), str(self.timetable), error])

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `sdgraph.parse` reads the passes."""
        return {
            "passes": str(self.passes),
            "predicted": self.predicted,
            "measured": self.measured,
            "timetable": self.timetable.as_dict(),
        }


def search(
    pipe: Any,
    candidates: Sequence[Pass],
    prompts: Sequence[str],
    *,
    budget: float,
    seed: int = 0,
    reach: int = 12,
    folder: str | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> Found:
    """Give each candidate the schedule with which all together cost the least quality within a budget.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. It is as it was afterwards.
        candidates: `InheritFeatures` passes; each is a group of sites that gets a schedule of its own, in place of
            the one it has. What groups cost is added up: they should lie beside each other, not one behind the other.
        prompts: to calibrate on, in one batch.
        budget: multiply-accumulates of a generation, as a share of all.
        seed: of the latents.
        reach: the most calls from a refresh to the next.
        folder: where measurements are kept, so that a stopped search goes on and another budget costs little.
        progress: show a bar.
        call: further arguments of the pipeline, such as `num_inference_steps=50`.
    Raises:
        SourceError: the pipeline has no UNet.
        SpecError: no candidates or prompts, a candidate without sites, or a budget that is no share.
        ScheduleError: the budget is not to be had; with the least that is.
    """
    if not candidates or not prompts:
        raise SpecError("nothing to search: no candidates or no prompts", where="search", cure="give some of each")
    if not 0 < budget <= 1:
        raise SpecError(f"the budget is {budget}", where="search", cure="a share of all, above 0 and at most 1")
    if "output_type" in call:
        raise SpecError("output_type is not yours to set", where="search", cure="leave it out: latents are compared")
    if getattr(pipe, "unet", None) is None:
        raise SourceError(f"{type(pipe).__name__} has no UNet", where="search", cure="a pipeline with one")
    source = apply(pipe.unet, ())
    inheriting, groups = source, []
    for one in candidates:
        before = set(inheriting.graph.sites)
        inheriting = apply(inheriting, one, verify=False)
        groups.append(frozenset(inheriting.graph.sites) - before)
        if not groups[-1] or not {"schedule", "forecast"} <= {field.name for field in fields(one)}:
            raise SpecError(f"{one} has no sites to give a schedule", where="candidates", cure="InheritFeatures passes")

    def generate(unet: GraphUNet) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        with _instead(pipe, unet):
            found = pipe(prompt=list(prompts), generator=generators, **{**call, "output_type": "latent"})
        return found.images  # type: ignore[no-any-return]

    calls = _Recorder(inheriting.graph.copy(), frozenset().union(*groups))
    final = generate(calls)
    timesteps = tuple(float(each.flat["timestep"].reshape(-1)[0]) for each in calls.made)
    kept = _Kept(Path(folder) if folder else None, final)
    with tqdm(total=len(timesteps) * (1 + len(groups)), desc="search", unit="call", disable=not progress) as bar:
        names = [str(replace(one, schedule=Uniform(1), forecast=0)) for one in candidates]  # type: ignore[call-arg]
        weights = kept(f"weights: {', '.join(names)}", partial(_weights, generate, calls, final, bar))
        costs = [
            _costs(weights, kept(f"{name}, {reach}", partial(_errors, calls, group, reach, bar)))
            for name, group in zip(names, groups, strict=True)
        ]
    saved = [source.graph.macs - inheriting.graph.step_macs(group) for group in groups]
    run, graph = Run(len(timesteps), timesteps), inheriting.graph.copy()

    def table(plan: Sequence[tuple[int, ...]]) -> Timetable:
        for group, refreshes in zip(groups, plan, strict=True):
            for site in group:
                graph.reschedule(site, Explicit(refreshes))
        return graph.timetable(run.timesteps or ())

    def plan(price: float) -> list[tuple[int, ...]]:
        return [_path(cost, price * macs) for cost, macs in zip(costs, saved, strict=True)]

    high = _dear(costs, saved)
    low, best = high * 1e-15, plan(high)
    least, most = table(best).macs, budget * source.graph.macs * len(timesteps)
    if least > most:
        raise ScheduleError(
            f"a budget of {budget:.3g} is not to be had: these candidates leave "
            f"{least / source.graph.macs / len(timesteps):.3g} at the least",
            where="search", cure="a larger budget or reach, or other candidates",
        )  # fmt: skip
    for _ in range(HALVINGS):
        found = plan(price := math.sqrt(low * high))
        if table(found).macs <= most:
            high, best = price, found
        else:
            low = price
    passes = Chain(
        tuple(
            replace(one, schedule=Explicit(refreshes, len(timesteps)))  # type: ignore[call-arg]
            for one, refreshes in zip(candidates, best, strict=True)
            if len(refreshes) < len(timesteps)
        )
    )
    predicted = sum(_total(cost, refreshes) for cost, refreshes in zip(costs, best, strict=True))
    measured = _distance(generate(apply(source, passes, verify=False)), final)
    return Found(passes, table(best), predicted, measured)


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """A call that computed everything."""

    flat: Mapping[str, Tensor]
    output: Tensor
    values: Mapping[str, Tensor]


class _Recorder(GraphUNet):
    """Computes everything at every call and keeps it; or lets a single call inherit `sites` from the one before."""

    def __init__(self, graph: Graph, sites: frozenset[str]) -> None:
        super().__init__(graph)
        self.sites = sites
        self.made: list[_Made] = []
        self.disturbed: int | None = None
        self.number = 0

    def run(self, flat: Mapping[str, Tensor]) -> Tensor:
        if self.disturbed is not None and self.number == self.disturbed:
            value = self.made[self.number - 1].values.__getitem__
            output, _ = self._step(flat, self.sites, value)
        else:
            output, values = self._step(flat, frozenset(), no_value)
            if self.disturbed is None:
                self.made.append(_Made(dict(flat), output, values))
        self.number += 1
        return output


@torch.no_grad()
def _weights(generate: Callable[[GraphUNet], Tensor], calls: _Recorder, final: Tensor, bar: Any) -> Array:
    """(T) mean squared error of the final latents, per that of the output of each call.

    Measured with errors that inheriting makes: guidance weakens what they have in common with and without the prompt,
    and would magnify random ones.
    """
    found = np.zeros(len(calls.made))
    bar.update()  # there is nothing to inherit at the first call
    for j in range(1, len(found)):
        calls.number, calls.disturbed = 0, j
        latents = generate(calls)
        output, _ = calls._step(calls.made[j].flat, calls.sites, calls.made[j - 1].values.__getitem__)
        found[j] = _distance(latents, final) / max(_distance(output, calls.made[j].output), 1e-300)
        bar.update()
    return found


@torch.no_grad()
def _errors(calls: _Recorder, group: frozenset[str], reach: int, bar: Any) -> Array:
    """(T, T) mean squared error of the output of call j if a group of sites comes from call i; nan where it is not
    asked for."""
    T = len(calls.made)
    found = np.full((T, T), np.nan)
    for i, earlier in enumerate(calls.made):
        for j in range(i + 1, min(T, i + reach)):
            output, _ = calls._step(calls.made[j].flat, group, earlier.values.__getitem__)
            found[i, j] = _distance(output, calls.made[j].output)
        bar.update()
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


class _Kept:
    """Measurements in a folder, named by what they are of and by the latents that the undisturbed pipeline makes:
    those depend on the weights, prompts, scheduler and steps alike."""

    def __init__(self, folder: Path | None, final: Tensor) -> None:
        self.folder = folder
        self.key = final.cpu().float().numpy().tobytes()

    def __call__(self, name: str, measure: Callable[[], Array]) -> Array:
        if self.folder is None:
            return measure()
        path = self.folder / f"{hashlib.sha256(name.encode() + self.key).hexdigest()[:20]}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            with unfinished.open("wb") as file:
                np.save(file, measure())
            unfinished.rename(path)
        return np.load(path)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _instead(pipe: Any, unet: GraphUNet) -> Iterator[None]:
    own, pipe.unet = pipe.unet, unet
    try:
        yield
    finally:
        pipe.unet = own


# -- what is chosen ---------------------------------------------------------------------------------------------------


def _costs(weights: Array, errors: Array) -> Array:
    """(T, T + 1) error of the final latents if a refresh at call i is followed by one at call k, or by the end (T)."""
    T = len(weights)
    found = np.full((T, T + 1), np.nan)
    for i in range(T):
        found[i, i + 1] = 0.0
        for k in range(i + 2, T + 1):
            found[i, k] = found[i, k - 1] + weights[k - 1] * errors[i, k - 1]
    return found


def _path(cost: Array, price: float) -> tuple[int, ...]:
    """The cheapest refreshes, at a price for each."""
    net: nx.DiGraph[int] = nx.DiGraph()
    net.add_weighted_edges_from((int(i), int(k), cost[i, k] + price) for i, k in np.argwhere(np.isfinite(cost)))
    return tuple(nx.shortest_path(net, 0, cost.shape[1] - 1, weight="weight")[:-1])


def _total(cost: Array, refreshes: Sequence[int]) -> float:
    stops = (*refreshes[1:], cost.shape[1] - 1)
    return float(sum(cost[i, k] for i, k in zip(refreshes, stops, strict=True)))


def _dear(costs: Sequence[Array], saved: Sequence[int]) -> float:
    """A price at which no refresh is bought that need not be."""
    return max(float(np.nansum(cost)) / macs for cost, macs in zip(costs, saved, strict=True)) + 1e-300
