"""Which call of which generation this is, and what it may inherit. One place for every backend.

A generation is what one prompt embedding goes through: pipelines hand the same tensor object to every call. A call
belongs to the same generation as the one before with that object if nothing says otherwise; whatever is in doubt begins
a new one, whose first call refreshes everything. So no feature ever comes from another prompt or image.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .schedules import Run, Schedule

Values = dict[str, torch.Tensor]


@dataclass
class Generation:
    """The calls so far of one generation, and the values that later ones may inherit.

    Args:
        signature: of the first call: inputs, shapes, dtypes, devices, and the version of the prompt embedding.
    """

    signature: tuple[object, ...]
    run: Run = field(default_factory=Run)
    calls: int = 0
    timestep: float = 0.0
    values: Values = field(default_factory=dict)

    def continues(self, signature: tuple[object, ...], timestep: float) -> bool:
        """Whether a call with this signature and timestep may be the next one.

        Timesteps fall during a generation. Some schedulers repeat one (PNDM its second, Heun every one but the first),
        none its first; a generation of a single step, however, is followed by the same timestep.
        """
        if signature != self.signature or timestep > self.timestep:
            return False
        return timestep < self.timestep or self.calls > 1


class Generations:
    """The generations of one UNet, each with its own values; a thread sees its own only."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Generation] = {}
        self._run = threading.local()

    @contextmanager
    def call(self, flat: Mapping[str, torch.Tensor]) -> Iterator[Generation]:
        """The generation that a call with the inputs `flat` belongs to, for the duration of that call.

        If the call fails, the generation is over: the next call refreshes everything.
        """
        prompt = flat["encoder_hidden_states"]
        timestep = float(flat["timestep"].reshape(-1)[0])
        version = None if prompt.is_inference() else prompt._version  # an edit in place is another prompt
        signature = (version, *((name, v.shape, v.dtype, v.device) for name, v in flat.items()))
        key = threading.get_ident(), id(prompt)
        generation = self._known.get(key)
        if generation is None or not generation.continues(signature, timestep):
            if generation is None:
                weakref.finalize(prompt, self._known.pop, key, None)  # the values go when the prompt does
            generation = self._known[key] = Generation(signature, getattr(self._run, "now", Run()))
        generation.timestep = timestep
        try:
            yield generation
        except BaseException:
            self._known.pop(key, None)
            raise
        generation.calls += 1

    @contextmanager
    def expecting(self, run: Run) -> Iterator[None]:
        """Generations that begin inside, in this thread, make the calls of `run`."""
        before = getattr(self._run, "now", Run())
        self._run.now = run
        try:
            yield
        finally:
            self._run.now = before

    def clear(self) -> None:
        self._known.clear()

    def bytes(self) -> int:
        """Of all values that are kept."""
        storages = {
            v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for g in self._all() for v in g.values()
        }
        return sum(storages.values())

    def _all(self) -> list[Values]:
        return [generation.values for generation in list(self._known.values())]


def stale(schedules: Mapping[str, Schedule], generation: Generation) -> frozenset[str]:
    """The sites that the next call of a generation inherits."""
    if generation.calls == 0:
        return frozenset()
    return frozenset(
        site
        for site, schedule in schedules.items()
        if not schedule.refreshes(generation.calls, generation.timestep, generation.run)
    )
