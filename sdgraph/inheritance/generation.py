"""Which call of which generation this is, and what it may inherit. One place for every backend.

A generation is the way of one batch of samples from noise to images. Pipelines hand the same conditioning tensors to
all its calls. A call continues the last generation with these tensors if it is the next one by the caller's own account
(an attached scheduler, `expecting`) or, where nobody gives one, if its latents follow from the calls before. Whatever
is in doubt is computed anew, so that no feature ever comes from another prompt or image.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..forecasts import Forecast, weighted
from ..ir.sites import Site
from ..schedules import Drift, Run, Schedule
from .constant import Constant
from .lineage import Lineage

log = logging.getLogger("sdgraph")

PROMPT = "encoder_hidden_states"


@dataclass(frozen=True)
class Moment:
    """Where in a run a call stands.

    Args:
        timestep: of the call.
        number: of the call in its run, from 0; None if nobody says, then calls are counted.
        run: what is known of the run; the same object for all its calls.
        loop: what vouches that the calls of a generation come in order, an attached scheduler's timesteps or an
            `expecting` block; None if nothing does.
    """

    timestep: float
    number: int | None
    run: Run
    loop: object | None = None


class Step(Protocol):
    """What computes a call: the backend."""

    def __call__(
        self, flat: Mapping[str, torch.Tensor], stale: frozenset[str], value: Callable[[str], torch.Tensor], /
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The output of a call at which the sites `stale` have the values that `value` says, and what it refreshed."""


class Clock(Protocol):
    """What knows at which timestep of which run a pipeline is."""

    def read(self, timestep: torch.Tensor) -> Moment | None:
        """The moment of a call with this timestep; None if it is not a call of that pipeline."""


