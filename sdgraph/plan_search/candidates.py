"""Plans of a search, and the passes that they choose from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import ceil, pi, sin
from typing import Any

from ..compiler.passes import Chain, Pass
from ..errors import SpecError
from ..forecasts import DAMPING, REPEAT, Fitted, Forecast, Polynomial, as_forecast
from ..inheritance.plan import Plan as PlannedCalls
from ..ir.sites import Site, live_nodes
from ..ir.sites import sites as nodes_of_sites
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from ..schedules import Explicit, SamplingRun, Schedule, Uniform
from .costs import Cost

STEP = 0.25  # by which a damping is moved

# Of a share of the refreshes, the share of the calls that they are among.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "even": lambda share: share,
    "early": lambda share: share**1.4,  # the power of DeepCache's DenseEarly
    "ends": lambda share: share - 0.6 / (2 * pi) * sin(2 * pi * share),
}


@dataclass(frozen=True)
class Call:
    """One call of a plan.

    Args:
        reused: the numbers of the candidates whose sites it reuses or bypasses; without any, everything is computed.
        damping: the damping of the line through the last two refreshes, for reused sites.
    """

    reused: frozenset[int] = frozenset()
    damping: float = 0.0

    def __str__(self) -> str:
        return f"{'+'.join(map(str, sorted(self.reused)))}:{self.damping:g}" if self.reused else "*"


@dataclass(frozen=True)
class Plan:
    """The calls of a generation, the first of which computes everything. Prints as text that `read` reads."""

    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.calls))

    @classmethod
    def read(cls, text: str) -> Plan:
        """Return the plan of a text."""
        calls = []
        for word in text.split():
            reused, _, damping = word.partition(":")
            calls.append(Call() if word == "*" else Call(frozenset(map(int, reused.split("+"))), float(damping)))
        return cls(tuple(calls))

    @classmethod
    def spaced(cls, calls: int, refreshes: int, reused: frozenset[int], damping: float, shape: str = "even") -> Plan:
        """Return a plan with some calls that compute everything, spaced by one of `SHAPES`.

        An even spacing is that of `Uniform(n)` if that has as many.
        """
        at = {ceil(calls * SHAPES[shape](i / refreshes) - 1e-9) for i in range(refreshes)}
        uniform = set(range(0, calls, -(-calls // refreshes)))
        if shape == "even" and len(uniform) == refreshes:
            at = uniform
        return cls(tuple(Call() if n in at else Call(reused, damping) for n in range(calls)))

    def changed(self, number: int, call: Call) -> Plan:
        """Return the plan with another call in the place of one."""
        return Plan((*self.calls[:number], call, *self.calls[number + 1 :]))

    def neighbours(self, kinds: Collection[frozenset[int]]) -> Iterator[Plan]:
        """Yield the plans that differ by one move: two neighbouring calls change places, one call leaves out something
        else, or one damping is moved.

        Args:
            kinds: what a call may leave out.
        """
        dampings = [call.damping for call in self.calls if call.reused]
        usual = sorted(dampings)[len(dampings) // 2] if dampings else 0.0
        for number, call in enumerate(self.calls[1:], 1):
            before = self.calls[number - 1]
            if number > 1 and before.reused != call.reused:
                yield self.changed(number - 1, call).changed(number, before)
            for kind in kinds:
                if kind != call.reused:
                    yield self.changed(number, Call(kind, call.damping if call.reused else usual) if kind else Call())
            if call.reused:
                for damping in (call.damping - STEP, call.damping + STEP):
                    if damping in DAMPING:
                        yield self.changed(number, replace(call, damping=round(damping, 4)))


class Candidates:
    """Passes that plans refer to by number, and one UNet with the sites of all of them.

    Args:
        source: the UNet without them.
        passes: each with a schedule, and with sites to inherit or to bypass.
    Raises:
        SpecError: there are none, or one has no schedule or no sites.
    """

    def __init__(self, source: GraphUNet, passes: Sequence[Pass]) -> None:
        if not passes:
            hint = "pass InheritFeatures or Bypass"
            raise SpecError("there are no candidates to search", where="search", hint=hint)
        self.passes, self.unet = tuple(passes), source
        self._sites: list[frozenset[str]] = []
        for one in self.passes:
            before = self.unet.graph.sites.keys()
            if "schedule" in {field.name for field in fields(one)}:
                self.unet = apply(self.unet, replace(one, schedule=Uniform(1)), verify=False)  # type: ignore[call-arg]
            self._sites.append(frozenset(self.unet.graph.sites.keys() - before))
            if not self._sites[-1]:
                hint = "InheritFeatures and Bypass have"
                raise SpecError(f"{one} has no sites to give a schedule", where="candidates", hint=hint)
        self._nodes = nodes_of_sites(self.unet.graph.fx)
        self._live: dict[frozenset[str], frozenset[str]] = {}

    # -- plans ---------------------------------------------------------------------------------------------------

    def given(self, run: SamplingRun) -> Plan:
        """Return the plan of the candidates' own schedules, with the largest damping of their forecasts."""
        refreshes = [one.schedule.calls(run) for one in self.passes]  # type: ignore[attr-defined]
        forecasts = [as_forecast(getattr(one, "forecast", 0)) for one in self.passes]
        damping = max(float(f.damping) if isinstance(f, Polynomial) and f.order else 0.0 for f in forecasts)
        reused = (frozenset(c for c, at in enumerate(refreshes) if n not in at) for n in range(run.calls or 0))
        return self.plain(Plan(tuple(Call(kind, damping) for kind in reused)))

    def kinds(self) -> list[frozenset[int]]:
        """Return what a call may leave out: nothing, one candidate, two, or all; each once."""
        number = len(self.passes)
        chosen = [frozenset(some) for size in (0, 1, 2, number) for some in combinations(range(number), size)]
        return list(dict.fromkeys(kind & self._reached(kind) for kind in chosen))

    def plain(self, plan: Plan) -> Plan:
        """Return the plan without what makes no difference, so that plans that do the same are equal."""
        reused = [call.reused & self._reached(call.reused) for call in plan.calls]
        plan = Plan(tuple(replace(call, reused=kind) for call, kind in zip(plan.calls, reused, strict=True)))
        free = set(self.free(plan))
        return Plan(tuple(c if n in free else replace(c, damping=0.0) for n, c in enumerate(plan.calls)))

    def free(self, plan: Plan) -> tuple[int, ...]:
        """Return the calls whose damping makes a difference: they inherit from two refreshes."""
        inheriting = (number for number in range(len(self.passes)) if self._forecasts(number))
        return tuple(sorted({n for c in inheriting for n, known in self._known(plan, c).items() if len(known) == 2}))

    def chain(self, plan: Plan, run: SamplingRun) -> Chain:
        """Return the candidates that a plan uses, with their schedules and forecasts."""
        chosen = []
        for number, one in enumerate(self.passes):
            if any(number in call.reused for call in plan.calls):
                options: dict[str, Any] = {"schedule": self._schedule(plan, number)}
                if self._forecasts(number):
                    forecast = self._forecast(plan, number, run)
                    options["forecast"] = 0 if forecast == REPEAT else forecast
                chosen.append(replace(one, **options))
        return Chain(tuple(chosen))

    def sites(self, plan: Plan, run: SamplingRun) -> dict[str, Site]:
        """Return the sites of the UNet, with the schedules and forecasts of a plan.

        Args:
            plan: the plan.
            run: the sampling run.
        """
        sites = dict(self.unet.backend.sites)
        for number, names in enumerate(self._sites):
            schedule, forecast = self._schedule(plan, number), self._forecast(plan, number, run)
            sites |= {name: replace(sites[name], schedule=schedule, forecast=forecast) for name in names}
        return sites

    def play(self, plan: Plan, run: SamplingRun) -> GraphUNet:
        """Return the UNet, whose sites now have the schedules and forecasts of a plan.

        Args:
            plan: the plan.
            run: the sampling run.
        """
        self.unet.reschedule(self.sites(plan, run))
        return self.unet

    def cost(self, plan: Plan, run: SamplingRun, of_call: Cost) -> float:
        """Return the cost of all calls of a plan, the most where the drift of features decides about other sites.

        Args:
            plan: the plan.
            run: the sampling run.
            of_call: the cost of a call, by the live sites that it reuses.
        """
        return PlannedCalls.of(run, _Costs(self, self.sites(plan, run), of_call)).most

    def bytes_of(self, site: str) -> int:
        """Return the bytes of the value of a site.

        Args:
            site: the name of the site.
        """
        return int(self._nodes[site].meta["val"].nbytes)

    # -- one candidate -------------------------------------------------------------------------------------------

    def _forecasts(self, number: int) -> bool:
        return "forecast" in {field.name for field in fields(self.passes[number])}

    def live_sites(self, reused: frozenset[str]) -> frozenset[str]:
        """Return the sites that the output of a call depends on; others only serve to compute reused ones.

        Args:
            reused: the sites that the call does not compute.
        """
        if reused not in self._live:
            live = live_nodes(self.unet.graph.fx, reused)
            self._live[reused] = frozenset(name for name, node in self._nodes.items() if node in live)
        return self._live[reused]

    def _reached(self, reused: frozenset[int]) -> frozenset[int]:
        live = self.live_sites(frozenset().union(*(self._sites[number] for number in reused)))
        return frozenset(number for number, sites in enumerate(self._sites) if not live.isdisjoint(sites))

    def _refreshes(self, plan: Plan, number: int) -> tuple[int, ...]:
        return tuple(
            n for n, c in enumerate(plan.calls) if number not in c.reused and number in self._reached(c.reused)
        )

    def _known(self, plan: Plan, number: int) -> dict[int, list[int]]:
        """The last two refreshes, or the only one, before each call that leaves a candidate out."""
        refreshes = self._refreshes(plan, number)
        left_out = (n for n, call in enumerate(plan.calls) if number in call.reused)
        return {n: [at for at in refreshes if at < n][-2:] for n in left_out}

    def _schedule(self, plan: Plan, number: int) -> Schedule:
        refreshes, calls = self._refreshes(plan, number), len(plan.calls)
        for interval in range(1, calls):
            if refreshes == tuple(range(0, calls, interval)):
                return Uniform(interval)
        return Explicit(refreshes, calls)

    def _forecast(self, plan: Plan, number: int, run: SamplingRun) -> Forecast:
        own = as_forecast(getattr(self.passes[number], "forecast", 0))
        along = own.along if isinstance(own, Polynomial) else "call"
        known = self._known(plan, number)
        dampings = sorted(plan.calls[n].damping for n, at in known.items() if len(at) == 2)
        if not any(dampings):
            return REPEAT
        shared = Polynomial(1, dampings[len(dampings) // 2], along)
        if dampings[0] == dampings[-1]:
            return shared
        rows: list[tuple[float, ...]] = [()] * len(plan.calls)
        for n, at in known.items():
            rows[n] = Polynomial(1, plan.calls[n].damping, along).weights(at, n, run)
        return Fitted.of(rows, run, shared)


class _Costs:
    """The backend that plans the calls of candidates: outputs are costs, values are sizes in bytes."""

    def __init__(self, candidates: Candidates, sites: Mapping[str, Site], of_call: Cost) -> None:
        self.sites, self._candidates, self._of_call = sites, candidates, of_call

    def compute(self, inputs: None, reused: frozenset[str], read: object) -> tuple[float, dict[str, int]]:
        live = self._candidates.live_sites(reused)
        kept = (name for name in live - reused if not self.sites[name].bypassed)
        return self._of_call(reused & live), {name: self._candidates.bytes_of(name) for name in kept}
