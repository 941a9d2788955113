"""Which call of which generation this is, and what it may inherit. One place for every backend.

A generation is the way of one batch of samples from noise to images. Pipelines hand the same conditioning tensors to
all its calls. A call continues the last generation with these tensors if it is the next one by the caller's own account
(an attached scheduler, `expecting`) or, where nobody gives one, if its latents follow from the calls before. Whatever
is in doubt is computed anew, so that no feature ever comes from another prompt or image.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..forecasts import Forecast, weighted
from ..ir.guards import autocast_dtype
from ..ir.sites import Site
from ..schedules import Drift, SamplingRun, Schedule
from .constant import Constant
from .lineage import Lineage

log = logging.getLogger("sdgraph")

PROMPT = "encoder_hidden_states"
ENDED = object()  # the loop of generations whose `expecting` block is over
SHARED = (
    "a generation began with the prompt of another one that is not over, in the same loop: whose calls are whose "
    "cannot be told, and nothing is inherited. Call unet.reset() after an interrupted generation, give samples that "
    "take turns prompts of their own, and tell `expecting` the timesteps if they rise"
)


@dataclass(frozen=True)
class CallPosition:
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
    run: SamplingRun
    loop: object | None = None


class Backend(Protocol):
    """What computes a call: the backend."""

    def __call__(
        self, flat: Mapping[str, torch.Tensor], reused: frozenset[str], value: Callable[[str], torch.Tensor], /
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The output of a call at which the sites `reused` have the values that `value` says, and what it refreshed."""


class PositionSource(Protocol):
    """What knows at which timestep of which run a pipeline is."""

    def read(self, timestep: torch.Tensor) -> CallPosition | None:
        """The position of a call with this timestep; None if it is not a call of that pipeline."""


