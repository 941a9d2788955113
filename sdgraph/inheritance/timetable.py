"""A timetable: what each call of a generation refreshes, inherits and costs, before anything is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from math import inf
from typing import Any

import torch

from ..errors import PathError, ScheduleError, SpecError, did_you_mean
from ..ir.sites import Site, live_nodes
from ..ir.sites import sites as nodes_of_sites
from ..ir.state import GraphState
from ..schedules import Drift, SamplingRun
from ..views.figure import save_figure
from ..views.format import format_count, format_macs, format_names
from .generation import Generation

NAMED = ("B", "H", "W", "L")  # sizes that a table names
COMPUTED, REUSED, FORECAST, BYPASSED, UNNEEDED, DRIFTING = "■", "□", "◪", "○", "·", "◇"
WORDS = {COMPUTED: "computed", REUSED: "reused", FORECAST: "forecast", BYPASSED: "bypassed",
         UNNEEDED: "not needed", DRIFTING: "as features drift"}  # fmt: skip


@dataclass(frozen=True)
class PlannedVariant:
    """The calls that run one variant.

    Args:
        calls: the calls; where the drift of features decides, those that may be.
        macs: the multiply-accumulates of one of them.
        computed: the sites it computes, in graph order.
        reads: the sites whose values it reads from the cache.
        bypassed: the sites whose place another value takes.
        reused: the sets of sites that such calls do not compute. They differ in sites that none of these calls needs.
    """

    calls: tuple[int, ...]
    macs: int
    computed: tuple[str, ...]
    reads: tuple[str, ...]
    bypassed: tuple[str, ...] = ()
    reused: frozenset[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class Timetable:
    """What the calls of a generation do. Prints as a table; `picture(path)` draws it.

    Args:
        run: the calls, with their timesteps.
        sites: by name, in graph order.
        variants: the variants of the graph that the calls run, in the order they come.
        signs: what the calls do with each site: a sign for every call, see `row`.
        full_macs: multiply-accumulates of a call that computes everything.
        macs: multiply-accumulates of all calls; the most that they may be, where the drift of features decides.
        least_macs: the least that they may be.
        cache_bytes: bytes kept between calls, at most.
        at: the sizes of a call for which costs are quoted, by symbol.
        supposed: nobody gave the timesteps, see `SamplingRun.supposed`.
    """

    run: SamplingRun
    sites: Mapping[str, Site]
    variants: tuple[PlannedVariant, ...]
    signs: Mapping[str, str]
    full_macs: int
    macs: int
    least_macs: int
    cache_bytes: int
    at: Mapping[str, int] = field(default_factory=dict)
    supposed: bool = False

    @property
    def bound(self) -> float:
        """How much faster the generation can be at most, if time goes by multiply-accumulates."""
        return (self.run.calls or 0) * self.full_macs / self.least_macs

    def row(self, site: str) -> str:
        """One sign for each call: ■ computed, □ reused, ◪ forecast, ○ bypassed, · not needed, ◇ as features drift.

        Raises:
            PathError: there is no such site.
        """
        if site not in self.signs:
            hint = did_you_mean(site, self.signs) or f"sites: {', '.join(self.signs) or 'none'}"
            raise PathError(f"no site {site!r}", hint=hint)
        return self.signs[site]

    def refreshes(self, site: str) -> tuple[int, ...]:
        """The calls that compute a site, whatever drifts."""
        return tuple(i for i, sign in enumerate(self.row(site)) if sign == COMPUTED)

    def __str__(self) -> str:
        rows: dict[str, list[str]] = {}
        for site, row in self.signs.items():
            rows.setdefault(row, []).append(site)
        seen = set("".join(rows))
        legend = " ".join(f"{sign} {word}" for sign, word in WORDS.items() if sign in seen)
        lines = [f"{self.run.calls} calls: {legend}" if rows else f"{self.run.calls} calls: nothing is inherited"]
        lines += [f"  {row}  {format_names(names)}" for row, names in rows.items()]
        drifting = DRIFTING in seen
        lines += [
            f"  {'up to ' * drifting}{len(v.calls)} × {format_macs(v.macs)} ({v.macs / self.full_macs:.1%}): "
            f"calls {ranges(v.calls)}; {len(v.computed)} computed, {len(v.reads)} reused"
            f"{f', {len(v.bypassed)} bypassed' * bool(v.bypassed)}"
            for v in self.variants
        ]
        slowest = (self.run.calls or 0) * self.full_macs / self.macs
        times = f"{slowest:.2f} to {self.bound:.2f} times as fast, as features drift" if drifting else ""
        times = times or f"at most {self.bound:.2f} times as fast"
        lines.append(f"  {times}; {format_count(self.cache_bytes)}B kept between calls")
        lines.append(f"  supposed: {supposition(self.run, self.supposed)}")
        if self.at:
            lines[-1] += "; costs at " + ", ".join(f"{name}={size}" for name, size in self.at.items())
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "calls": self.run.calls,
            "timesteps": list(self.run.timesteps or ()),
            "supposed": self.supposed,
            "at": dict(self.at),
            "sites": {
                name: {"schedule": str(s.schedule), "forecast": str(s.forecast), "bypassed": s.bypassed}
                for name, s in self.sites.items()
            },
            "refreshes": {name: list(self.refreshes(name)) for name in self.sites},
            "rows": dict(self.signs),
            "variants": [
                {
                    "calls": list(v.calls),
                    "macs": v.macs,
                    "computed": len(v.computed),
                    "reused": len(v.reads),
                    "bypassed": len(v.bypassed),
                }
                for v in self.variants
            ],
            "macs": self.macs,
            "least_macs": self.least_macs,
            "bound": self.bound,
            "cache_bytes": self.cache_bytes,
        }

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw calls against sites to an `.svg` or `.png` file.

        Raises:
            ExtraError, SpecError: see `Graph.picture`.
        """
        shades = {
            COMPUTED: (0.20, 0.36, 0.58),
            REUSED: (0.80, 0.87, 0.95),
            FORECAST: (0.62, 0.84, 0.72),
            BYPASSED: (0.96, 0.85, 0.70),
            UNNEEDED: (1.0, 1.0, 1.0),
            DRIFTING: (0.80, 0.70, 0.90),
        }
        rows = [[shades[sign] for sign in self.row(site)] for site in self.sites]
        if not rows:
            raise SpecError("nothing is inherited or bypassed", where="picture", hint="apply a pass with a schedule")
        with save_figure(path) as figure:
            figure.set_size_inches(4.5 + 0.11 * len(rows[0]), 1.0 + 0.16 * len(rows))
            axes = figure.add_subplot()
            axes.imshow(rows, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(len(rows)), list(self.sites), fontsize=7)
            axes.set_xlabel("call")
            legend = "dark: computed, light: reused, green: forecast, orange: bypassed, white: not needed"
            legend += ", violet: as features drift" * any(DRIFTING in row for row in self.signs.values())
            axes.set_title(f"{legend}; at most {self.bound:.2f} times as fast", fontsize=8)
            figure.tight_layout()


