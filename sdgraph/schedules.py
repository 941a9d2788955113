"""Schedules: at which calls of a generation a site of feature inheritance is computed anew.

A call is one call of the UNet; a scheduler of the second order makes two per step. The first call of a generation
always refreshes. Schedules are specs: they print as text, parse back, and are saved with the passes that hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Any, ClassVar

import numpy as np

from .errors import ScheduleError, SdgraphError
from .options import Bounds, Count, Index, Number, checked
from .solvers import is_random, lambdas_of, name_of
from .spec import Spec

TRAINED = 1000  # timesteps of the noise that Stable Diffusion is trained with
MOST = 100_000  # calls of a generation
Steps = Annotated[int, Bounds(ge=1, le=MOST)]


@dataclass(frozen=True)
class Run:
    """What is known of a generation.

    Args:
        calls: how many calls it will make; None if nobody said.
        timesteps: of those calls, in order; None if nobody said.
        lambdas: log(alpha / sigma) at those calls; None if nobody knows.
        solver: what makes the calls, as text; empty if nobody said.
        random: the solver adds random numbers between calls.
    """

    calls: int | None = None
    timesteps: tuple[float, ...] | None = None
    lambdas: tuple[float, ...] | None = None
    solver: str = ""
    random: bool = False

    @classmethod
    def of(cls, calls: Any, part: slice = slice(None)) -> Run:
        """Return the run of a number of calls, of their timesteps, or of a diffusers scheduler.

        Args:
            calls: the number of calls, their timesteps, or a scheduler after `set_timesteps`, of which noise levels and
                solver are known too.
            part: the part of a scheduler's timesteps that is run, as image-to-image begins later.
        Raises:
            ScheduleError: it is none of these, or there are no calls.
        """
        hint = "a number of calls, their timesteps, or a diffusers scheduler after set_timesteps"
        if isinstance(calls, int) and not isinstance(calls, bool):
            if not 1 <= calls <= MOST:
                what = "a generation without calls" if calls < 1 else f"a generation of more than {MOST} calls"
                raise ScheduleError(what, where=f"calls={calls}", hint=hint)
            return cls(calls)
        try:
            timesteps = _floats(None if isinstance(calls, str | bytes) else getattr(calls, "timesteps", calls))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ScheduleError(f"{calls!r} says nothing about calls", where="calls", hint=hint) from error
        if not timesteps or not all(map(isfinite, timesteps)):
            raise ScheduleError("a generation without calls", where=f"calls={calls!r}"[:80], hint=hint)
        if not hasattr(calls, "timesteps"):
            return cls(len(timesteps), timesteps)
        timesteps = timesteps[part]
        return cls(len(timesteps), timesteps, lambdas_of(calls, timesteps, part), name_of(calls), is_random(calls))

    def supposed(self) -> Run:
        """Return the run with the timesteps that it will have, as far as anybody can say beforehand.

        Where nobody gave any, they are those of the schedulers that Stable Diffusion is published with: evenly spaced
        over the training timesteps, the last one 1 ("leading", with an offset of 1).
        """
        if self.timesteps is not None or not self.calls:
            return self
        between = TRAINED // self.calls or TRAINED / self.calls
        return replace(self, timesteps=tuple(1.0 + between * left for left in reversed(range(self.calls))))


def _floats(timesteps: Any) -> tuple[float, ...]:
    """Read timesteps at once: one by one, a tensor on a GPU would make the host wait for every number."""
    return tuple(map(float, timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps))


@dataclass(frozen=True)
class Schedule(Spec):
    """Base of all schedules. Subclass it as a frozen dataclass and define `refreshes`."""

    refusal: ClassVar[type[SdgraphError]] = ScheduleError

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        """Whether the site is computed anew at call number `call` (0 is the first, and always is).

        Args:
            timestep: of this call.
            run: what is known of the generation.
        Raises:
            ScheduleError: the schedule needs to know more of the run than is known.
        """
        raise NotImplementedError(f"{type(self).__name__}.refreshes")

    @checked(ScheduleError)
    def calls(self, run: Run) -> tuple[int, ...]:
        """All refreshing calls of a run, see `Run.supposed`."""
        _known(run.calls if run.timesteps is None else run.timesteps, self)
        timesteps = run.supposed().timesteps or ()
        return tuple(i for i, t in enumerate(timesteps) if i == 0 or self.refreshes(i, t, run))


def _known(value: Any, schedule: Schedule) -> Any:
    if value is None:
        raise ScheduleError(
            "this schedule needs to know the calls of the generation", where=str(schedule),
            hint="tell them: `with unet.expecting(timesteps)`; or Uniform, Explicit or Gate, which need not know",
        )  # fmt: skip
    return value


@dataclass(frozen=True)
class Uniform(Schedule):
    """Every `interval`-th call, from the first: DeepCache's N."""

    interval: Count

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        return call % self.interval == 0


@dataclass(frozen=True)
class Explicit(Schedule):
    """These calls, by number, in any order; the first one, 0, among them. Those that a shorter generation does not have
    never come.

    Args:
        steps: the refreshing calls.
        of: how many calls the generation must have for the list to make sense; None is any number. It is checked where
            the number is known, see `sdgraph.attach`.
    """

    steps: Annotated[tuple[Index, ...], Bounds(length=1)]
    of: Count | None = None

    def __post_init__(self) -> None:
        steps = tuple(sorted(set(self.steps)))
        if steps[0] != 0:
            raise ScheduleError(
                f"{steps} does not refresh at the first call",
                where=str(self),
                hint="begin with 0: there is nothing to inherit",
            )
        if self.of is not None and steps[-1] >= self.of:
            raise ScheduleError(f"call {steps[-1]} is not one of {self.of}", where=str(self), hint="count from 0")
        object.__setattr__(self, "steps", steps)

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        if self.of is not None and run.calls is not None and run.calls != self.of:
            raise ScheduleError(
                f"made for {self.of} calls, this generation has {run.calls}",
                where=str(self),
                hint="another schedule, or of=None",
            )
        return call in self.steps


