"""The candidates of a search, and proposals of what each call of a generation reuses of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import ceil, pi, sin
from typing import Any, Self

from ..compiler.passes import Chain, Pass
from ..errors import SpecError
from ..forecasts import DAMPING, REPEAT, Fitted, Forecast, Polynomial, as_forecast
from ..inheritance.cache import always
from ..inheritance.plan import Plan
from ..ir.sites import Site, live_nodes
from ..ir.sites import sites as nodes_of_sites
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet
from ..schedules import Explicit, SamplingRun, Schedule, Uniform
from .costs import Cost

STEP = 0.25  # by which a damping is moved

# Functions that map a share of the refreshes to the share of the calls that they fall in.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "even": lambda share: share,
    "early": lambda share: share**1.4,  # the power of DeepCache's DenseEarly
    "ends": lambda share: share - 0.6 / (2 * pi) * sin(2 * pi * share),
}


@dataclass(frozen=True)
class ProposedCall:
    """One call of a proposal.

    Args:
        reused: the numbers of the candidates whose sites it reuses or bypasses; without any, everything is computed.
        damping: the damping of the line through the last two refreshes, for reused sites.
    """

    reused: frozenset[int] = frozenset()
    damping: float = 0.0

    def __str__(self) -> str:
        return f"{'+'.join(map(str, sorted(self.reused)))}:{self.damping:g}" if self.reused else "*"


@dataclass(frozen=True)
class Proposal:
    """The calls of a generation, the first of which computes everything. Prints as text that `read` reads."""

    calls: tuple[ProposedCall, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.calls))

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the proposal of a text."""
        calls = []
        for word in text.split():
            numbers, _, damping = word.partition(":")
            reused = frozenset(map(int, numbers.split("+"))) if numbers != "*" else frozenset[int]()
            calls.append(ProposedCall(reused, float(damping or 0)))
        return cls(tuple(calls))

    @classmethod
    def spaced(cls, calls: int, refreshes: int, reused: frozenset[int], damping: float, shape: str = "even") -> Self:
        """Return a proposal with some calls that compute everything, spaced by one of `SHAPES`.

        An even spacing is that of `Uniform(n)` if that has as many.
        """
        at = {ceil(calls * SHAPES[shape](i / refreshes) - 1e-9) for i in range(refreshes)}
        uniform = set(range(0, calls, -(-calls // refreshes)))
        if shape == "even" and len(uniform) == refreshes:
            at = uniform
        return cls(tuple(ProposedCall() if n in at else ProposedCall(reused, damping) for n in range(calls)))

    def changed(self, number: int, call: ProposedCall) -> Proposal:
        """Return the proposal with another call in the place of one."""
        return Proposal((*self.calls[:number], call, *self.calls[number + 1 :]))

    def neighbours(self, choices: Collection[frozenset[int]]) -> Iterator[Proposal]:
        """Yield the plans that differ by one move: two neighbouring calls change places, one call leaves out something
        else, or one damping is moved.

        Args:
            choices: the sets of candidates that a call may leave out.
        """
        dampings = [call.damping for call in self.calls if call.reused]
        usual = sorted(dampings)[len(dampings) // 2] if dampings else 0.0
        for number, call in enumerate(self.calls[1:], 1):
            before = self.calls[number - 1]
            if number > 1 and before.reused != call.reused:
                yield self.changed(number - 1, call).changed(number, before)
            for reused in choices:
                if reused != call.reused:
                    damping = call.damping if call.reused else usual
                    yield self.changed(number, ProposedCall(reused, damping if reused else 0.0))
            if call.reused:
                for damping in (call.damping - STEP, call.damping + STEP):
                    if damping in DAMPING:
                        yield self.changed(number, replace(call, damping=round(damping, 4)))


class Candidates:
    """Passes that proposals refer to by number, and one UNet with the sites of all of them.

    Args:
        source: the UNet without the candidates.
        passes: the candidates, each with a schedule, and with sites to reuse or to bypass.
    Raises:
        SpecError: there are no candidates, or one has no schedule or no sites.
    """

    def __init__(self, source: GraphUNet, passes: Sequence[Pass]) -> None:
        if not passes:
            hint = "pass InheritFeatures or Bypass"
            raise SpecError("there are no candidates to search", where="search", hint=hint)
        self.passes, self.unet = tuple(passes), source
        self._sites: list[frozenset[str]] = []
        for candidate in self.passes:
            before = self.unet.graph.sites.keys()
            if "schedule" in {field.name for field in fields(candidate)}:
                self.unet = apply(self.unet, replace(candidate, schedule=Uniform(1)), verify=False)  # type: ignore[call-arg]
            self._sites.append(frozenset(self.unet.graph.sites.keys() - before))
            if not self._sites[-1]:
                hint = "InheritFeatures and Bypass have"
                raise SpecError(f"{candidate} has no sites to give a schedule", where="candidates", hint=hint)
        self._nodes = nodes_of_sites(self.unet.graph.fx)
        self._live: dict[frozenset[str], frozenset[str]] = {}

    # -- plans ---------------------------------------------------------------------------------------------------

    def own_proposal(self, run: SamplingRun) -> Proposal:
        """Return the proposal of the candidates' own schedules, with the largest damping of their forecasts."""
        refreshes = [candidate.schedule.calls(run) for candidate in self.passes]  # type: ignore[attr-defined]
        forecasts = [as_forecast(getattr(candidate, "forecast", 0)) for candidate in self.passes]
        damping = max(float(f.damping) if isinstance(f, Polynomial) and f.order else 0.0 for f in forecasts)
        reused = (frozenset(c for c, at in enumerate(refreshes) if n not in at) for n in range(run.calls or 0))
        return self.simplified(Proposal(tuple(ProposedCall(numbers, damping) for numbers in reused)))

    def choices(self) -> list[frozenset[int]]:
        """Return the sets of candidates that a call may leave out: none, one, two, or all; each once."""
        number = len(self.passes)
        chosen = [frozenset(some) for size in (0, 1, 2, number) for some in combinations(range(number), size)]
        return list(dict.fromkeys(numbers & self._reached(numbers) for numbers in chosen))

    def simplified(self, proposal: Proposal) -> Proposal:
        """Return the proposal without numbers that make no difference, so that equivalent proposals are equal."""
        reused = [call.reused & self._reached(call.reused) for call in proposal.calls]
        calls = [replace(call, reused=numbers) for call, numbers in zip(proposal.calls, reused, strict=True)]
        proposal = Proposal(tuple(calls))
        free = set(self.damped_calls(proposal))
        return Proposal(tuple(c if n in free else replace(c, damping=0.0) for n, c in enumerate(proposal.calls)))

    def damped_calls(self, proposal: Proposal) -> tuple[int, ...]:
        """Return the calls whose damping makes a difference: they forecast from two refreshes."""
        forecasting = (number for number in range(len(self.passes)) if self._forecasts(number))
        before = [item for number in forecasting for item in self._refreshes_before(proposal, number).items()]
        return tuple(sorted({number for number, refreshes in before if len(refreshes) == 2}))

    def chain(self, proposal: Proposal, run: SamplingRun) -> Chain:
        """Return the candidates that a proposal uses, with their schedules and forecasts."""
        chosen = []
        for number, candidate in enumerate(self.passes):
            if any(number in call.reused for call in proposal.calls):
                options: dict[str, Any] = {"schedule": self._schedule(proposal, number)}
                if self._forecasts(number):
                    forecast = self._forecast(proposal, number, run)
                    options["forecast"] = 0 if forecast == REPEAT else forecast
                chosen.append(replace(candidate, **options))
        return Chain(tuple(chosen))

    def sites(self, proposal: Proposal, run: SamplingRun) -> dict[str, Site]:
        """Return the sites of the UNet, with the schedules and forecasts of a proposal.

        Args:
            proposal: the proposal.
            run: the sampling run.
        """
        sites = dict(self.unet.backend.sites)
        for number, names in enumerate(self._sites):
            schedule, forecast = self._schedule(proposal, number), self._forecast(proposal, number, run)
            sites |= {name: replace(sites[name], schedule=schedule, forecast=forecast) for name in names}
        return sites

    def cost(self, proposal: Proposal, run: SamplingRun, cost_of_call: Cost) -> float:
        """Return the cost of all calls of a proposal, the most where the drift of features decides about other sites.

        Args:
            proposal: the proposal.
            run: the sampling run.
            cost_of_call: the cost of a call, by the live sites that it reuses.
        """
        return Plan.of(run, always(_Costs(self, self.sites(proposal, run), cost_of_call))).most

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

    def _refreshes(self, proposal: Proposal, number: int) -> tuple[int, ...]:
        return tuple(
            n for n, c in enumerate(proposal.calls) if number not in c.reused and number in self._reached(c.reused)
        )

    def _refreshes_before(self, proposal: Proposal, number: int) -> dict[int, list[int]]:
        """Return the last two refreshes, or the only one, before each call that leaves a candidate out."""
        refreshes = self._refreshes(proposal, number)
        left_out = (n for n, call in enumerate(proposal.calls) if number in call.reused)
        return {n: [at for at in refreshes if at < n][-2:] for n in left_out}

    def _schedule(self, proposal: Proposal, number: int) -> Schedule:
        refreshes, calls = self._refreshes(proposal, number), len(proposal.calls)
        for interval in range(1, calls):
            if refreshes == tuple(range(0, calls, interval)):
                return Uniform(interval)
        return Explicit(refreshes, calls)

    def _forecast(self, proposal: Proposal, number: int, run: SamplingRun) -> Forecast:
        own = as_forecast(getattr(self.passes[number], "forecast", 0))
        along = own.along if isinstance(own, Polynomial) else "call"
        known = self._refreshes_before(proposal, number)
        dampings = sorted(proposal.calls[n].damping for n, at in known.items() if len(at) == 2)
        if not any(dampings):
            return REPEAT
        shared = Polynomial(1, dampings[len(dampings) // 2], along)
        if dampings[0] == dampings[-1]:
            return shared
        rows: list[tuple[float, ...]] = [()] * len(proposal.calls)
        for n, at in known.items():
            rows[n] = Polynomial(1, proposal.calls[n].damping, along).weights(at, n, run)
        return Fitted.of(rows, run, shared)


class _Costs:
    """The backend that plans the calls of candidates: outputs are costs, values are sizes in bytes."""

    def __init__(self, candidates: Candidates, sites: Mapping[str, Site], cost_of_call: Cost) -> None:
        self.sites, self._candidates, self._cost_of_call = sites, candidates, cost_of_call

    def compute(self, inputs: None, reused: frozenset[str], read: object) -> tuple[float, dict[str, int]]:
        live = self._candidates.live_sites(reused)
        kept = (name for name in live - reused if not self.sites[name].bypassed)
        return self._cost_of_call(reused & live), {name: self._candidates.bytes_of(name) for name in kept}
