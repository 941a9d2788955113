"""`attach`: tie the counting of calls to a pipeline's scheduler."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from ..errors import ModeError
from ..schedules import SamplingRun
from .position import CallPosition, PositionSource
from .tracker import GenerationTracker

# Pipelines of diffusers that exchange processors or hook blocks while they run, and what for. Those of perturbed
# attention are known by an attribute.
EXCHANGING = {
    "StableDiffusionSAGPipeline": "self-attention guidance",
    "StableDiffusionAttendAndExcitePipeline": "attend-and-excite",
    "StableDiffusionPix2PixZeroPipeline": "pix2pix-zero",
    "LEditsPPPipelineStableDiffusion": "LEdits++",
    "LEditsPPPipelineStableDiffusionXL": "LEdits++",
    "TextToVideoZeroPipeline": "attention across frames",
    "TextToVideoZeroSDXLPipeline": "attention across frames",
}


def attach(pipe: Any) -> Attachment:
    """Let a pipeline's UNet read from the pipeline's scheduler which call of how many it is at.

    Not needed for right images, but with it schedules know the number of calls and their timesteps, nothing is read
    back from the GPU between calls, samplers with random steps inherit too, a call that does not follow the one before
    is recognised as such whatever its timestep, and what was kept is freed after the last call.

    One batch of samples goes through the scheduler at a time, as schedulers themselves require. On an accelerator an
    edit of the prompt or of weights during a generation is noticed if PyTorch counts it: not one through `.data`.

    Args:
        pipe: a diffusers pipeline whose `unet` sdgraph made. It may change its scheduler later. It is not kept alive.
    Returns:
        an `Attachment`; `detach()` it, or use it in a `with`.
    Raises:
        ModeError: the pipeline has no scheduler, its UNet inherits nothing, it exchanges attention processors, as
            perturbed and self-attention guidance do, or it is of a class without weak references.
    Example:
        `with sdgraph.attach(pipe): image = pipe("a bowl of fruit").images[0]`
    """
    unet = getattr(pipe, "unet", None)
    tracker = getattr(getattr(unet, "_orig_mod", unet), "tracker", None)
    if not isinstance(tracker, GenerationTracker):
        found = "no unet" if unet is None else f"a {type(unet).__name__} as its unet"
        raise ModeError(f"the pipeline has {found}", where="attach", hint="pipe.unet = sdgraph.apply(pipe.unet, ...)")
    if not hasattr(pipe, "scheduler"):
        raise ModeError("the pipeline has no scheduler", where="attach", hint="use `with unet.expecting(timesteps)`")
    try:
        weakref.ref(pipe)
    except TypeError:
        what = f"a {type(pipe).__name__} cannot be attached: Python has no weak references to it"
        raise ModeError(what, where="attach", hint="pass a pipeline of diffusers, or an object of a class") from None
    names = {cls.__name__ for cls in type(pipe).__mro__}
    guidance = next((what for name, what in EXCHANGING.items() if name in names), None)
    if hasattr(pipe, "pag_applied_layers"):
        guidance = "perturbed-attention guidance"
    if guidance is not None:
        raise ModeError(
            f"{guidance} exchanges the processors of attention modules, which a graph does not have",
            where=type(pipe).__name__,
            hint="use the pipeline without it, or leave it the source UNet",
        )
    return Attachment(pipe, tracker)


def _is_one_element(timestep: torch.Tensor) -> bool:
    """Whether all samples have the same timestep: one number, or one expanded over the batch."""
    return timestep.numel() == 1 or not any(timestep.stride())


class Attachment(PositionSource):
    """A pipeline's scheduler as the source of the positions of its UNet's calls.

    Pipelines call the UNet with views of `scheduler.timesteps`, so the place of a timestep in memory says which call
    this is, without its value being read.
    """

    def __init__(self, pipe: Any, tracker: GenerationTracker) -> None:
        self._pipe, self._tracker = weakref.ref(pipe, self._forget), tracker
        self._timesteps = torch.empty(0)  # kept, so that no other tensor gets its memory
        self._values: list[float] = []
        self._first = self._end = 0
        self.run = SamplingRun()
        tracker.position_sources.append(self)

    def read(self, timestep: torch.Tensor) -> CallPosition | None:
        """Return the position of a call; None if it is not one of the pipeline's.

        Args:
            timestep: the timestep of the call, (1,) or (B,), a view of the scheduler's timesteps.
        """
        timesteps = self._scheduler_timesteps
        if not isinstance(timesteps, torch.Tensor) or not _is_one_element(timestep) or timesteps.numel() == 0:
            return None
        if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
            return None
        index = (timestep.storage_offset() - timesteps.storage_offset()) // (timesteps.stride(0) or 1)
        if not 0 <= index < len(timesteps):
            return None
        if timesteps is not self._timesteps:
            self._timesteps, self._values = timesteps, [float(value) for value in timesteps.tolist()]
            self._begin(index, self._calls())
        elif index < self._first or index >= self._end:  # not the calls that were foreseen
            self._begin(index, None)
        return CallPosition(self._values[index], index - self._first, self.run, timesteps)

    @property
    def guidance_scale(self) -> float | None:
        """The scale of classifier-free guidance in the pipeline's call; None if there is none, or another combination.

        The batch has the samples without a prompt first, and then the same ones with it.
        """
        pipe = self._pipe()
        if not getattr(pipe, "do_classifier_free_guidance", False) or hasattr(pipe, "image_guidance_scale"):
            return None
        return None if getattr(pipe, "guidance_rescale", 0.0) else float(pipe.guidance_scale)  # type: ignore[union-attr]

    @property
    def _scheduler_timesteps(self) -> object:
        return getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)

    def _calls(self) -> int | None:
        """Return the number of calls of a pipeline that stops before the last timestep; None if it does not.

        Pipelines may share a scheduler, and a loop of the user's own may use it, while each pipeline remembers its
        last run only. So the number counts where it is needed (SDXL's `denoising_end`), and if all pipelines agree.
        """
        sharing = {
            getattr(source._pipe(), "_num_timesteps", None)
            if getattr(source._pipe(), "_denoising_end", None) is not None
            else None
            for source in self._tracker.position_sources
            if isinstance(source, Attachment) and source._scheduler_timesteps is self._timesteps
        }
        return sharing.pop() if len(sharing) == 1 else None

    def _begin(self, first: int, count: int | None) -> None:
        """A run begins at the timestep `first`; image-to-image leaves out some, and SDXL's `denoising_end` others."""
        all_of_them = len(self._values)
        self._first, self._end = first, all_of_them if count is None else min(first + count, all_of_them)
        self.run = SamplingRun.of(self._pipe().scheduler, slice(first, self._end))  # type: ignore[union-attr]

    def detach(self) -> None:
        """Calls are counted as they come again."""
        self._forget(None)

    def _forget(self, _: object, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():  # Python clears the modules that this needs, so the check is bound beforehand
            return
        if self in self._tracker.position_sources:
            self._tracker.position_sources.remove(self)
            self._tracker.end(self._timesteps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()
