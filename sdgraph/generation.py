"""Which call of which generation this is, and what it may inherit. One place for every backend.

A generation is what one set of conditioning tensors goes through: pipelines hand the same objects to every call. A call
belongs to the same generation as the one before with those objects if nothing says otherwise; whatever is in doubt
begins a new one, whose first call refreshes everything. So no feature ever comes from another prompt or image.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .forecast import forecast
from .inherit import Site
from .schedules import Run

PROMPT = "encoder_hidden_states"


@dataclass(frozen=True)
class Moment:
    """Where in a run a call stands.

    Args:
        timestep: of the call.
        number: of the call in its run, from 0; None if nobody says, then calls are counted.
        run: what is known of the run; the same object for all its calls.
    """

    timestep: float
    number: int | None
    run: Run


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
        signature: of its inputs: names, shapes, dtypes, devices, autocasting, and the versions of the conditioning.
        conditioning: those tensors.
        run: the calls it is part of.
        number: of the next call in that run.
        timestep: of the last call.
        values: of the refreshed sites, each with the number of the call that made it, newest last.
        missed: sites that were due at calls that did not need them; they are refreshed when next needed.
        shared: its first call came twice. Several samples may be going through it by turns, as when a batch is split,
            and whose features are whose cannot be told: nothing is kept.
    """

    signature: tuple[object, ...]
    conditioning: tuple[weakref.ref[torch.Tensor], ...]
    run: Run
    number: int
    timestep: float
    shared: bool = False
    calls: int = 0
    values: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    missed: set[str] = field(default_factory=set)

    def continues(self, signature: tuple[object, ...], conditioning: Collection[torch.Tensor], moment: Moment) -> bool:
        """Whether a call can be the next one.

        Where nobody says which call it is: timesteps fall during a generation. Some schedulers repeat one (PNDM its
        second, Heun every one but the first), none its first; a generation of a single step, however, is followed by
        the same timestep.
        """
        if signature != self.signature or self._over:
            return False
        if any(ref() is not tensor for ref, tensor in zip(self.conditioning, conditioning, strict=True)):
            return False
        if moment.number is not None:
            return moment.run is self.run and moment.number == self.number
        return moment.timestep < self.timestep or (moment.timestep == self.timestep and self.calls > 1)

    def repeats(self, moment: Moment) -> bool:
        """Whether a call is at the place of the last one."""
        if moment.number is not None:
            return moment.run is self.run and moment.number == self.number - 1
        return moment.timestep == self.timestep

    @property
    def _over(self) -> bool:
        return self.run.calls is not None and self.number >= self.run.calls

    def stale(self, sites: Mapping[str, Site]) -> frozenset[str]:
        """The sites that the call under way inherits."""
        return frozenset(
            name
            for name, site in sites.items()
            if name in self.values
            and name not in self.missed
            and not site.schedule.refreshes(self.number, self.timestep, self.run)
        )

    def inherited(self, name: str) -> torch.Tensor:
        """The value of a stale site at the call under way."""
        return forecast(self.values[name], self.number)

    def keep(self, refreshed: Mapping[str, torch.Tensor], sites: Mapping[str, Site], stale: Collection[str]) -> None:
        """Take note of what the call under way refreshed."""
        if self.shared:
            return
        for name, value in refreshed.items():
            self.values[name] = [*self.values.get(name, ()), (self.number, value)][-1 - sites[name].forecast :]
        self.missed = {name for name in sites if name not in refreshed and name not in stale}

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
        with self.call(flat, constant) as generation:
            stale = generation.stale(sites)
            output, refreshed = step(flat, stale, generation.inherited)
            generation.keep(refreshed, sites, stale)
        return output

    @contextmanager
    def call(self, flat: Mapping[str, torch.Tensor], constant: Collection[str]) -> Iterator[Generation]:
        """The generation that a call belongs to, for the duration of that call.

        If the call fails, the generation is over: the next call refreshes everything.

        Args:
            flat: the inputs of the call.
            constant: names of those that a generation keeps.
        """
        prompt, moment = flat[PROMPT], self._moment(flat["timestep"])
        conditioning = [flat[name] for name in constant if name in flat]
        # an edit in place makes another prompt of it
        versions = tuple(None if tensor.is_inference() else tensor._version for tensor in conditioning)
        casting = torch.is_autocast_enabled(prompt.device.type)
        signature = (versions, casting, *((name, v.shape, v.dtype, v.device) for name, v in flat.items()))
        key = threading.get_ident(), id(prompt)
        generation = self._known.get(key)
        if generation is None or not generation.continues(signature, conditioning, moment):
            again = generation is not None and generation.repeats(moment)
            if generation is None:
                weakref.finalize(prompt, self._known.pop, key, None)  # the values go when the prompt does
            refs = tuple(map(weakref.ref, conditioning))
            generation = Generation(signature, refs, moment.run, moment.number or 0, moment.timestep, again)
            self._known[key] = generation
        generation.timestep = moment.timestep
        try:
            yield generation
        except BaseException:
            self._known.pop(key, None)
            raise
        generation.advance()

    def _moment(self, timestep: torch.Tensor) -> Moment:
        for clock in self.clocks:
            moment = clock.read(timestep)
            if moment is not None:
                return moment
        return Moment(float(timestep.reshape(-1)[0]), None, getattr(self._expected, "run", Run()))

    @contextmanager
    def expecting(self, run: Run) -> Iterator[None]:
        """Generations that begin inside, in this thread, make the calls of `run`."""
        before = getattr(self._expected, "run", Run())
        self._expected.run = run
        try:
            yield
        finally:
            self._expected.run = before

    def clear(self) -> None:
        self._known.clear()

    def bytes(self) -> int:
        """Of all values that are kept."""
        kept = (value for g in list(self._known.values()) for each in g.values.values() for _, value in each)
        return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept}.values())