@dataclass
class Generation:
    """The calls so far of one generation, and the values that later ones may inherit.

    Args:
        signature: of its inputs: names, shapes, dtypes, devices.
        conditioning: what its calls have in common, the prompt first.
        loop: what vouches for the order of its calls.
        run: the calls it is part of.
        number: of the next call in that run.
        timestep: of the last call.
        shared: several samples may be going through the loop by turns, and whose features are whose cannot be told:
            nothing is kept.
        thread: that its calls come from.
        lineage: its last latents and predictions, where nothing vouches for the order.
        values: of the refreshed sites, each with the number of the call that made it, newest last.
        computed_with: what those values were computed with: the backend's weights and PyTorch's arithmetic.
        missed: sites that were due at calls that did not need them; they are refreshed when next needed.
        gaps: calls from one refresh to the next, of the schedules that follow the drift of features.
    """

    signature: tuple[object, ...]
    conditioning: tuple[Constant, ...]
    loop: object | None
    run: SamplingRun
    number: int
    timestep: float
    shared: bool = False
    thread: int = field(default_factory=threading.get_ident)
    calls: int = 0
    lineage: Lineage = field(default_factory=Lineage)
    values: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    computed_with: object = None
    missed: set[str] = field(default_factory=set)
    gaps: dict[Drift, int] = field(default_factory=dict)

    def continues(
        self,
        signature: tuple[object, ...],
        conditioning: Collection[torch.Tensor],
        position: CallPosition,
        sample: torch.Tensor,
    ) -> bool:
        """Whether a call can be the next one."""
        if position.loop is not self.loop or self.over or not self.has(signature, conditioning):
            return False
        if position.number is not None:
            return position.run is self.run and position.number == self.number
        timesteps = self.run.timesteps if self.loop is not None else None
        if timesteps is not None and timesteps[self.number] == position.timestep:
            return True
        if self._is_back(position.timestep):
            return False
        again = position.timestep == self.timestep  # as PNDM, Heun and DPM2 have it
        if self.loop is None:
            return self.lineage.leads_to(sample) and not (again and self.lineage.repeats(sample))
        return not again or (self.calls > 1 and timesteps is None)

    def _is_back(self, timestep: float) -> bool:
        """Whether a timestep lies before that of the last call. Timesteps fall, or rise where a run says so."""
        timesteps = self.run.timesteps
        rising = self.loop is not None and timesteps is not None and timesteps[-1] > timesteps[0]
        return timestep < self.timestep if rising else timestep > self.timestep

    @property
    def orphaned(self) -> bool:
        """Whether the tensor of the prompt is gone, so that only a tensor with its contents can continue."""
        return not self.conditioning[0].exists

    def share(self) -> None:
        """Several samples may be going through the loop with this prompt: nothing that was kept is anybody's."""
        self.shared = True
        self.values.clear()

    def follow(self, conditioning: Iterable[torch.Tensor]) -> None:
        """The call under way has these tensors."""
        for constant, tensor in zip(self.conditioning, conditioning, strict=True):
            constant.follow(tensor)

    def has(self, signature: tuple[object, ...], conditioning: Collection[torch.Tensor]) -> bool:
        """Whether a call has the same kind of inputs and the same conditioning."""
        return signature == self.signature and all(
            then.still_is(now) for then, now in zip(self.conditioning, conditioning, strict=True)
        )

    def restarts(self, position: CallPosition) -> bool:
        """Whether a call that does not continue this generation starts another one in the same loop, before the end of
        this one: then this one may be taken up again."""
        if self.loop is None or position.loop is not self.loop:
            return False
        back = (
            position.timestep == self.timestep or self._is_back(position.timestep)
            if position.number is None
            else position.number < self.number
        )
        return self.shared or (back and not self.over)

    def might_go_on(self, position: CallPosition) -> bool:
        """Whether the timestep of a call is one that could follow, as that of another image is not."""
        return position.timestep < self.timestep or (self.calls == 1 and position.timestep != self.timestep)

    @property
    def over(self) -> bool:
        return self.run.calls is not None and self.number >= self.run.calls

    def reused(self, sites: Mapping[str, Site]) -> frozenset[str]:
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
        """The value of a reused site at the call under way."""
        known = self.values[name]
        weights = forecast.weights([number for number, _ in known], self.number, self.run)
        return weighted([value for _, value in known], weights)

    def keep(self, refreshed: Mapping[str, torch.Tensor], sites: Mapping[str, Site], reused: Collection[str]) -> None:
        """Take note of what the call under way refreshed."""
        self._adapt(refreshed, sites)
        for name, value in refreshed.items():
            if self.shared and not sites[name].invariant:
                continue
            self.values[name] = [*self.values.get(name, ()), (self.number, value)][-sites[name].forecast.memory :]
        self.missed = {n for n, site in sites.items() if n not in refreshed and n not in reused and not site.bypassed}

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

    def compute_with(self, means: object) -> None:
        """Forget the values if they were computed with anything else."""
        if means != self.computed_with:
            self.values.clear()
            self.gaps.clear()
            self.missed.clear()
            self.computed_with = means

    def take_over(self, before: Generation, sites: Mapping[str, Site]) -> None:
        """Take the values that depend on conditioning alone from an earlier generation with the same conditioning."""
        self.computed_with = before.computed_with
        self.values = {
            n: values for n, values in before.values.items() if sites[n].invariant and sites[n].forecast.memory == 1
        }

    def advance(self) -> None:
        """The call under way is done; after the last one of a run of known length nothing is kept."""
        self.number += 1
        self.calls += 1
        if self.over:
            self.values.clear()