@dataclass(frozen=True)
class _Dense(Schedule):
    """As many refreshes as `Uniform(interval)` has, dense somewhere.

    `power` is the larger, the denser. It is lowered in steps of 0.02 until the calls are distinct, which is
    DeepCache's rule (Ma et al., 2023).
    """

    interval: Count
    power: Annotated[float, Bounds(gt=1, le=100)] = 1.4  # lowered in small steps, which from 1e17 on would never end

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        return call in self._chosen(_known(run.calls, self))

    def _chosen(self, calls: int) -> tuple[int, ...]:
        count, power = -(-calls // self.interval), self.power
        while power > 1:
            chosen = self._spaced(calls, count, power)
            if len(set(chosen)) == count:
                return chosen
            power -= 0.02
        raise ScheduleError(
            f"no {count} distinct calls of {calls}", where=str(self), hint="a larger interval, or Uniform(interval)"
        )

    def _spaced(self, calls: int, count: int, power: float) -> tuple[int, ...]:
        raise NotImplementedError


@dataclass(frozen=True)
class DenseEarly(_Dense):
    """Dense at the beginning: calls T·(k/n)^power."""

    def _spaced(self, calls: int, count: int, power: float) -> tuple[int, ...]:
        return tuple(int(calls * (k / count) ** power) for k in range(count))


@dataclass(frozen=True)
class DenseLate(_Dense):
    """Dense at the end: calls T·(1 - (1 - k/n)^power)."""

    def _spaced(self, calls: int, count: int, power: float) -> tuple[int, ...]:
        return tuple(int(calls * (1 - (1 - k / count) ** power)) for k in range(count))


@dataclass(frozen=True)
class DenseCenter(_Dense):
    """Dense around the call `center`: DeepCache's quadratic schedule, with its published values.

    Equal steps between the roots of -center and T - center, raised to `power` again. The root of a negative number is
    complex and only the real part is taken at the end, as in DeepCache's code: its values come from that.
    """

    center: Count = 15

    def _spaced(self, calls: int, count: int, power: float) -> tuple[int, ...]:
        if self.center >= calls:
            raise ScheduleError(
                f"the center {self.center} is not one of {calls} calls", where=str(self), hint="a smaller center"
            )
        ends = complex(-self.center) ** (1 / power), complex(calls - self.center) ** (1 / power)
        offsets = np.unique((np.linspace(*ends, count + 1) ** power).real.astype(int))
        return (0, *(int(offset) + self.center for offset in offsets[1:-1]))


@dataclass(frozen=True)
class Gate(Schedule):
    """`before` until call number `call`, which refreshes; then `after`, or never again: T-GATE's rule."""

    call: Count
    before: Schedule = Uniform(1)
    after: Schedule | None = None

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        if call < self.call:
            return self.before.refreshes(call, timestep, run)
        return call == self.call or (self.after is not None and self.after.refreshes(call, timestep, run))


@dataclass(frozen=True)
class Range(Schedule):
    """`within` for timesteps between `low` and `high` (both outside); every call refreshes elsewhere.

    Pyramid attention broadcast's rule (Zhao et al., 2024), as in diffusers.
    """

    low: Number
    high: Number
    within: Schedule = Uniform(2)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ScheduleError(
                f"no timestep lies between {self.low} and {self.high}", where="Range", hint="the smaller one first"
            )

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        return not self.low < timestep < self.high or self.within.refreshes(call, timestep, run)


@dataclass(frozen=True)
class Once(Schedule):
    """The first call only: for what stays the same all the way."""

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        return False


@dataclass(frozen=True)
class Warm(Schedule):
    """`then`, but every one of the `first` calls refreshes, and every one of the `last`: warm-up and tail."""

    then: Schedule
    first: Index = 1
    last: Index = 0

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        if call < self.first or (self.last and call >= _known(run.calls, self) - self.last):
            return True
        return self.then.refreshes(call, timestep, run)


@dataclass(frozen=True)
class Drift(Schedule):
    """Refresh as often as the features drift: a refresh compares what was expected of a site with what it is.

    The relative error (L2) of the value that the site would have inherited is measured at each refresh; it is one
    number that the host reads from the device, and costs nothing else. Above `bound` the gap to the next refresh
    becomes a call shorter, below half of it a call longer. Sites with the same schedule refresh together, by the
    largest of their errors. The rule is that of the hold-out test of ComfyUI-Spectrum-SDXL-Proper, made gradual.

    Args:
        bound: the largest relative error (L2) at which the gap does not shrink.
        least: the fewest calls from a refresh to the next, with which a generation begins.
        most: the most calls from a refresh to the next.
    """

    bound: Annotated[float, Bounds(gt=0, lt=10)] = 0.1
    least: Count = 1
    most: Count = 4

    def __post_init__(self) -> None:
        if self.most < self.least:
            raise ScheduleError(f"most is {self.most}", where=str(self), hint=f"at least {self.least}, which least is")

    def next_gap(self, gap: int, error: float) -> int:
        """Calls from a refresh to the next, after one at which the error was measured."""
        if error != error or error > self.bound:  # a nan says nothing good
            return max(gap - 1, self.least)
        return min(gap + 1, self.most) if error < self.bound / 2 else gap

    def refreshes(self, call: int, timestep: float, run: Run) -> bool:
        return call % self.least == 0  # where nothing is measured, such as in a timetable
