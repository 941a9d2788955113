"""The plan of a sampling run: what its calls compute, reuse and cost, before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf

from ..errors import ScheduleError
from ..schedules import Drift, SamplingRun
from .cache import FeatureCache, Turns

Gaps = dict[Drift, tuple[int, int]]
WAYS = 500  # with separate gaps, before those with equal caches are merged


@dataclass(frozen=True)
class Plan:
    """The sites that each call of a run reuses, and the cost of all calls.

    Where a schedule follows the drift of features, a call has several possibilities, and costs have bounds.

    Args:
        calls: the possible sets of reused sites of each call, each with the possible sets of sites among them that are
            forecast from several earlier values.
        least: the least that all calls cost together.
        most: the most that all calls cost together.
        kept: the most bytes that are kept between calls.
    """

    calls: tuple[Mapping[frozenset[str], frozenset[frozenset[str]]], ...]
    least: float
    most: float
    kept: int

    @classmethod
    def of(cls, run: SamplingRun, turns: Turns) -> Plan:
        """Return the plan of a run: a loop over the feature cache, on sizes in the place of values.

        Where a schedule follows the drift of features, every gap that the drift may lead to is followed up.

        Args:
            run: the sampling run; unknown timesteps are supposed, see `SamplingRun.supposed`.
            turns: the turns of the calls, each with a model of costs as its backend.
        Raises:
            ScheduleError: there are no calls, or a schedule does not fit them.
        """
        run = run.supposed()
        if not run.timesteps:
            raise ScheduleError("a generation without calls", where="timetable", hint="a number of calls, or timesteps")
        turn = turns(0, run.timesteps[0], run)
        ways = [_Way.of(FeatureCache(turn.backend.sites, run, 0, turn.member))]
        calls: list[Mapping[frozenset[str], frozenset[frozenset[str]]]] = []
        kept = 0
        for number, timestep in enumerate(run.timesteps):
            turn = turns(number, timestep, run)
            sites = turn.backend.sites
            after: dict[object, _Way] = {}
            possible: dict[frozenset[str], frozenset[frozenset[str]]] = {}
            for way in ways:
                if way.cache.member != turn.member:
                    way = _Way.of(way.cache.turned(turn), way.least, way.most)
                for gaps in way.decided_gaps():
                    cache = way.cache.copy({drift: least for drift, (least, _) in gaps.items()})
                    reused = cache.reused(timestep)
                    cost, sizes = turn.backend.compute(None, reused, cache.read)
                    known = [name for name in reused if cache.age(name) is not None]
                    forecast = frozenset(n for n in known if sum(weight != 0 for weight in cache.weights(n)) > 1)
                    possible[reused] = possible.get(reused, frozenset()) | {forecast}
                    for drift in {sites[name].schedule for name in sizes if cache.age(name) is not None}:
                        if isinstance(drift, Drift):  # a refresh measures it
                            gaps[drift] = drift.next_gap(gaps[drift][0], inf), drift.next_gap(gaps[drift][1], 0.0)
                    cache.write(sizes)
                    kept = max(kept, sum(cache.kept()))
                    cache.advance()
                    later = _Way(cache, gaps, way.least + cost, way.most + cost)
                    key = cache.state(), tuple(gaps.values())
                    after[key] = after[key] | later if key in after else later
            calls.append(possible)
            ways = list(after.values())
            if len(ways) > WAYS:
                merged: dict[object, _Way] = {}
                for way in ways:
                    state = way.cache.state()
                    merged[state] = merged[state] | way if state in merged else way
                ways = list(merged.values())
        return cls(tuple(calls), min(way.least for way in ways), max(way.most for way in ways), kept)


@dataclass
class _Way:
    """One possible course of a generation so far.

    Args:
        cache: the cache after the last call.
        gaps: the least and the largest gap that each drift schedule may have now.
        least: the least that its calls so far cost.
        most: the most that its calls so far cost.
    """

    cache: FeatureCache
    gaps: Gaps
    least: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, cache: FeatureCache, least: float = 0.0, most: float = 0.0) -> _Way:
        """Return a way whose drift schedules begin with their least gaps."""
        drifts = [site.schedule for site in cache.sites.values() if isinstance(site.schedule, Drift)]
        return cls(cache, {drift: (drift.least, drift.least) for drift in drifts}, least, most)

    def __or__(self, other: _Way) -> _Way:
        """Return what covers both of two ways whose caches have the same state."""
        pairs = zip(self.gaps.values(), other.gaps.values(), strict=True)
        spans = [(min(mine[0], its[0]), max(mine[1], its[1])) for mine, its in pairs]
        gaps = dict(zip(self.gaps, spans, strict=True))
        return _Way(self.cache, gaps, min(self.least, other.least), max(self.most, other.most))

    def decided_gaps(self) -> Iterator[Gaps]:
        """Yield parts of the gaps of this way, in each of which the next call computes the same sites."""
        parts = []
        for drift, (least, most) in self.gaps.items():
            ages = {self.cache.age(name) for name, site in self.cache.sites.items() if site.schedule == drift}
            cuts = [least, *sorted(age + 1 for age in ages if age is not None and least <= age < most), most + 1]
            parts.append([(first, end - 1) for first, end in pairwise(cuts)])
        for chosen in product(*parts):
            yield dict(zip(self.gaps, chosen, strict=True))