class Generations:
    """The generations of one UNet, each with its own values; a thread sees its own only."""

    def __init__(self) -> None:
        self._known: dict[int, Generation] = {}
        self._numbers = itertools.count()
        self._expected = threading.local()
        self._said: set[str] = set()
        self.position_sources: list[PositionSource] = []

    def run(
        self,
        flat: Mapping[str, torch.Tensor],
        constant: Collection[str],
        sites: Mapping[str, Site],
        step: Backend,
        weights: Callable[[bool], object] = lambda waits: None,
    ) -> torch.Tensor:
        """The output of the next call of the generation that it belongs to.

        Args:
            flat: the inputs of the call.
            constant: names of those that a generation keeps.
            sites: that calls may inherit.
            step: computes a call.
            weights: returns an object that is another one after any change of what `step` computes with. Its argument
                says whether the host may wait for an accelerator.
        """
        with self.call(flat, constant, sites, weights) as generation:
            reused = generation.reused(sites)
            output, refreshed = step(flat, reused, lambda name: generation.inherited(name, sites[name].forecast))
            generation.keep(apart(refreshed, (*flat.values(), output)), sites, reused)
            if generation.loop is None and not generation.shared:
                generation.lineage.add(flat["sample"], output)
            kept = (value for values in generation.values.values() for _, value in values)
            return apart({"output": output}, kept)["output"]

    @contextmanager
    def call(
        self,
        flat: Mapping[str, torch.Tensor],
        constant: Collection[str],
        sites: Mapping[str, Site],
        weights: Callable[[bool], object] = lambda waits: None,
    ) -> Iterator[Generation]:
        """The generation that a call belongs to, for the duration of that call.

        If the call fails, the generation is over: the next call refreshes everything.

        Args:
            flat: the inputs of the call.
            constant: names of those that a generation keeps.
            sites: that calls may inherit.
            weights: see `run`.
        """
        prompt, position = flat[PROMPT], self._position(flat["timestep"])
        conditioning = [prompt, *(flat[name] for name in constant if name in flat and name != PROMPT)]
        signature = tuple((name, v.shape, v.dtype, v.device) for name, v in flat.items())
        key, generation = self._find(signature, conditioning, position)
        if position is None:
            self._known.pop(key, None)
            self.say("the samples of a batch have different timesteps: such calls inherit nothing")
            yield Generation(signature, (), None, SamplingRun(), 0, 0.0, shared=True)
            return
        waits = position.loop is None
        means = weights(waits), arithmetic(prompt.device.type)
        if generation is None or not generation.continues(signature, conditioning, position, flat["sample"]):
            shared = generation is not None and generation.restarts(position)
            if shared:
                self.say(SHARED)
            elif generation is not None and position.loop is None and generation.might_go_on(position):
                self.say(
                    "the latents of a call do not follow from the calls before (a sampler with random steps, rising "
                    "timesteps, another image, or edited latents), so it inherits nothing. Tell the UNet how calls are "
                    "made: sdgraph.attach(pipe), or `with unet.expecting(timesteps)` in a loop of your own"
                )
            constants = tuple(Constant(tensor, waits=position.loop is None) for tensor in conditioning)
            before, generation = (
                generation,
                Generation(
                    signature, constants, position.loop, position.run, position.number or 0, position.timestep, shared
                ),
            )
            for forecast in {site.forecast for site in sites.values()}:
                if doubt := forecast.doubt(position.run):
                    self.say(doubt)
            # Where contents of weights were not looked at, nothing is known of edits that PyTorch does not count.
            certain = waits or prompt.device.type == "cpu"
            if before is not None and certain and before.has(signature, conditioning):
                generation.take_over(before, sites)
            self._forget_orphans(position.loop)
            self._known[key] = generation
            weakref.finalize(prompt, self._orphaned, key)
        elif not generation.conditioning[0].is_very(prompt):
            weakref.finalize(prompt, self._orphaned, key)
        generation.follow(conditioning)
        generation.compute_with(means)
        generation.timestep = position.timestep
        try:
            yield generation
        except BaseException:
            self._known.pop(key, None)
            raise
        generation.advance()

    def _find(
        self, signature: tuple[object, ...], conditioning: Sequence[torch.Tensor], position: CallPosition | None
    ) -> tuple[int, Generation | None]:
        """The generation with the prompt of a call, and its number.

        A tensor that has the contents of one that is gone is the same prompt, where something vouches for the order of
        the calls. Where nothing does, values go with the tensor of the prompt, so that none outlive their generation.
        """
        mine = [(number, g) for number, g in list(self._known.items()) if g.thread == threading.get_ident()]
        for number, generation in mine:
            if generation.conditioning[0].is_very(conditioning[0]):
                return number, generation
        equal = [
            (number, generation)
            for number, generation in mine
            if position is not None
            and generation.loop is position.loop
            and not generation.over
            and generation.has(signature, conditioning)
        ]
        orphaned = [(number, generation) for number, generation in equal if generation.orphaned]
        if orphaned and orphaned[0][1].loop is not None:
            if len(equal) > 1:
                for _, generation in orphaned:
                    generation.share()
                self.say(SHARED)
            return orphaned[0]
        if any(g.calls == 1 and position is not None and g.timestep != position.timestep for _, g in equal):
            self.say(
                "the tensor of the prompt is made anew at every call, so calls inherit nothing. Pass the same tensor "
                "to all calls of a generation; or tell the UNet which calls belong together, and keep no such tensors: "
                "sdgraph.attach(pipe), or `with unet.expecting(timesteps)`"
            )
        return next(self._numbers), None

    def _orphaned(self, number: int) -> None:
        """The tensor of a prompt is gone: so are the values, if nothing says that another one comes."""
        generation = self._known.get(number)
        if generation is not None and generation.loop in (None, ENDED) and generation.orphaned:
            generation.values.clear()
            generation.lineage = Lineage()

    def _forget_orphans(self, loop: object | None) -> None:
        """Forget the generations of this thread that no call can continue, when another one begins in `loop`."""
        for number, generation in list(self._known.items()):
            continued = loop is not None and generation.loop is loop and not generation.over
            if generation.thread == threading.get_ident() and generation.orphaned and not continued:
                self._known.pop(number, None)

    def _position(self, timestep: torch.Tensor) -> CallPosition | None:
        """Where a call stands; None if its samples stand at different places."""
        for source in self.position_sources:
            position = source.read(timestep)
            if position is not None:
                return position
        first, *others = timestep.reshape(-1).tolist()
        if any(other != first for other in others):
            return None
        run, loop = self._expectation
        return CallPosition(float(first), None, run, loop)

    @property
    def _expectation(self) -> tuple[SamplingRun, object | None]:
        """The run that this thread expects, and the block that says so."""
        return getattr(self._expected, "run", (SamplingRun(), None))

    def say(self, warning: str) -> None:
        """Log a warning, once for each of its kind."""
        if warning not in self._said:
            self._said.add(warning)
            log.warning("%s", warning)

    @contextmanager
    def expecting(self, run: SamplingRun) -> Iterator[None]:
        """Generations that begin inside, in this thread, make the calls of `run`."""
        before = self._expectation
        self._expected.run = run, object()
        try:
            yield
        finally:
            self.end(self._expectation[1])
            self._expected.run = before

    def end(self, loop: object) -> None:
        """The loop is over: the values of its generations go with the tensors of their prompts."""
        for number, generation in list(self._known.items()):
            if generation.loop is loop:
                generation.loop = ENDED
                self._orphaned(number)

    def clear(self) -> None:
        self._known.clear()

    def bytes(self) -> int:
        """Of all features that are kept, without the latents and prompts by which calls are recognised."""
        kept = (value for g in list(self._known.values()) for each in g.values.values() for _, value in each)
        return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept}.values())


def arithmetic(device: str) -> tuple[object, ...]:
    """Return the settings of arithmetic of PyTorch on a kind of device: the dtype of autocasting, precisions."""
    return autocast_dtype(device), torch.get_float32_matmul_precision(), torch.get_default_dtype()


def apart(values: Mapping[str, torch.Tensor], others: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values, as copies where they share memory with others, which somebody else may edit."""
    taken = {other.untyped_storage().data_ptr() for other in others}
    return {n: v.clone() if v.untyped_storage().data_ptr() in taken else v for n, v in values.items()}
