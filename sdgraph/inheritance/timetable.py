"""The calls of a generation before anything is run: what each may compute and reuse, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import inf

import torch

from ..errors import ScheduleError
from ..ir.sites import Site
from ..schedules import Drift, SamplingRun
from .generation import Generation


@dataclass(frozen=True)
class Course:
    """Possible courses of the calls of a run.

    Args:
        calls: for each call the sets of sites that it may not compute, each with the sets of sites among them that are
            forecast from several refreshes. There is one of each, unless a schedule follows the drift of features.
        least: what all calls cost together, at least.
        most: the same, at most.
        kept: bytes kept between calls, at most.
    """

    calls: tuple[Mapping[frozenset[str], frozenset[frozenset[str]]], ...]
    least: float
    most: float
    kept: int


Gaps = dict[Drift, tuple[int, int]]
WAYS = 500  # that are told apart by their gaps


@dataclass
class _Way:
    """A generation under way.

    Args:
        generation: its values, without numbers.
        gaps: the least and the largest gap that each drift schedule may have now.
        least: what its calls so far cost, at least.
        most: the same, at most.
    """

    generation: Generation
    gaps: Gaps
    least: float = 0.0
    most: float = 0.0

    def __or__(self, other: _Way) -> _Way:
        """Return what covers both of two ways whose generations have the same values."""
        pairs = zip(self.gaps.values(), other.gaps.values(), strict=True)
        spans = [(min(mine[0], its[0]), max(mine[1], its[1])) for mine, its in pairs]
        gaps = dict(zip(self.gaps, spans, strict=True))
        return _Way(self.generation, gaps, min(self.least, other.least), max(self.most, other.most))


def foreseen(
    run: SamplingRun,
    sites: Mapping[str, Site],
    computed: Callable[[frozenset[str]], Mapping[str, torch.Tensor]],
    cost: Callable[[frozenset[str]], float],
) -> Course:
    """Return what the calls of a run may do, by the rules of the driver.

    It is the one place that foretells calls: timetables, exports, descriptions of bundles and searches ask it. Where a
    schedule follows the drift of features, every gap that the drift may lead to is followed up.

    Args:
        run: the calls, see `SamplingRun.supposed`.
        sites: the sites of the graph.
        computed: what a call computes that does not compute these sites; tensors on the meta device.
        cost: what such a call costs.
    Raises:
        ScheduleError: there are no calls, or a schedule does not fit them.
    """
    run = run.supposed()
    if not run.timesteps:
        raise ScheduleError("a generation without calls", where="timetable", hint="a number of calls, or timesteps")
    calls: list[Mapping[frozenset[str], frozenset[frozenset[str]]]] = []
    drifts = dict.fromkeys(site.schedule for site in sites.values() if isinstance(site.schedule, Drift))
    begun = Generation((), (), None, run, 0, run.timesteps[0])
    ways, kept = [_Way(begun, {drift: (drift.least, drift.least) for drift in drifts})], 0
    for timestep in run.timesteps:
        after: dict[object, _Way] = {}
        doings: dict[frozenset[str], frozenset[frozenset[str]]] = {}
        for way in ways:
            for gaps in _decided(way, sites):
                generation = replace(way.generation, timestep=timestep, values=dict(way.generation.values))
                generation.gaps = {drift: least for drift, (least, _) in gaps.items()}
                reused = generation.reused(sites)
                values, price = computed(reused), cost(reused)
                forecast = frozenset(n for n in reused & generation.values.keys() if _combines(generation, sites[n], n))
                doings[reused] = doings.get(reused, frozenset()) | {forecast}
                for drift in {sites[name].schedule for name in values.keys() & generation.values.keys()}:
                    if isinstance(drift, Drift):  # a refresh measures it
                        gaps[drift] = drift.next_gap(gaps[drift][0], inf), drift.next_gap(gaps[drift][1], 0.0)
                generation.keep(values, sites, reused)
                kept = max(kept, sum(v.nbytes for each in generation.values.values() for _, v in each))
                generation.advance()
                later = _Way(generation, gaps, way.least + price, way.most + price)
                key = _state(generation, sites), tuple(gaps.values())
                after[key] = after[key] | later if key in after else later
        calls.append(doings)
        ways = list(after.values())
        if len(ways) > WAYS:
            merged: dict[object, _Way] = {}
            for way in ways:
                state = _state(way.generation, sites)
                merged[state] = merged[state] | way if state in merged else way
            ways = list(merged.values())
    return Course(tuple(calls), min(way.least for way in ways), max(way.most for way in ways), kept)


def _decided(way: _Way, sites: Mapping[str, Site]) -> Iterator[Gaps]:
    """Yield gaps that decide which sites the next call refreshes, of those that a way may have."""
    generation, parts = way.generation, []
    for drift, (least, most) in way.gaps.items():
        since = {
            generation.number - generation.values[name][-1][0]
            for name, site in sites.items()
            if site.schedule == drift and name in generation.values
        }
        cuts = [least, *sorted(calls + 1 for calls in since if least <= calls < most), most + 1]
        parts.append([(first, end - 1) for first, end in pairwise(cuts)])
    for chosen in product(*parts):
        yield dict(zip(way.gaps, chosen, strict=True))


def _combines(generation: Generation, site: Site, name: str) -> bool:
    """Whether the value of a site at the call under way is a forecast from several refreshes."""
    known = [number for number, _ in generation.values[name]]
    weights = site.forecast.weights(known, generation.number, generation.run)
    return sum(weight != 0 for weight in weights) > 1


def _state(generation: Generation, sites: Mapping[str, Site]) -> object:
    """Return the part of a generation that decides about its later calls."""
    refreshed = frozenset(
        (name, len(values), values[-1][0] if isinstance(sites[name].schedule, Drift) else None)
        for name, values in generation.values.items()
    )
    return refreshed, frozenset(generation.missed)
