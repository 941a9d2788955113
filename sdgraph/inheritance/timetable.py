"""A timetable: what each call of a generation refreshes, inherits and costs, before anything is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from ..errors import ScheduleError
from ..ir.sites import Site, live_nodes
from ..ir.sites import sites as nodes_of_sites
from ..ir.state import GraphState
from ..schedules import Drift, Run
from ..views.figure import paper
from ..views.format import cost, count, several
from .generation import Generation

REFRESHED, INHERITED, FORECAST, BYPASSED, UNNEEDED = "■", "□", "◪", "○", "·"


@dataclass(frozen=True)
class Variant:
    """One kind of call.

    Args:
        calls: which calls are of it; none where only a drift of features leads to it.
        macs: multiply-accumulates of one of them, at the nominal sizes.
        refreshed: the sites it computes, in graph order.
        inherited: the sites it takes over.
        bypassed: the sites whose place another value takes.
    """

    calls: tuple[int, ...]
    macs: int
    refreshed: tuple[str, ...]
    inherited: tuple[str, ...]
    bypassed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timetable:
    """What the calls of a generation do. Prints as a table; `picture(path)` draws it.

    Args:
        run: the calls.
        sites: by name, in graph order.
        variants: the kinds of calls, in the order they come.
        full_macs: of a call that computes everything.
        cache_bytes: kept between calls, at most, at the nominal sizes (batch 1).
        forecasts: the calls at which the value of a site is a forecast from several refreshes, by site.
    """

    run: Run
    sites: Mapping[str, Site]
    variants: tuple[Variant, ...]
    full_macs: int
    cache_bytes: int
    forecasts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls."""
        return sum(len(v.calls) * v.macs for v in self.variants)

    @property
    def bound(self) -> float:
        """How much faster the generation can be at most, if time goes by multiply-accumulates."""
        return sum(len(v.calls) for v in self.variants) * self.full_macs / self.macs

    def row(self, site: str) -> str:
        """One sign for each call: ■ computed, □ inherited, ◪ forecast, ○ bypassed, · not needed."""
        signs: dict[int, str] = {}
        for v in self.variants:
            kinds = ((REFRESHED, v.refreshed), (INHERITED, v.inherited), (BYPASSED, v.bypassed))
            sign = next((sign for sign, names in kinds if site in names), UNNEEDED)
            signs |= dict.fromkeys(v.calls, sign)
        signs |= {call: FORECAST for call in self.forecasts.get(site, ()) if signs[call] == INHERITED}
        return "".join(signs[call] for call in sorted(signs))

    def refreshes(self, site: str) -> tuple[int, ...]:
        """The calls that compute a site."""
        return tuple(i for i, sign in enumerate(self.row(site)) if sign == REFRESHED)

    def __str__(self) -> str:
        rows: dict[str, list[str]] = {}
        for site in self.sites:
            rows.setdefault(self.row(site), []).append(site)
        words = {REFRESHED: "computed", INHERITED: "inherited", FORECAST: "forecast", BYPASSED: "bypassed",
                 UNNEEDED: "not needed"}  # fmt: skip
        seen = set("".join(rows))
        legend = " ".join(f"{sign} {word}" for sign, word in words.items() if sign in seen)
        lines = [f"{len(next(iter(rows)))} calls: {legend}"] if rows else ["nothing is inherited"]
        lines += [f"  {row}  {several(names)}" for row, names in rows.items()]
        lines += [
            f"  {len(v.calls)} × {cost(v.macs)} ({v.macs / self.full_macs:.1%}): "
            f"{f'calls {ranges(v.calls)}' if v.calls else 'if features drift'}; {len(v.refreshed)} computed, "
            f"{len(v.inherited)} inherited{f', {len(v.bypassed)} bypassed' * bool(v.bypassed)}"
            for v in self.variants
        ]
        lines.append(f"  at most {self.bound:.2f} times as fast; {count(self.cache_bytes)}B kept between calls")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "calls": self.run.calls,
            "sites": {
                name: {"schedule": str(s.schedule), "forecast": str(s.forecast), "bypassed": s.bypassed}
                for name, s in self.sites.items()
            },
            "refreshes": {name: list(self.refreshes(name)) for name in self.sites},
            "variants": [
                {
                    "calls": list(v.calls),
                    "macs": v.macs,
                    "refreshed": len(v.refreshed),
                    "inherited": len(v.inherited),
                    "bypassed": len(v.bypassed),
                }
                for v in self.variants
            ],
            "macs": self.macs,
            "bound": self.bound,
            "cache_bytes": self.cache_bytes,
        }

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw calls against sites to an `.svg` or `.png` file.

        Raises:
            ExtraError, SpecError: see `Graph.picture`.
        """
        shades = {
            REFRESHED: (0.20, 0.36, 0.58),
            INHERITED: (0.80, 0.87, 0.95),
            FORECAST: (0.62, 0.84, 0.72),
            BYPASSED: (0.96, 0.85, 0.70),
            UNNEEDED: (1.0, 1.0, 1.0),
        }
        rows = [[shades[sign] for sign in self.row(site)] for site in self.sites]
        with paper(path) as figure:
            figure.set_size_inches(4.5 + 0.11 * len(rows[0]), 1.0 + 0.16 * len(rows))
            axes = figure.add_subplot()
            axes.imshow(rows, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(len(rows)), list(self.sites), fontsize=7)
            axes.set_xlabel("call")
            legend = "dark: computed, light: inherited, green: forecast, orange: bypassed, white: not needed"
            axes.set_title(f"{legend}; at most {self.bound:.2f} times as fast", fontsize=8)
            figure.tight_layout()


def timetable(graph: GraphState, run: Run) -> Timetable:
    """What the calls of `run` do; the driver's own rules, on the sizes of values instead of values.

    Raises:
        ScheduleError: a schedule does not fit the run, or the run has no calls.
    """
    sites, nodes = graph.sites, nodes_of_sites(graph.fx)
    kinds: dict[frozenset[str], Variant] = {}

    def refreshed(stale: frozenset[str]) -> dict[str, torch.Tensor]:
        if stale not in kinds:
            seen = live_nodes(graph.fx, stale)
            live = [name for name, node in nodes.items() if node in seen]
            kinds[stale] = Variant(
                (),
                graph.step_macs(stale),
                tuple(name for name in live if name not in stale),
                tuple(name for name in live if name in stale and not sites[name].bypassed),
                tuple(name for name in live if name in stale and sites[name].bypassed),
            )
        return {name: nodes[name].meta["val"] for name in kinds[stale].refreshed if not sites[name].bypassed}

    kept = 0
    forecasts: dict[str, list[int]] = {}
    known: Mapping[str, Sequence[tuple[int, torch.Tensor]]] = {}
    for number, (stale, values) in enumerate(played(run, sites, refreshed)):
        kinds[stale] = replace(kinds[stale], calls=(*kinds[stale].calls, number))
        for name in stale & known.keys():
            weights = sites[name].forecast.weights([call for call, _ in known[name]], number, run)
            if sum(weight != 0 for weight in weights) > 1:
                forecasts.setdefault(name, []).append(number)
        kept = max(kept, sum(v.nbytes for each in values.values() for _, v in each))
        known = dict(values)
    for stale in _after_drift(sites, tuple(kinds)):
        refreshed(stale)
    calls_of_forecasts = {name: tuple(calls) for name, calls in forecasts.items()}
    return Timetable(run, sites, tuple(kinds.values()), graph.step_macs(), kept, calls_of_forecasts)


def _after_drift(sites: Mapping[str, Site], foreseen: Sequence[frozenset[str]]) -> Iterator[frozenset[str]]:
    """The sets of stale sites that calls may have besides those foreseen, where schedules follow the drift of features:
    sites with the same such schedule are refreshed together, at any call or not."""
    groups: dict[Drift, frozenset[str]] = {}
    for name, site in sites.items():
        if isinstance(site.schedule, Drift):
            groups[site.schedule] = groups.get(site.schedule, frozenset()) | {name}
    for stale in foreseen:
        others = stale - frozenset().union(*groups.values())
        for chosen in product((False, True), repeat=len(groups)):
            yield others.union(*(names for names, at_once in zip(groups.values(), chosen, strict=True) if at_once))


def played(
    run: Run, sites: Mapping[str, Site], refreshed: Callable[[frozenset[str]], Mapping[str, torch.Tensor]]
) -> Iterator[tuple[frozenset[str], Mapping[str, Sequence[tuple[int, torch.Tensor]]]]]:
    """For each call of a run the sites that it inherits, and what is kept after it.

    Args:
        refreshed: what a call computes that inherits these sites; tensors that stand for the real ones.
    Raises:
        ScheduleError: there are no calls, or a schedule does not fit them.
    """
    timesteps = run.timesteps or tuple(float(left) for left in range(run.calls or 0, 0, -1))
    if not timesteps:
        raise ScheduleError("a generation without calls", where="timetable", hint="a number of calls, or timesteps")
    generation = Generation((), (), None, run, 0, timesteps[0])
    for timestep in timesteps:
        generation.timestep = timestep
        stale = generation.stale(sites)
        generation.keep(refreshed(stale), sites, stale)
        yield stale, generation.values
        generation.advance()


def ranges(calls: Sequence[int]) -> str:
    """`0, 3-5, 9`."""
    runs: list[list[int]] = []
    for call in calls:
        if runs and runs[-1][-1] == call - 1:
            runs[-1].append(call)
        else:
            runs.append([call])
    return ", ".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in runs)
