"""The candidates of a search, and proposals of the UNet of each call and of what it reuses of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations, product
from math import ceil, pi, sin
from typing import Any, Self

from ..compiler.passes import Chain, Pass
from ..errors import SavedError, SpecError
from ..forecasts import DAMPING, REPEAT, Fitted, Forecast, Polynomial, as_forecast
from ..inheritance.cache import Turn
from ..inheritance.plan import Plan
from ..ir.sites import Site, live_nodes
from ..ir.sites import sites as nodes_of_sites
from ..runtime.apply import apply
from ..runtime.switch import SwitchUNet
from ..runtime.unet import GraphUNet
from ..schedules import ByCall, Explicit, SamplingRun, Schedule, Uniform
from .costs import Cost, MemberCost

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
        member: the name of the UNet that computes it; "" if there is only one.
    """

    reused: frozenset[int] = frozenset()
    damping: float = 0.0
    member: str = ""

    def __str__(self) -> str:
        does = f"{'+'.join(map(str, sorted(self.reused)))}:{self.damping:g}" if self.reused else "*"
        return f"{self.member}@{does}" if self.member else does

    @property
    def choice(self) -> tuple[str, frozenset[int]]:
        """The UNet and the candidates that it leaves out."""
        return self.member, self.reused


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
            member, _, does = word.rpartition("@")
            numbers, _, damping = does.partition(":")
            reused = frozenset(map(int, numbers.split("+"))) if numbers != "*" else frozenset[int]()
            calls.append(ProposedCall(reused, float(damping or 0), member))
        return cls(tuple(calls))

    @classmethod
    def spaced(
        cls,
        calls: int,
        refreshes: int,
        reused: frozenset[int] = frozenset(),
        damping: float = 0.0,
        shape: str = "even",
        member: str = "",
    ) -> Self:
        """Return a proposal with some calls that compute everything, spaced by one of `SHAPES`.

        An even spacing is that of `Uniform(n)` if that has as many.
        """
        at = {ceil(calls * SHAPES[shape](i / refreshes) - 1e-9) for i in range(refreshes)}
        uniform = set(range(0, calls, -(-calls // refreshes)))
        if shape == "even" and len(uniform) == refreshes:
            at = uniform
        whole, other = ProposedCall(member=member), ProposedCall(reused, damping, member)
        return cls(tuple(whole if n in at else other for n in range(calls)))

    @property
    def turns(self) -> tuple[str, ...]:
        """The name of the UNet that computes each call."""
        return tuple(call.member for call in self.calls)

    def begins_turn(self, number: int) -> bool:
        """Return whether a call is the first one of a turn, which inherits nothing."""
        return number == 0 or self.calls[number].member != self.calls[number - 1].member

    def changed(self, number: int, call: ProposedCall) -> Proposal:
        """Return the proposal with another call in the place of one."""
        return Proposal((*self.calls[:number], call, *self.calls[number + 1 :]))

    def neighbours(self, choices: Collection[ProposedCall]) -> Iterator[Proposal]:
        """Yield the plans that differ by one move: two neighbouring calls change places, one call leaves out something
        else or is computed by another UNet, or one damping is moved.

        Args:
            choices: the calls to choose from, with any damping.
        """
        dampings = [call.damping for call in self.calls if call.reused]
        usual = sorted(dampings)[len(dampings) // 2] if dampings else 0.0
        for number, call in enumerate(self.calls):
            before = self.calls[number - 1]
            if number and before.choice != call.choice and (number > 1 or not call.reused):
                yield self.changed(number - 1, call).changed(number, before)
            for choice in choices:
                if choice.choice != call.choice and (number or not choice.reused):
                    damping = call.damping if call.reused else usual
                    yield self.changed(number, replace(choice, damping=damping if choice.reused else 0.0))
            if call.reused:
                for damping in (call.damping - STEP, call.damping + STEP):
                    if damping in DAMPING:
                        yield self.changed(number, replace(call, damping=round(damping, 4)))


class MemberCandidates:
    """The candidates of one UNet, and this UNet with the sites of all of them.

    Args:
        source: the UNet without the candidates.
        passes: the candidates, each with a schedule, and with sites to reuse or to bypass.
    Raises:
        SpecError: a candidate has no schedule or no sites.
    """

    def __init__(self, source: GraphUNet, passes: Sequence[Pass]) -> None:
        self.passes, self.source, self.unet = tuple(passes), source, source
        self.sites: list[frozenset[str]] = []
        for candidate in self.passes:
            before = self.unet.graph.sites.keys()
            if "schedule" in {field.name for field in fields(candidate)}:
                self.unet = apply(self.unet, replace(candidate, schedule=Uniform(1)), verify=False)  # type: ignore[call-arg]
            self.sites.append(frozenset(self.unet.graph.sites.keys() - before))
            if not self.sites[-1]:
                hint = "InheritFeatures and Bypass have"
                raise SpecError(f"{candidate} has no sites to give a schedule", where="candidates", hint=hint)
        self._nodes = nodes_of_sites(self.unet.graph.fx)
        self._live: dict[frozenset[str], frozenset[str]] = {}

    def forecasts(self, number: int) -> bool:
        """Return whether a candidate has a forecast."""
        return "forecast" in {field.name for field in fields(self.passes[number])}

    def bypasses(self, number: int) -> bool:
        """Return whether a candidate bypasses its sites, for which no earlier call is needed."""
        return all(self.unet.graph.sites[name].bypassed for name in self.sites[number])

    def live_sites(self, reused: frozenset[str]) -> frozenset[str]:
        """Return the sites that the output of a call depends on; others only serve to compute reused ones.

        Args:
            reused: the sites that the call does not compute.
        """
        if reused not in self._live:
            live = live_nodes(self.unet.graph.fx, reused)
            self._live[reused] = frozenset(name for name, node in self._nodes.items() if node in live)
        return self._live[reused]

    def reached(self, reused: frozenset[int]) -> frozenset[int]:
        """Return the candidates with a site that the output depends on, if a call leaves out some candidates."""
        live = self.live_sites(frozenset().union(*(self.sites[number] for number in reused)))
        return frozenset(number for number, sites in enumerate(self.sites) if not live.isdisjoint(sites))

    def choices(self) -> list[frozenset[int]]:
        """Return the sets of candidates that a call may leave out: none, one, two, or all; each once."""
        number = len(self.passes)
        chosen = [frozenset(some) for size in (0, 1, 2, number) for some in combinations(range(number), size)]
        return list(dict.fromkeys(numbers & self.reached(numbers) for numbers in chosen))

    def bytes_of(self, site: str) -> int:
        """Return the bytes of the value of a site.

        Args:
            site: the name of the site.
        """
        return int(self._nodes[site].meta["val"].nbytes)


class Candidates:
    """Passes that proposals refer to by number, of one UNet or of each of several.

    Args:
        sources: the UNets without the candidates, by name, the first of which is the one to be close to; the name of
            the only one may be "".
        passes: the candidates of each of them, by its name.
    Raises:
        SpecError: there is nothing to choose from, or a candidate has no schedule or no sites.
    """

    def __init__(self, sources: Mapping[str, GraphUNet], passes: Mapping[str, Sequence[Pass]]) -> None:
        if len(sources) == 1 and not any(passes.values()):
            hint = "pass InheritFeatures or Bypass"
            raise SpecError("there are no candidates to search", where="search", hint=hint)
        self.members = {name: MemberCandidates(source, passes[name]) for name, source in sources.items()}

    @property
    def first(self) -> str:
        """The name of the first UNet."""
        return next(iter(self.members))

    def alone(self, member: str) -> GraphUNet | SwitchUNet:
        """Return what computes every call with one UNet, and counts them.

        Args:
            member: the name of the UNet.
        """
        unet = self.members[member].unet
        return SwitchUNet({member: unet}, ByCall((member,))) if member else unet

    # -- plans ---------------------------------------------------------------------------------------------------

    def own_proposals(self, run: SamplingRun) -> Iterator[Proposal]:
        """Yield the proposal of the own schedules of each UNet's candidates, with the largest damping of their
        forecasts.
        """
        for name, one in self.members.items():
            if one.passes:
                refreshes = [candidate.schedule.calls(run) for candidate in one.passes]  # type: ignore[attr-defined]
                forecasts = [as_forecast(getattr(candidate, "forecast", 0)) for candidate in one.passes]
                damping = max(float(f.damping) if isinstance(f, Polynomial) and f.order else 0.0 for f in forecasts)
                reused = (frozenset(c for c, at in enumerate(refreshes) if n not in at) for n in range(run.calls or 0))
                yield self.simplified(Proposal(tuple(ProposedCall(numbers, damping, name) for numbers in reused)))

    def choices(self) -> list[ProposedCall]:
        """Return the calls to choose from, with no damping: of each UNet, the sets of candidates it may leave out."""
        return [ProposedCall(reused, member=name) for name, one in self.members.items() for reused in one.choices()]

    def read(self, text: str, calls: int) -> Proposal:
        """Return the proposal of a text among measurements.

        Args:
            text: the text.
            calls: the number of calls that it has to have.
        Raises:
            SavedError: it is no proposal of these candidates.
        """
        try:
            proposal = Proposal.read(text)
            numbers = {name: set(range(len(one.passes))) for name, one in self.members.items()}
            fits = len(proposal.calls) == calls and all(call.reused <= numbers[call.member] for call in proposal.calls)
        except (ValueError, KeyError):
            fits = False
        if not fits:
            hint = "delete the file of measurements in the folder; the same command measures again"
            raise SavedError(f"{text[:60]!r} is no plan of these candidates", where="folder", hint=hint)
        return proposal

    def every_proposal(self, calls: int) -> Iterator[Proposal]:
        """Yield every proposal for a number of calls, with no damping. Their number is exponential."""
        proposals = (self.simplified(Proposal(some)) for some in product(self.choices(), repeat=calls))
        yield from dict.fromkeys(proposals)

    def simplified(self, proposal: Proposal) -> Proposal:
        """Return the proposal without numbers that make no difference, so that equivalent proposals are equal.

        The first call of a turn inherits nothing. It bypasses, unless it is the first one of the generation.
        """
        calls = []
        for n, call in enumerate(proposal.calls):
            one, reused = self.members[call.member], call.reused
            if proposal.begins_turn(n):
                reused = frozenset(number for number in reused if n and one.bypasses(number))
            calls.append(replace(call, reused=reused & one.reached(reused)))
        proposal = Proposal(tuple(calls))
        free = set(self.damped_calls(proposal))
        return Proposal(tuple(c if n in free else replace(c, damping=0.0) for n, c in enumerate(proposal.calls)))

    def damped_calls(self, proposal: Proposal) -> tuple[int, ...]:
        """Return the calls whose damping makes a difference: they forecast from two refreshes."""
        before = [
            item
            for name in self.members
            for number in range(len(self.members[name].passes))
            if self.members[name].forecasts(number)
            for item in self._refreshes_before(proposal, name, number).items()
        ]
        return tuple(sorted({number for number, refreshes in before if len(refreshes) == 2}))

    def chains(self, proposal: Proposal, run: SamplingRun) -> dict[str, Chain]:
        """Return the candidates that each UNet of a proposal uses, with their schedules and forecasts."""
        chains = {}
        for name in dict.fromkeys(proposal.turns):
            chosen: list[Pass] = []
            for number, candidate in enumerate(self.members[name].passes):
                if any(number in call.reused and call.member == name for call in proposal.calls):
                    options: dict[str, Any] = {"schedule": self._schedule(proposal, name, number)}
                    if self.members[name].forecasts(number):
                        forecast = self._forecast(proposal, name, number, run)
                        options["forecast"] = 0 if forecast == REPEAT else forecast
                    chosen.append(replace(candidate, **options))
            chains[name] = Chain(tuple(chosen))
        return chains

    def sites(self, proposal: Proposal, run: SamplingRun, member: str) -> dict[str, Site]:
        """Return the sites of a UNet, with the schedules and forecasts of a proposal.

        Args:
            proposal: the proposal.
            run: the sampling run.
            member: the name of the UNet.
        """
        one = self.members[member]
        sites = dict(one.unet.backend.sites)
        for number, names in enumerate(one.sites):
            schedule = self._schedule(proposal, member, number)
            forecast = self._forecast(proposal, member, number, run)
            sites |= {name: replace(sites[name], schedule=schedule, forecast=forecast) for name in names}
        return sites

    def unet(self, proposal: Proposal, run: SamplingRun) -> GraphUNet | SwitchUNet:
        """Return the UNet that generates by a proposal, until another proposal is asked for.

        Args:
            proposal: the proposal.
            run: the sampling run.
        """
        used = {name: self.members[name].unet for name in dict.fromkeys(proposal.turns)}
        for name, unet in used.items():
            unet.reschedule(self.sites(proposal, run, name))
        return used[""] if "" in used else SwitchUNet(used, ByCall.of_calls(proposal.turns))

    def cost(self, proposal: Proposal, run: SamplingRun, cost_of_call: MemberCost) -> float:
        """Return the cost of all calls of a proposal, the most where the drift of features decides about other sites.

        Args:
            proposal: the proposal.
            run: the sampling run.
            cost_of_call: the cost of a call, by the name of its UNet and the live sites that it reuses.
        """
        turns = {
            name: Turn(_Costs(self.members[name], self.sites(proposal, run, name), partial(cost_of_call, name)), name)
            for name in dict.fromkeys(proposal.turns)
        }
        return Plan.of(run, lambda call, timestep, run: turns[proposal.calls[call or 0].member]).most

    # -- one candidate -------------------------------------------------------------------------------------------

    def _refreshes(self, proposal: Proposal, member: str, number: int) -> tuple[int, ...]:
        reached = self.members[member].reached
        own = ((n, call.reused) for n, call in enumerate(proposal.calls) if call.member == member)
        return tuple(n for n, reused in own if number not in reused and number in reached(reused))

    def _refreshes_before(self, proposal: Proposal, member: str, number: int) -> dict[int, list[int]]:
        """Return the last two refreshes in its turn, or the only one, before each call that leaves a candidate out."""
        refreshes = self._refreshes(proposal, member, number)
        known, begun = {}, 0
        for n, call in enumerate(proposal.calls):
            begun = n if proposal.begins_turn(n) else begun
            if call.member == member and number in call.reused:
                known[n] = [at for at in refreshes if begun <= at < n][-2:]
        return known

    def _schedule(self, proposal: Proposal, member: str, number: int) -> Schedule:
        """Return the schedule of a candidate, an interval if the calls of its UNet follow one."""
        calls, refreshes = len(proposal.calls), {0, *self._refreshes(proposal, member, number)}
        own = [n for n in range(calls) if n == 0 or proposal.calls[n].member == member]
        for interval in range(1, calls):
            if all((n % interval == 0) == (n in refreshes) for n in own):
                return Uniform(interval)
        return Explicit(tuple(sorted(refreshes)), calls)

    def _forecast(self, proposal: Proposal, member: str, number: int, run: SamplingRun) -> Forecast:
        own = as_forecast(getattr(self.members[member].passes[number], "forecast", 0))
        along = own.along if isinstance(own, Polynomial) else "call"
        known = self._refreshes_before(proposal, member, number)
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
    """The backend that plans the calls of a UNet: outputs are costs, values are sizes in bytes."""

    def __init__(self, candidates: MemberCandidates, sites: Mapping[str, Site], cost_of_call: Cost) -> None:
        self.sites, self._candidates, self._cost_of_call = sites, candidates, cost_of_call

    def compute(self, inputs: None, reused: frozenset[str], read: object) -> tuple[float, dict[str, int]]:
        live = self._candidates.live_sites(reused)
        kept = (name for name in live - reused if not self.sites[name].bypassed)
        return self._cost_of_call(reused & live), {name: self._candidates.bytes_of(name) for name in kept}
