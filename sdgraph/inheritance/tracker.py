"""The generation that a call continues, for every backend.

A generation is the way of one batch of samples from noise to images. Pipelines hand the same conditioning tensors to
all its calls. A call continues the last generation with these tensors if it is the next one by the caller's own account
(an attached scheduler, `expecting`) or, without such an account, if its latents follow from the calls before. Whatever
is in doubt is computed, so that no feature ever comes from another prompt or image.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..ir.guards import autocast_dtype
from ..schedules import SamplingRun
from .cache import FeatureCache, Turn, Turns, apart, no_value
from .history import ConditioningSnapshot, LatentHistory
from .position import CallPosition, Expectation, PositionSource

log = logging.getLogger("sdgraph")

PROMPT = "encoder_hidden_states"
ENDED = object()  # the loop of generations whose `expecting` block is over
SHARED = (
    "a generation began with the prompt of another one that is not over, in the same loop: it is unknown whose calls "
    "are whose, and nothing is inherited. Call unet.reset() after an interrupted generation, give samples that take "
    "turns separate prompts, and pass the timesteps to `expecting` if they rise"
)

Flat = Mapping[str, torch.Tensor]


@dataclass
class Generation:
    """The calls so far of one generation, by which its next call is recognised, and its feature cache.

    Args:
        signature: the names, shapes, dtypes and devices of its inputs.
        conditioning: the tensors that its calls have in common, the prompt first.
        loop: the object that vouches for the order of its calls.
        cache: the values that later calls may reuse, and the number of the next call.
        timestep: the timestep of the last call.
        thread: the thread that its calls come from.
        calls: the number of calls so far.
        latents: its last latents and predictions, where nothing vouches for the order.
        computed_with: the backend's weights and PyTorch's arithmetic that the values were computed with.
    """

    signature: tuple[object, ...]
    conditioning: tuple[ConditioningSnapshot, ...]
    loop: object | None
    cache: FeatureCache
    timestep: float
    thread: int = field(default_factory=threading.get_ident)
    calls: int = 0
    latents: LatentHistory = field(default_factory=LatentHistory)
    computed_with: object = None

    def continues(
        self,
        signature: tuple[object, ...],
        conditioning: Collection[torch.Tensor],
        position: CallPosition,
        sample: torch.Tensor,
    ) -> bool:
        """Whether a call can be the next one.

        Args:
            signature: the signature of the call.
            conditioning: the conditioning tensors of the call, the prompt first.
            position: the position of the call.
            sample: the latents of the call, (B, C, H, W).
        """
        if position.loop is not self.loop or self.cache.over or not self.has(signature, conditioning):
            return False
        if position.number is not None:
            return position.run is self.cache.run and position.number == self.cache.number
        timesteps = self.cache.run.timesteps if self.loop is not None else None
        if timesteps is not None and timesteps[self.cache.number] == position.timestep:
            return True
        if self._is_back(position.timestep):
            return False
        again = position.timestep == self.timestep  # as PNDM, Heun and DPM2 have it
        if self.loop is None:
            return self.latents.leads_to(sample) and not (again and self.latents.repeats(sample))
        return not again or (self.calls > 1 and timesteps is None)

    def _is_back(self, timestep: float) -> bool:
        """Whether a timestep lies before that of the last call. Timesteps fall, or rise where a run says so."""
        timesteps = self.cache.run.timesteps
        rising = self.loop is not None and timesteps is not None and timesteps[-1] > timesteps[0]
        return timestep < self.timestep if rising else timestep > self.timestep

    @property
    def orphaned(self) -> bool:
        """Whether the tensor of the prompt is gone, so that only a tensor with its contents can continue."""
        return not self.conditioning[0].exists

    def has(self, signature: tuple[object, ...], conditioning: Collection[torch.Tensor]) -> bool:
        """Whether a call has inputs of the same shapes and dtypes, and the same conditioning.

        Args:
            signature: the signature of the call.
            conditioning: the conditioning tensors of the call, the prompt first.
        """
        return signature == self.signature and all(
            then.still_is(now) for then, now in zip(self.conditioning, conditioning, strict=True)
        )

    def restarts(self, position: CallPosition) -> bool:
        """Whether a call that does not continue this generation starts another one in the same loop, before the end of
        this one: then this one may be taken up again.

        Args:
            position: the position of the call.
        """
        if self.loop is None or position.loop is not self.loop:
            return False
        back = (
            position.timestep == self.timestep or self._is_back(position.timestep)
            if position.number is None
            else position.number < self.cache.number
        )
        return self.cache.shared or (back and not self.cache.over)

    def might_go_on(self, position: CallPosition) -> bool:
        """Whether the timestep of a call is one that could follow, as that of another image is not.

        Args:
            position: the position of the call.
        """
        return position.timestep < self.timestep or (self.calls == 1 and position.timestep != self.timestep)

    def begin(self, conditioning: Iterable[torch.Tensor], position: CallPosition, computed_with: object) -> None:
        """Begin a call. The values are forgotten if they were computed with anything else than it is.

        Args:
            conditioning: the conditioning tensors of the call, the prompt first.
            position: the position of the call.
            computed_with: the weights and the arithmetic that compute the call.
        """
        for constant, tensor in zip(self.conditioning, conditioning, strict=True):
            constant.follow(tensor)
        if computed_with != self.computed_with:
            self.cache.clear()
            self.computed_with = computed_with
        self.timestep = position.timestep

    def forget(self) -> None:
        """Drop values and latents, because no call can continue."""
        self.cache.clear()
        self.latents = LatentHistory()


class GenerationTracker:
    """The generations of one UNet, each with its own feature cache; a thread sees its own only."""

    def __init__(self) -> None:
        self._known: dict[int, Generation] = {}
        self._numbers = itertools.count()
        self._expected = threading.local()
        self._warned: set[str] = set()
        self.position_sources: list[PositionSource] = []

    def run(
        self,
        flat: Flat,
        constant: Collection[str],
        turns: Turns,
        weights: Callable[[bool], object] = lambda waits: None,
    ) -> torch.Tensor:
        """Compute the next call of the generation that it belongs to.

        Args:
            flat: the inputs of the call, by name.
            constant: the names of those inputs that a generation keeps.
            turns: the function that returns the UNet which computes the call.
            weights: the function that returns another object after any change of what a backend computes with. Its
                argument says whether the host may wait for an accelerator.
        Returns:
            the output of the call.
        """
        with self._call(flat, constant, turns, weights) as (turn, generation):
            if generation is None:
                output: torch.Tensor = turn.backend.compute(flat, frozenset(), no_value)[0]
                return output
            cache = generation.cache
            output, computed = turn.backend.compute(flat, cache.reused(generation.timestep), cache.read)
            cache.write(apart(computed, (*flat.values(), output)))
            if generation.loop is None and not cache.shared:
                generation.latents.add(flat["sample"], output)
            return apart({"output": output}, cache.kept())["output"]

    @contextmanager
    def _call(
        self, flat: Flat, constant: Collection[str], turns: Turns, weights: Callable[[bool], object]
    ) -> Iterator[tuple[Turn, Generation | None]]:
        """The turn of a call and the generation that it belongs to, for the duration of that call; None if its samples
        are at different places. If the call fails, the generation is over: the next call computes everything.
        """
        prompt, position = flat[PROMPT], self.position(flat["timestep"])
        conditioning = [prompt, *(flat[name] for name in constant if name in flat and name != PROMPT)]
        signature = tuple((name, v.shape, v.dtype, v.device) for name, v in flat.items())
        key, generation = self._find(signature, conditioning, position)
        if position is None:
            self._known.pop(key, None)
            self.warn("the samples of a batch have different timesteps: such calls inherit nothing")
            yield turns(None, None, SamplingRun()), None
            return
        waits = position.loop is None
        computed_with = weights(waits), arithmetic(prompt.device.type)
        begins = generation is None or not generation.continues(signature, conditioning, position, flat["sample"])
        number = position.number or 0 if begins or generation is None else generation.cache.number
        turn = turns(None if position.loop is None else number, position.timestep, position.run)
        if begins or generation is None:
            before, generation = generation, self._begun(signature, conditioning, position, turn, generation)
            # Where contents of weights were not looked at, nothing is known of edits that PyTorch does not count.
            certain = waits or prompt.device.type == "cpu"
            if before is not None and certain and before.has(signature, conditioning):
                generation.computed_with = before.computed_with
                generation.cache.take_over(before.cache)
            self._forget_orphans(position.loop)
            self._known[key] = generation
            weakref.finalize(prompt, self._orphaned, key)
        elif not generation.conditioning[0].is_very(prompt):
            weakref.finalize(prompt, self._orphaned, key)
        generation.begin(conditioning, position, computed_with)
        if turn.member != generation.cache.member:
            generation.cache = generation.cache.turned(turn)
            self._doubt(turn, position.run)
        try:
            yield turn, generation
        except BaseException:
            self._known.pop(key, None)
            raise
        generation.cache.advance()
        generation.calls += 1

    def _begun(
        self,
        signature: tuple[object, ...],
        conditioning: Sequence[torch.Tensor],
        position: CallPosition,
        turn: Turn,
        before: Generation | None,
    ) -> Generation:
        """Return the generation that begins with a call, in the place of one that the call does not continue."""
        cache = FeatureCache(turn.backend.sites, position.run, position.number or 0, turn.member)
        if before is not None and before.restarts(position):
            cache.share()
            self.warn(SHARED)
        elif before is not None and position.loop is None and before.might_go_on(position):
            self.warn(
                "the latents of a call do not follow from the calls before (a sampler with random steps, rising "
                "timesteps, another image, or edited latents), so it inherits nothing. Tell the UNet how calls are "
                "made: sdgraph.attach(pipe), or `with unet.expecting(timesteps)` in a loop of your own"
            )
        self._doubt(turn, position.run)
        constants = tuple(ConditioningSnapshot(tensor, waits=position.loop is None) for tensor in conditioning)
        return Generation(signature, constants, position.loop, cache, position.timestep)

    def _doubt(self, turn: Turn, run: SamplingRun) -> None:
        """Warn of forecasts that do not fit a run."""
        for forecast in {site.forecast for site in turn.backend.sites.values()}:
            if doubt := forecast.doubt(run):
                self.warn(doubt)

    def _find(
        self, signature: tuple[object, ...], conditioning: Sequence[torch.Tensor], position: CallPosition | None
    ) -> tuple[int, Generation | None]:
        """Return the generation with the prompt of a call, and its number.

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
            and not generation.cache.over
            and generation.has(signature, conditioning)
        ]
        orphaned = [(number, generation) for number, generation in equal if generation.orphaned]
        if orphaned and orphaned[0][1].loop is not None:
            if len(equal) > 1:
                for _, generation in orphaned:
                    generation.cache.share()
                self.warn(SHARED)
            return orphaned[0]
        if any(g.calls == 1 and position is not None and g.timestep != position.timestep for _, g in equal):
            self.warn(
                "the tensor of the prompt is made anew at every call, so calls inherit nothing. Pass the same tensor "
                "to all calls of a generation; or tell the UNet which calls belong together, and keep no such tensors: "
                "sdgraph.attach(pipe), or `with unet.expecting(timesteps)`"
            )
        return next(self._numbers), None

    def _orphaned(self, number: int) -> None:
        """Forget the values of a generation whose tensor of the prompt is gone, if nothing says that another comes."""
        generation = self._known.get(number)
        if generation is not None and generation.loop in (None, ENDED) and generation.orphaned:
            generation.forget()

    def _forget_orphans(self, loop: object | None) -> None:
        """Forget the generations of this thread that no call can continue, when another one begins in `loop`."""
        for number, generation in list(self._known.items()):
            continued = loop is not None and generation.loop is loop and not generation.cache.over
            if generation.thread == threading.get_ident() and generation.orphaned and not continued:
                self._known.pop(number, None)

    def position(self, timestep: torch.Tensor) -> CallPosition | None:
        """Return the position of a call; None if its samples are at different places.

        Args:
            timestep: the timestep of the call, (1,) or (B,).
        """
        for source in self.position_sources:
            position = source.read(timestep)
            if position is not None:
                return position
        return self._expectation.read(timestep)

    @property
    def expects(self) -> bool:
        """Whether an `expecting` block counts the calls of this thread."""
        return self._expectation is not UNKNOWN

    @property
    def _expectation(self) -> Expectation:
        """The run that this thread expects."""
        expected: Expectation = getattr(self._expected, "run", UNKNOWN)
        return expected

    def warn(self, warning: str) -> None:
        """Log a warning, once.

        Args:
            warning: the text.
        """
        if warning not in self._warned:
            self._warned.add(warning)
            log.warning("%s", warning)

    @contextmanager
    def expecting(self, run: SamplingRun) -> Iterator[None]:
        """A context in which the generations that begin, in this thread, make the calls of a run.

        Args:
            run: the sampling run.
        """
        before = self._expectation
        self._expected.run = expected = Expectation(run, object())
        try:
            yield
        finally:
            self.end(expected.loop)
            self._expected.run = before

    def end(self, loop: object) -> None:
        """End a loop: the values of its generations go with the tensors of their prompts.

        Args:
            loop: the object that vouched for the order of the calls.
        """
        for number, generation in list(self._known.items()):
            if generation.loop is loop:
                generation.loop = ENDED
                self._orphaned(number)

    def clear(self) -> None:
        """Forget all generations."""
        self._known.clear()

    def bytes(self) -> int:
        """Return the bytes of all features that are kept, without the latents and prompts that identify calls."""
        kept = (value for generation in list(self._known.values()) for value in generation.cache.kept())
        return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept}.values())


UNKNOWN = Expectation(SamplingRun())


def arithmetic(device: str) -> tuple[object, ...]:
    """Return the settings of PyTorch's arithmetic on a kind of device: the dtype of autocasting, precisions.

    Args:
        device: the type of the device, such as "cuda".
    """
    return autocast_dtype(device), torch.get_float32_matmul_precision(), torch.get_default_dtype()
