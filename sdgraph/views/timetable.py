"""Timetables: what each call of a generation computes, reuses and costs, as a table and as a figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PathError, SpecError, did_you_mean
from ..inheritance.cache import Turn
from ..inheritance.plan import Plan
from ..ir.sites import Site, live_nodes
from ..ir.sites import sites as nodes_of_sites
from ..ir.state import GraphState
from ..schedules import SamplingRun
from .figure import save_figure
from .format import format_count, format_macs, format_names, format_ranges

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
        member: the UNet that runs it, in a switch.
    """

    calls: tuple[int, ...]
    macs: int
    computed: tuple[str, ...]
    reads: tuple[str, ...]
    bypassed: tuple[str, ...] = ()
    reused: frozenset[frozenset[str]] = frozenset()
    member: str = ""


@dataclass(frozen=True)
class Timetable:
    """The calls of a generation, and what each does with the sites. Prints as a table; `draw(path)` makes a figure.

    Args:
        run: the sampling run, with the timesteps of its calls.
        sites: the sites by name, in graph order; in a switch each with its UNet, as in "large: mid_block".
        variants: the variants of the graph that the calls run, in the order of their first calls.
        signs: the row of each site, a sign for every call; see `row`.
        full_macs: the multiply-accumulates of a call that computes everything; in a switch, of its largest UNet.
        macs: the multiply-accumulates of all calls; the largest number, where the drift of features decides.
        least_macs: the smallest number of multiply-accumulates of all calls.
        cache_bytes: the bytes that are kept between calls, at most.
        at: the sizes of a call for which costs are quoted, by symbol.
        supposed: whether the timesteps are assumed to be evenly spaced, because only their number is known.
        turns: the UNet that computes each call, in a switch; empty for one UNet.
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
    turns: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The largest speed-up over a generation that computes everything, if time is proportional to arithmetic."""
        return (self.run.calls or 0) * self.full_macs / self.least_macs

    def row(self, site: str) -> str:
        """Return a sign for each call: ■ computed, □ reused, ◪ forecast, ○ bypassed, · not needed, ◇ as features drift.

        Args:
            site: the name of a site.
        Raises:
            PathError: there is no such site.
        """
        if site not in self.signs:
            hint = did_you_mean(site, self.signs) or f"sites: {', '.join(self.signs) or 'none'}"
            raise PathError(f"no site {site!r}", hint=hint)
        return self.signs[site]

    def refreshes(self, site: str) -> tuple[int, ...]:
        """Return the calls that compute a site, however features drift.

        Args:
            site: the name of a site.
        Raises:
            PathError: there is no such site.
        """
        return tuple(i for i, sign in enumerate(self.row(site)) if sign == COMPUTED)

    def __str__(self) -> str:
        rows: dict[str, list[str]] = {}
        for site, row in self.signs.items():
            rows.setdefault(row, []).append(site)
        members = dict.fromkeys(self.turns)
        turns = {m: "".join(COMPUTED if turn == m else UNNEEDED for turn in self.turns) for m in members}
        seen = set("".join((*rows, *turns.values())))
        legend = " ".join(f"{sign} {word}" for sign, word in WORDS.items() if sign in seen)
        lines = [f"{self.run.calls} calls: {legend}" if seen else f"{self.run.calls} calls: nothing is reused"]
        lines += [f"  {row}  {member} computes" for member, row in turns.items()]
        lines += [f"  {row}  {format_names(names)}" for row, names in rows.items()]
        drifting = DRIFTING in seen
        lines += [
            f"  {'up to ' * drifting}{len(v.calls)} × {format_macs(v.macs)} ({v.macs / self.full_macs:.1%}): "
            f"{v.member}{': ' * bool(v.member)}calls {format_ranges(v.calls)}; "
            f"{len(v.computed)} computed, {len(v.reads)} reused"
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
        """Return the timetable as plain data."""
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
            "turns": list(self.turns),
            "variants": [
                {
                    "member": v.member,
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

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw calls against sites to an `.svg` or `.png` file.

        Args:
            path: the file.
        Raises:
            ExtraError: matplotlib is not installed.
            SpecError: the file has another suffix, or the graph has no sites.
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
            raise SpecError("nothing is reused or bypassed", where="draw", hint="apply a pass with a schedule")
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


class GraphCosts:
    """The backend that plans the calls of a graph: multiply-accumulates are its outputs, sizes in bytes its values.

    Args:
        graph: the graph.
        member: the name of the UNet that it is the graph of, in a switch.
    """

    def __init__(self, graph: GraphState, member: str = "") -> None:
        self._graph, self.sites, self._nodes, self._member = graph, graph.sites, nodes_of_sites(graph.fx), member
        self._variants: dict[frozenset[str], PlannedVariant] = {}

    def compute(self, inputs: None, reused: frozenset[str], read: object) -> tuple[int, dict[str, int]]:
        """Return the multiply-accumulates of a call, and the bytes of the values that it computes."""
        variant = self.variant(reused)
        kept = (name for name in variant.computed if not self.sites[name].bypassed)
        return variant.macs, {name: self._nodes[name].meta["val"].nbytes for name in kept}

    def variant(self, reused: frozenset[str]) -> PlannedVariant:
        """Return the variant for a set of reused sites, without its calls.

        Args:
            reused: the sites that the calls do not compute.
        """
        if reused not in self._variants:
            seen = live_nodes(self._graph.fx, reused)
            live = [name for name, node in self._nodes.items() if node in seen]
            left_out = [name for name in live if name in reused]
            self._variants[reused] = PlannedVariant(
                (),
                self._graph.call_macs(reused),
                tuple(name for name in live if name not in reused),
                tuple(name for name in left_out if not self.sites[name].bypassed),
                tuple(name for name in left_out if self.sites[name].bypassed),
                member=self._member,
            )
        return self._variants[reused]


def timetable(
    graphs: Mapping[str, GraphState], run: SamplingRun, turns: Sequence[str] = (), carried: frozenset[str] = frozenset()
) -> Timetable:
    """Return the timetable of the calls of a run.

    Args:
        graphs: the graph of each UNet by its name in a switch, at whose nominal sizes costs are quoted; the name of the
            only one is "".
        run: the sampling run.
        turns: the UNet that computes each call; empty for one UNet.
        carried: the sites whose values a UNet takes over from the one before it.
    Raises:
        ScheduleError: a schedule does not fit the run, or the run has no calls.
    """
    costs = {member: GraphCosts(graph, member) for member, graph in graphs.items()}
    every = {member: Turn(one, member, carried) for member, one in costs.items()}
    members = tuple(turns) or ("",) * len(run.supposed().timesteps or ())
    plan = Plan.of(run, lambda call, timestep, run: every[members[call or 0]])
    names = {
        (member, site): f"{member}: {site}" if member else site for member, one in costs.items() for site in one.sites
    }
    variants: dict[PlannedVariant, PlannedVariant] = {}  # two sets may differ only in sites that no call needs
    signs = dict.fromkeys(names.values(), "")
    for number, possible in enumerate(plan.calls):
        cost = costs[members[number]]
        for reused in possible:
            plain = cost.variant(reused)
            known = variants.get(plain, plain)
            calls = known.calls if number in known.calls else (*known.calls, number)
            variants[plain] = replace(known, calls=calls, reused=known.reused | {reused})
        for (member, site), name in names.items():
            ways = {
                _sign(cost.variant(reused), site, site in forecast)
                for reused, forecasts in possible.items()
                for forecast in forecasts
            }
            signs[name] += UNNEEDED if member != members[number] else ways.pop() if len(ways) == 1 else DRIFTING
    first = next(iter(graphs.values()))
    return Timetable(
        run.supposed(),
        {name: costs[member].sites[site] for (member, site), name in names.items()},
        tuple(variants.values()),
        signs,
        max(graph.call_macs() for graph in graphs.values()),
        int(plan.most),
        int(plan.least),
        plan.kept,
        {s.name: s.nominal for s in first.dims.symbols if s.name in NAMED},
        run.timesteps is None,
        tuple(turns),
    )


def _sign(variant: PlannedVariant, site: str, forecast: bool) -> str:
    """Return the sign of a site at the calls of a variant."""
    if site in variant.reads:
        return FORECAST if forecast else REUSED
    return COMPUTED if site in variant.computed else BYPASSED if site in variant.bypassed else UNNEEDED


def supposition(run: SamplingRun, supposed: bool) -> str:
    """Return a phrase about the timesteps of a sampling run.

    Args:
        run: the sampling run.
        supposed: whether its timesteps are assumed to be evenly spaced.
    """
    first, *_, last = (*(run.timesteps or ()), *(run.timesteps or (0.0,))[-1:])
    who = "evenly spaced, for want of a scheduler" if supposed else run.solver.partition("(")[0] or "as given"
    return f"timesteps {first:g} to {last:g}, {who}"