@dataclass
class Generation:
    """The calls so far of one generation, and the values that later ones may inherit.

    Args:
        signature: of its inputs: names, shapes, dtypes, devices, autocasting.
        conditioning: what its calls have in common.
        loop: what vouches for the order of its calls.
        run: the calls it is part of.
        number: of the next call in that run.
        timestep: of the last call.
        shared: several samples may be going through the loop by turns, and whose features are whose cannot be told:
            nothing is kept.
        lineage: its last latents and predictions, where nothing vouches for the order.
        values: of the refreshed sites, each with the number of the call that made it, newest last.
        missed: sites that were due at calls that did not need them; they are refreshed when next needed.
        gaps: calls from one refresh to the next, of the schedules that follow the drift of features.
    """

    signature: tuple[object, ...]
    conditioning: tuple[Constant, ...]
    loop: object | None
    run: Run
    number: int
    timestep: float
    shared: bool = False
    calls: int = 0
    lineage: Lineage = field(default_factory=Lineage)
    values: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    missed: set[str] = field(default_factory=set)
    gaps: dict[Drift, int] = field(default_factory=dict)

    def continues(
        self,
        signature: tuple[object, ...],
        conditioning: Collection[torch.Tensor],
        moment: Moment,
        sample: torch.Tensor,
    ) -> bool:
        """Whether a call can be the next one."""
        if moment.loop is not self.loop or self._over or not self.has(signature, conditioning):
            return False
        if moment.number is not None:
            return moment.run is self.run and moment.number == self.number
        if moment.timestep > self.timestep:
            return False
        again = moment.timestep == self.timestep  # as PNDM, Heun and DPM2 have it
        if self.loop is None:
            return self.lineage.leads_to(sample) and not (again and self.lineage.repeats(sample))
        if again and self.run.timesteps is not None:
            return self.run.timesteps[self.number] == moment.timestep
        return not again or self.calls > 1

    def has(self, signature: tuple[object, ...], conditioning: Collection[torch.Tensor]) -> bool:
        """Whether a call has the same kind of inputs and the same conditioning."""
        return signature == self.signature and all(
            then.still_is(now) for then, now in zip(self.conditioning, conditioning, strict=True)
        )

    def restarts(self, moment: Moment) -> bool:
        """Whether a call that does not continue this generation starts another one in the same loop, before the end of
        this one: then this one may be taken up again."""
        if self.loop is None or moment.loop is not self.loop:
            return False
        back = moment.timestep >= self.timestep if moment.number is None else moment.number < self.number
        return self.shared or (back and not self._over)

    @property
    def _over(self) -> bool:
        return self.run.calls is not None and self.number >= self.run.calls

    def stale(self, sites: Mapping[str, Site]) -> frozenset[str]:
        """The sites that the call under way inherits."""
        return frozenset(
            name
            for name, site in sites.items()
            if ((site.bypassed and self.number) or (name in self.values and name not in self.missed))
            and not self._refreshes(name, site.schedule)
        )

    def _refreshes(self, name: str, schedule: Schedule) -> bool:
        if isinstance(schedule, Drift):
            return self.number - self.values[name][-1][0] >= self.gaps.get(schedule, schedule.least)
        return schedule.refreshes(self.number, self.timestep, self.run)

    def inherited(self, name: str, forecast: Forecast) -> torch.Tensor:
        """The value of a stale site at the call under way."""
        known = self.values[name]
        weights = forecast.weights([number for number, _ in known], self.number, self.run)
        return weighted([value for _, value in known], weights)

    def keep(self, refreshed: Mapping[str, torch.Tensor], sites: Mapping[str, Site], stale: Collection[str]) -> None:
        """Take note of what the call under way refreshed."""
        self._adapt(refreshed, sites)
        for name, value in refreshed.items():
            if self.shared and not sites[name].invariant:
                continue
            self.values[name] = [*self.values.get(name, ()), (self.number, value)][-sites[name].forecast.memory :]
        self.missed = {n for n, site in sites.items() if n not in refreshed and n not in stale and not site.bypassed}

    def _adapt(self, refreshed: Mapping[str, torch.Tensor], sites: Mapping[str, Site]) -> None:
        """Widen or narrow the gaps of drift schedules, by the errors of forecasts at the call under way."""
        errors: dict[Drift, list[torch.Tensor]] = {}
        for name, fresh in refreshed.items():
            schedule = sites[name].schedule
            if isinstance(schedule, Drift) and name in self.values and not fresh.is_meta:
                expected = self.inherited(name, sites[name].forecast)
                error = (fresh - expected).float().norm() / fresh.float().norm().clamp_min(1e-12)
                errors.setdefault(schedule, []).append(error)
        for schedule, of_sites in errors.items():  # the host reads one number for every schedule
            gap = self.gaps.get(schedule, schedule.least)
            self.gaps[schedule] = schedule.next_gap(gap, float(torch.stack(of_sites).max()))

    def take_over(self, before: Generation, sites: Mapping[str, Site]) -> None:
        """Take the values that depend on conditioning alone from an earlier generation with the same conditioning."""
        self.values = {
            n: values for n, values in before.values.items() if sites[n].invariant and sites[n].forecast.memory == 1
        }

    def advance(self) -> None:
        """The call under way is done; after the last one of a run of known length nothing is kept."""
        self.number += 1
        self.calls += 1
        if self._over:
            self.values.clear()