def timetable(graph: GraphState, run: SamplingRun) -> Timetable:
    """What the calls of `run` do; the driver's own rules, on the sizes of values instead of values.

    Raises:
        ScheduleError: a schedule does not fit the run, or the run has no calls.
    """
    sites, nodes = graph.sites, nodes_of_sites(graph.fx)
    variants: dict[tuple[tuple[str, ...], ...], PlannedVariant] = {}
    of: dict[frozenset[str], tuple[tuple[str, ...], ...]] = {}

    def computed(reused: frozenset[str]) -> dict[str, torch.Tensor]:
        if reused not in of:
            seen = live_nodes(graph.fx, reused)
            live = [name for name, node in nodes.items() if node in seen]
            of[reused] = kind = (
                tuple(name for name in live if name not in reused),
                tuple(name for name in live if name in reused and not sites[name].bypassed),
                tuple(name for name in live if name in reused and sites[name].bypassed),
            )
            if kind not in variants:  # two may differ only in sites that neither needs
                variants[kind] = PlannedVariant((), graph.call_macs(reused), *kind)
        return {name: nodes[name].meta["val"] for name in of[reused][0] if not sites[name].bypassed}

    course = foreseen(run, sites, computed, lambda reused: variants[of[reused]].macs)
    signs = dict.fromkeys(sites, "")
    for number, doings in enumerate(course.calls):
        for reused in doings:
            variant = variants[of[reused]]
            if number not in variant.calls:
                variant = replace(variant, calls=(*variant.calls, number))
            variants[of[reused]] = replace(variant, reused=variant.reused | {reused})
        for name in sites:
            ways = {
                _sign(variants[of[reused]], name, name in forecast) for reused, fs in doings.items() for forecast in fs
            }
            signs[name] += ways.pop() if len(ways) == 1 else DRIFTING
    return Timetable(
        run.supposed(),
        sites,
        tuple(variants.values()),
        signs,
        graph.call_macs(),
        int(course.most),
        int(course.least),
        course.kept,
        {s.name: s.nominal for s in graph.dims.symbols if s.name in NAMED},
        run.timesteps is None,
    )


def _sign(variant: PlannedVariant, site: str, forecast: bool) -> str:
    """Return the sign of a site at the calls of a variant."""
    if site in variant.reads:
        return FORECAST if forecast else REUSED
    return COMPUTED if site in variant.computed else BYPASSED if site in variant.bypassed else UNNEEDED


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


def supposition(run: SamplingRun, supposed: bool) -> str:
    """A phrase about the timesteps of a run.

    Args:
        supposed: nobody gave them.
    """
    first, *_, last = (*(run.timesteps or ()), *(run.timesteps or (0.0,))[-1:])
    who = "evenly spaced, for nobody gave a scheduler" if supposed else run.solver.partition("(")[0] or "as given"
    return f"timesteps {first:g} to {last:g}, {who}"


def ranges(calls: Sequence[int]) -> str:
    """`0, 3-5, 9`."""
    runs: list[list[int]] = []
    for call in calls:
        if runs and runs[-1][-1] == call - 1:
            runs[-1].append(call)
        else:
            runs.append([call])
    return ", ".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in runs)
