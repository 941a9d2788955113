"""`search`: the refresh steps that cost the least quality, for a budget of multiply-accumulates.

A *stretch* is the sequence of calls from one refresh to the next. For every group of sites and every stretch, the
sampler continues from undisturbed latents with the group inherited during the stretch. The error of the stretch is the
error of the latents at its end, so the errors of its calls add up as they do in a generation, and a forecast is judged
as a whole. Errors at different calls become comparable when they are multiplied by the factor with which they grow
until the final latents. Errors of different prompts are divided by the sum of all errors of the prompt, because some
prompts are a hundred times as sensitive as others and would decide alone.

The best refreshes of a group are then a shortest path from the first call to the end, one path for every number of
refreshes. The groups share the budget so that the last multiply-accumulate lowers the error equally in all of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..compiler.base import Pass
from ..compiler.chain import Chain
from ..errors import ScheduleError, SpecError
from ..forecasts import as_forecast
from ..inheritance.timetable import Timetable
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from ..schedules import Explicit, Uniform
from .latents import Array, check_request, final_latents, typical
from .replay import MeasurementCache, ReplayUNet, distances

TRUSTED = 2.0  # a prediction within this factor is as good as they are
State = tuple[int, ...]  # the last refreshes, as many as a forecast goes through; the newest last
Choice = Mapping[int, tuple[float, tuple[int, ...]]]  # by the number of refreshes: the least error, and which they are


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        passes: the candidates with their schedules, but for those that are better never inherited.
        timetable: what the calls do.
        predicted: mean squared error of the final latents, the geometric mean over the prompts, from what was measured
            stretch by stretch. It holds for small errors, and better for many prompts than for one.
        measured: the same of whole generations with these passes, on the same prompts.
        prompts: how many there were.
    """

    passes: Chain
    timetable: Timetable
    predicted: float
    measured: float
    prompts: int

    @property
    def warning(self) -> str:
        """What is to be said if the prediction is off by more than a factor of two; else nothing."""
        ratio = self.measured / self.predicted
        if 1 / TRUSTED <= ratio <= TRUSTED:
            return ""
        off = f"{ratio:.2g} times" if ratio > 1 else f"1/{1 / ratio:.2g} of"
        return (
            f"what was measured is {off} what was predicted (prompts: {self.prompts}), so another schedule may be "
            "better: search on more prompts, 16 to 32, or with a larger budget, for predictions hold for small errors"
        )

    def __str__(self) -> str:
        error = f"  error of the final latents: {self.predicted:.3g} predicted, {self.measured:.3g} measured"
        told = [textwrap.fill(f"warning: {self.warning}", 110, initial_indent="  ", subsequent_indent="  ")]
        return "\n".join([*map(str, self.passes.passes), str(self.timetable), error, *told * bool(self.warning)])

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `sdgraph.parse` reads the passes."""
        return {
            "passes": str(self.passes),
            "predicted": self.predicted,
            "measured": self.measured,
            "prompts": self.prompts,
            "warning": self.warning or None,
            "timetable": self.timetable.as_dict(),
        }


def search(
    pipe: Any,
    candidates: Sequence[Pass],
    prompts: Sequence[str],
    *,
    budget: float,
    seed: int = 0,
    reach: int = 10,
    probes: int = 8,
    folder: str | Path | None = None,
    progress: bool = True,
    **call: Any,
) -> SearchResult:
    """Find the schedules of candidates with the least error within a budget of multiply-accumulates.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. It is as it was afterwards.
        candidates: `InheritFeatures` passes. The sites of a pass are a group, and get a schedule of their own that
            replaces the schedule of the pass. The errors of groups are added up, so no group should feed another.
        prompts: the prompts to calibrate on, in one batch; pass 16 or more, for a schedule from few suits only these.
        budget: multiply-accumulates of a generation, as a share of those without inheritance.
        seed: the seed of the first prompt's latents; the others count up from it.
        reach: the largest number of calls from a refresh to the next. For n calls and a group, n·reach stretches are
            measured, and reach times as many for every order of the forecast.
        probes: the number of calls at which the growth of an error until the final latents is measured.
        folder: the folder of measurements. With it, a stopped search continues, and another budget costs little.
        progress: whether to show a bar.
        call: further arguments of the pipeline, such as `num_inference_steps=50`.
    Returns:
        The passes with their schedules, and the predicted and the measured error.
    Raises:
        SourceError: the pipeline has no UNet.
        SpecError: no candidates or prompts, a candidate without sites, or a budget that is no share.
        ScheduleError: no schedule meets the budget; the error names the smallest budget that is met.
    """
    check_request("search", pipe, prompts, call)
    if not candidates:
        raise SpecError("there are no candidates to search", where="search", hint="pass InheritFeatures passes")
    if not 0 < budget <= 1:
        raise SpecError(f"the budget is {budget}", where="search", hint="a share of all, above 0 and at most 1")
    source = apply(pipe.unet, ())
    inheriting, groups = source, []
    for one in candidates:
        before = set(inheriting.graph.sites)
        inheriting = apply(inheriting, one, verify=False)
        groups.append(frozenset(inheriting.graph.sites) - before)
        if not groups[-1] or not {"schedule", "forecast"} <= {field.name for field in fields(one)}:
            raise SpecError(f"{one} has no sites to give a schedule", where="candidates", hint="InheritFeatures passes")

    def generate(unet: GraphUNet) -> Tensor:
        return final_latents(pipe, unet, prompts, seed, call)[0]

    replay = ReplayUNet(inheriting.graph.copy(), generate, pipe.scheduler)
    T = len(replay.recorded)
    ways = [_stretches(T, reach, as_forecast(one.forecast).memory) for one in candidates]  # type: ignore[attr-defined]
    kept = MeasurementCache(Path(folder) if folder else None, replay.final)
    with tqdm(total=probes + sum(map(len, ways)), desc="search", unit="run", disable=not progress) as bar:
        names = [str(replace(one, schedule=Uniform(1))) for one in candidates]  # type: ignore[call-arg]
        all_sites: frozenset[str] = frozenset().union(*groups)
        weights = kept(f"{probes} probes: {', '.join(names)}", partial(replay.weights, all_sites, probes))
        bar.update(probes)
        weighted: list[dict[State, Array]] = []
        for name, group, stretches in zip(names, groups, ways, strict=True):
            weighted.append({})
            for state, ends in stretches.items():
                measure = partial(replay.errors, state, group, ends[-1], ends[-1])
                errors = kept(f"{name}: {state} to {ends[-1]}", measure)
                weighted[-1][state] = errors * weights[ends[0] : ends[-1] + 1]
                bar.update()
    scale = sum(error.sum(0) for errors in weighted for error in errors.values())  # of each prompt
    choices = [
        _best(stretches, {state: (error / (scale + 1e-300)).mean(1) for state, error in errors.items()}, T)
        for stretches, errors in zip(ways, weighted, strict=True)
    ]
    inherited = cache(inheriting.graph.step_macs)

    def macs(counts: Sequence[int]) -> int:
        plan = [choice[count][1] for choice, count in zip(choices, counts, strict=True)]
        stale = (frozenset(g for g, refreshes in enumerate(plan) if call not in refreshes) for call in range(T))
        return sum(inherited(frozenset().union(*(groups[g] for g in inheriting_groups))) for inheriting_groups in stale)

    everything = source.graph.macs * T
    most = budget * everything * (1 + 1e-9)  # a budget that was computed as such a share is met by it
    if (least := macs([min(choice) for choice in choices])) > most:
        raise ScheduleError(
            f"no schedule meets a budget of {budget:.3g}: these candidates need at least {least / everything:.3g}",
            where="search", hint="a larger budget or reach, or other candidates",
        )  # fmt: skip
    counts = _share(choices, macs, most)
    chosen = [choice[count][1] for choice, count in zip(choices, counts, strict=True)]
    passes = Chain(
        tuple(
            replace(one, schedule=Explicit(refreshes, T))  # type: ignore[call-arg]
            for one, refreshes in zip(candidates, chosen, strict=True)
            if len(refreshes) < T
        )
    )
    result = apply(source, passes, verify=False)
    measured = distances(generate(result), replay.final, len(prompts))
    terms = [term for errors, plan in zip(weighted, chosen, strict=True) for term in _errors(errors, plan, T)]
    predicted = _joint(np.array(terms))
    timetable = result.graph.timetable(replay.timesteps)
    return SearchResult(passes, timetable, typical(predicted), typical(measured), len(prompts))


def _stretches(T: int, reach: int, memory: int) -> dict[State, range]:
    """All the states that refreshes may come to, each with the calls at which the next refresh, or the end, may be."""
    stretches: dict[State, range] = {}
    todo: list[State] = [(0,)]
    while todo:
        state = todo.pop()
        if state not in stretches:
            stretches[state] = range(state[-1] + 1, min(state[-1] + reach, T) + 1)
            todo += [(*state, k)[-memory:] for k in stretches[state] if k < T]
    return dict(sorted(stretches.items(), key=lambda stretch: (stretch[0][-1], stretch[0])))


def _best(stretches: Mapping[State, range], errors: Mapping[State, Array], T: int) -> Choice:
    """Shortest paths from the first call to the end: of states and the number of refreshes so far.

    Args:
        errors: of the stretches from each state, by their ends.
    """
    memory = max(map(len, stretches))
    net: nx.DiGraph[tuple[State, int]] = nx.DiGraph()
    for state, ends in stretches.items():
        for end, error in zip(ends, errors[state], strict=True):
            for count in range(len(state), state[-1] + 2):
                then = ((T,), count) if end == T else ((*state, end)[-memory:], count + 1)
                net.add_edge((state, count), then, weight=error)
    shortest: Any = nx.single_source_dijkstra(net, ((0,), 1))
    length, path = shortest
    return {
        count: (length[(T,), count], tuple(state[-1] for state, _ in path[(T,), count][:-1]))
        for count in range(1, T + 1)
        if ((T,), count) in length
    }


def _errors(errors: Mapping[State, Array], refreshes: Sequence[int], T: int) -> list[Array]:
    """The errors of the stretches between refreshes, for each prompt."""
    memory = max(map(len, errors))
    states = [tuple(refreshes[max(n - memory, 0) : n]) for n in range(1, len(refreshes) + 1)]
    return [errors[state][end - state[-1] - 1] for state, end in zip(states, (*refreshes[1:], T), strict=True)]


def _joint(errors: Array) -> Array:
    """The error of a generation, of the errors of its stretches, (stretches, samples).

    Were they unrelated, their squares would add up; were they alike, they themselves would. They are somewhat alike,
    for what is inherited always lags behind what would be computed. So it is the mean of both, in logarithms.
    """
    unrelated, alike = errors.sum(0), np.sqrt(errors).sum(0) ** 2
    joint: Array = np.sqrt(unrelated * alike)
    return joint


def _share(choices: Sequence[Choice], macs: Callable[[Sequence[int]], int], most: float) -> list[int]:
    """How many refreshes each group gets: always those next that lower the error the most per multiply-accumulate."""
    counts = [min(choice) for choice in choices]
    while True:
        spent, steps = macs(counts), []
        for g, choice in enumerate(choices):
            for count in choice:
                more = [*counts[:g], count, *counts[g + 1 :]]
                if count > counts[g] and macs(more) <= most:
                    gain = choice[counts[g]][0] - choice[count][0]
                    steps.append((gain / max(macs(more) - spent, 1), more))
        gain, more = max(steps, default=(0.0, counts))
        if gain <= 0:
            return counts
        counts = more