class Generations:
    """The generations of one UNet, each with its own values; a thread sees its own only."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Generation] = {}
        self._expected = threading.local()
        self._said: set[str] = set()
        self.clocks: list[Clock] = []

    def run(
        self,
        flat: Mapping[str, torch.Tensor],
        constant: Collection[str],
        sites: Mapping[str, Site],
        step: Step,
    ) -> torch.Tensor:
        """The output of the next call of the generation that it belongs to.

        Args:
            flat: the inputs of the call.
            constant: names of those that a generation keeps.
            sites: that calls may inherit.
            step: computes a call.
        """
        with self.call(flat, constant, sites) as generation:
            stale = generation.stale(sites)
            output, refreshed = step(flat, stale, lambda name: generation.inherited(name, sites[name].forecast))
            generation.keep(apart(refreshed, (*flat.values(), output)), sites, stale)
            if generation.loop is None and not generation.shared:
                generation.lineage.add(flat["sample"], output)
            kept = (value for values in generation.values.values() for _, value in values)
            return apart({"output": output}, kept)["output"]

    @contextmanager
    def call(
        self, flat: Mapping[str, torch.Tensor], constant: Collection[str], sites: Mapping[str, Site]
    ) -> Iterator[Generation]:
        """The generation that a call belongs to, for the duration of that call.

        If the call fails, the generation is over: the next call refreshes everything.

        Args:
            flat: the inputs of the call.
            constant: names of those that a generation keeps.
            sites: that calls may inherit.
        """
        prompt, moment = flat[PROMPT], self._moment(flat["timestep"])
        conditioning = [flat[name] for name in constant if name in flat]
        casting = torch.is_autocast_enabled(prompt.device.type)
        signature = (casting, *((name, v.shape, v.dtype, v.device) for name, v in flat.items()))
        key = threading.get_ident(), id(prompt)
        generation = self._known.get(key)
        if moment is None:
            self._known.pop(key, None)
            self.say("the samples of a batch have different timesteps: such calls inherit nothing")
            yield Generation(signature, (), None, Run(), 0, 0.0, shared=True)
            return
        if generation is None or not generation.continues(signature, conditioning, moment, flat["sample"]):
            shared = generation is not None and generation.restarts(moment)
            if generation is None:
                weakref.finalize(prompt, self._known.pop, key, None)  # the values go when the prompt does
            elif shared:
                self.say(
                    "a generation began with the prompt of another one that is not over, in the same loop: whose calls "
                    "are whose cannot be told, and nothing is inherited. Call unet.reset() after an interrupted "
                    "generation, and give samples that take turns prompts of their own"
                )
            elif moment.loop is None and moment.timestep < generation.timestep:
                self.say(
                    "the latents of a call do not follow from the calls before (a sampler with random steps, another "
                    "image, or edited latents), so it inherits nothing. Tell the UNet how calls are made: "
                    "sdgraph.attach(pipe), or `with unet.expecting(timesteps)` in a loop of your own"
                )
            constants = tuple(Constant(tensor, waits=moment.loop is None) for tensor in conditioning)
            before, generation = (
                generation,
                Generation(signature, constants, moment.loop, moment.run, moment.number or 0, moment.timestep, shared),
            )
            for forecast in {site.forecast for site in sites.values()}:
                if doubt := forecast.doubt(moment.run):
                    self.say(doubt)
            if before is not None and before.has(signature, conditioning):
                generation.take_over(before, sites)
            self._known[key] = generation
        generation.timestep = moment.timestep
        try:
            yield generation
        except BaseException:
            self._known.pop(key, None)
            raise
        generation.advance()

    def _moment(self, timestep: torch.Tensor) -> Moment | None:
        """Where a call stands; None if its samples stand at different places."""
        for clock in self.clocks:
            moment = clock.read(timestep)
            if moment is not None:
                return moment
        first, *others = timestep.reshape(-1).tolist()
        if any(other != first for other in others):
            return None
        run, loop = self._expectation
        return Moment(float(first), None, run, loop)

    @property
    def _expectation(self) -> tuple[Run, object | None]:
        """The run that this thread expects, and the block that says so."""
        return getattr(self._expected, "run", (Run(), None))

    def say(self, warning: str) -> None:
        """Log a warning, once for each of its kind."""
        if warning not in self._said:
            self._said.add(warning)
            log.warning("%s", warning)

    @contextmanager
    def expecting(self, run: Run) -> Iterator[None]:
        """Generations that begin inside, in this thread, make the calls of `run`."""
        before = self._expectation
        self._expected.run = run, object()
        try:
            yield
        finally:
            self._expected.run = before

    def clear(self) -> None:
        self._known.clear()

    def bytes(self) -> int:
        """Of all features that are kept, without the latents and prompts by which calls are recognised."""
        kept = (value for g in list(self._known.values()) for each in g.values.values() for _, value in each)
        return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept}.values())


def apart(values: Mapping[str, torch.Tensor], others: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values, as copies where they share memory with others, which somebody else may edit."""
    taken = {other.untyped_storage().data_ptr() for other in others}
    return {n: v.clone() if v.untyped_storage().data_ptr() in taken else v for n, v in values.items()}
