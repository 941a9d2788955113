"""`attach`: tie the counting of calls to a pipeline's scheduler."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Self

import torch

from .errors import ModeError
from .generation import Generations, Moment
from .schedules import Run


def attach(pipe: Any) -> Attachment:
    """Let a pipeline's UNet read from the pipeline's scheduler which call of how many it is at.

    Not needed for right images, but with it schedules know the number of calls and their timesteps, nothing is read
    back from the GPU between calls, a call that does not follow the one before is recognised as such whatever its
    timestep, and what was kept is freed after the last call.

    Args:
        pipe: a diffusers pipeline whose `unet` sdgraph made. It may change its scheduler later. It is not kept alive.
    Returns:
        an `Attachment`; `detach()` it, or use it in a `with`.
    Raises:
        ModeError: the pipeline has no scheduler, or its UNet inherits nothing.
    """
    unet = getattr(pipe, "unet", None)
    generations = getattr(getattr(unet, "_orig_mod", unet), "generations", None)
    if not isinstance(generations, Generations):
        found = "no unet" if unet is None else f"a {type(unet).__name__} as its unet"
        raise ModeError(f"the pipeline has {found}", where="attach", cure="pipe.unet = sdgraph.apply(pipe.unet, ...)")
    if not hasattr(pipe, "scheduler"):
        raise ModeError("the pipeline has no scheduler", where="attach", cure="use `with unet.expecting(timesteps)`")
    return Attachment(pipe, generations)


class Attachment:
    """A pipeline's scheduler as the clock of its UNet's generations.

    Pipelines call the UNet with views of `scheduler.timesteps`, so the place of a timestep in memory says which call
    this is, without its value being read.
    """

    def __init__(self, pipe: Any, generations: Generations) -> None:
        self._pipe, self._generations = weakref.ref(pipe, self._forget), generations
        self._timesteps = torch.empty(0)  # kept, so that no other tensor gets its memory
        self._values: list[float] = []
        self._first = 0
        self._run = Run()
        generations.clocks.append(self)

    def read(self, timestep: torch.Tensor) -> Moment | None:
        pipe = self._pipe()
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or timestep.numel() != 1 or timesteps.numel() == 0:
            return None
        if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
            return None
        index = (timestep.storage_offset() - timesteps.storage_offset()) // (timesteps.stride(0) or 1)
        if not 0 <= index < len(timesteps):
            return None
        if timesteps is not self._timesteps:
            self._timesteps, self._values = timesteps, [float(value) for value in timesteps.tolist()]
            self._begin(index, getattr(pipe, "_num_timesteps", None))
        elif index < self._first:
            self._begin(index, None)
        return Moment(self._values[index], index - self._first, self._run)

    def _begin(self, first: int, count: int | None) -> None:
        """A run begins at the timestep `first`; image-to-image leaves out some, and SDXL's `denoising_end` others."""
        last = len(self._values) if count is None or first + count > len(self._values) else first + count
        self._first, self._run = first, Run(last - first, tuple(self._values[first:last]))

    def detach(self) -> None:
        """Calls are counted as they come again."""
        self._forget(None)

    def _forget(self, _: object) -> None:
        if self in self._generations.clocks:
            self._generations.clocks.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()
