"""The position of a call in its sampling run, and who says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..schedules import SamplingRun


@dataclass(frozen=True)
class CallPosition:
    """The position of a call in its sampling run.

    Args:
        timestep: the timestep of the call.
        number: the number of the call in its run, from 0; None if it is unknown, then calls are counted.
        run: the sampling run; the same object for all its calls.
        loop: the object that vouches that the calls of a generation come in order, an attached scheduler's timesteps or
            an `expecting` block; None if nothing does.
    """

    timestep: float
    number: int | None
    run: SamplingRun
    loop: object | None = None


class PositionSource:
    """The base of all that knows the positions of calls: an attached scheduler, or what a loop expects."""

    def read(self, timestep: torch.Tensor) -> CallPosition | None:
        """Return the position of a call; None if it is not a call of this source.

        Args:
            timestep: the timestep of the call, (1,) or (B,).
        """
        raise NotImplementedError(f"{type(self).__name__}.read")


class Expectation(PositionSource):
    """The sampling run that a loop expects; its calls are counted.

    Args:
        run: the sampling run, as far as it is known.
        loop: the object that vouches for the order of the calls; None if nothing does.
    """

    def __init__(self, run: SamplingRun, loop: object | None = None) -> None:
        self.run, self.loop = run, loop

    def read(self, timestep: torch.Tensor) -> CallPosition | None:
        """Return the position of a call; None if its samples have different timesteps.

        Args:
            timestep: the timestep of the call, (1,) or (B,). Reading it makes the host wait for a GPU.
        """
        first, *others = timestep.reshape(-1).tolist()
        if any(other != first for other in others):
            return None
        return CallPosition(float(first), None, self.run, self.loop)
