"""Schedules: the calls of a generation at which a site of feature inheritance is computed instead of reused.

A call is one call of the UNet; a scheduler of the second order makes two per step. The first call of a generation
always computes the site: a refresh. Schedules are specs: they print as text, parse back, and are saved with the passes
that hold them.

Member schedules name the UNet that computes each call, where several share a generation: see `sdgraph.switch`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Any, ClassVar

import numpy as np

from .errors import ScheduleError, SdgraphError
from .options import Bounds, Count, Finite, Index, Number, Share, checked
from .solvers import is_random, lambdas_of, name_of
from .spec import Spec

__all__ = [
    "ByCall",
    "ByShare",
    "ByTimestep",
    "DenseCenter",
    "DenseEarly",
    "DenseLate",
    "Drift",
    "Explicit",
    "Gate",
    "InTurns",
    "MemberSchedule",
    "Once",
    "PerCall",
    "Range",
    "SamplingRun",
    "Schedule",
    "Uniform",
    "Warm",
]


def __dir__() -> list[str]:
    return __all__


TRAINED = 1000  # the number of timesteps that Stable Diffusion is trained with
MOST = 100_000  # the largest number of calls of a generation
Steps = Annotated[int, Bounds(ge=1, le=MOST)]


@dataclass(frozen=True)
class SamplingRun:
    """The facts about a generation that are known before it ends.

    Args:
        calls: the number of calls; None if unknown.
        timesteps: the timesteps of the calls, in order; None if unknown.
        lambdas: log(alpha / sigma) at the calls; None if unknown.
        solver: the solver that makes the calls, as text; "" if unknown.
        random: whether the solver adds random numbers between calls.
    """

    calls: int | None = None
    timesteps: tuple[float, ...] | None = None
    lambdas: tuple[float, ...] | None = None
    solver: str = ""
    random: bool = False

    @classmethod
    def of(cls, calls: Any, part: slice = slice(None)) -> SamplingRun:
        """Return the run of a number of calls, of their timesteps, or of a diffusers scheduler.

        Args:
            calls: the number of calls, their timesteps, or a scheduler after `set_timesteps`, which also gives the
                noise levels and the solver.
            part: the slice of a scheduler's timesteps that is run; image-to-image begins later.
        Returns:
            The run.
        Raises:
            ScheduleError: `calls` is none of these, or there are no calls.
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

    def supposed(self) -> SamplingRun:
        """Return the run with supposed timesteps where they are unknown.

        They are those of the schedulers that Stable Diffusion is published with: evenly spaced over the training
        timesteps, the last one 1 ("leading", with an offset of 1).
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

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        """Return whether the site is computed at a call.

        Args:
            call: the number of the call, from 0; at call 0 every site is computed.
            timestep: the timestep of the call.
            run: the known facts about the generation.
        Raises:
            ScheduleError: the schedule needs facts that are unknown.
        """
        raise NotImplementedError(f"{type(self).__name__}.refreshes")

    @checked(ScheduleError)
    def calls(self, run: SamplingRun) -> tuple[int, ...]:
        """Return the numbers of all calls of a run that compute the site; unknown timesteps are supposed.

        Args:
            run: the known facts about the generation; the number of calls is one of them.
        Raises:
            ScheduleError: the number of calls is unknown.
        Example:
            `Uniform(3).calls(run)` is `(0, 3, 6, 9)` for a run of ten calls.
        """
        _known(run.calls if run.timesteps is None else run.timesteps, self)
        timesteps = run.supposed().timesteps or ()
        return tuple(i for i, t in enumerate(timesteps) if i == 0 or self.refreshes(i, t, run))


def _known(value: Any, schedule: Spec) -> Any:
    if value is None:
        raise ScheduleError(
            "this schedule needs to know the calls of the generation", where=str(schedule),
            hint="give them: sdgraph.attach(pipe), or `with unet.expecting(timesteps)`; not all schedules need them",
        )  # fmt: skip
    return value


@dataclass(frozen=True)
class Uniform(Schedule):
    """Refresh at every `interval`-th call, from the first.

    Args:
        interval: the number of calls from one refresh to the next, DeepCache's N.
    Source:
        DeepCache (Ma et al., 2023).
    """

    interval: Count

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        return call % self.interval == 0


@dataclass(frozen=True)
class Explicit(Schedule):
    """Refresh at the listed calls. Numbers beyond the last call of a generation are ignored.

    Args:
        steps: the numbers of the calls, counted from 0, in any order; 0 must be listed.
        of: the number of calls that the generation must have; None allows any. It is checked where the number is known,
            see `sdgraph.attach`.
    Raises:
        ScheduleError: 0 is not listed, or a number is not below `of`.
    Example:
        `Explicit((0, 3, 9), of=25)`
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

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        if self.of is not None and run.calls is not None and run.calls != self.of:
            raise ScheduleError(
                f"made for {self.of} calls, this generation has {run.calls}",
                where=str(self),
                hint="another schedule, or of=None",
            )
        return call in self.steps


@dataclass(frozen=True)
class _Dense(Schedule):
    """Base of schedules with as many refreshes as `Uniform(interval)`, dense in one part of the generation.

    `power` is lowered in steps of 0.02 until the calls are distinct, which is DeepCache's rule (Ma et al., 2023).
    """

    interval: Count
    power: Annotated[float, Bounds(gt=1, le=100)] = 1.4  # lowered in small steps, which from 1e17 on would never end

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
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
    """Refresh more often at the beginning: calls T·(k/n)^power of T calls, n refreshes and k = 0, ..., n - 1.

    Args:
        interval: the mean number of calls from one refresh to the next.
        power: the exponent; a larger one is denser. It is lowered in steps of 0.02 until the calls are distinct.
    Raises:
        ScheduleError: an argument is out of range, or a generation has no such calls.
    Source:
        DeepCache (Ma et al., 2023).
    """

    def _spaced(self, calls: int, count: int, power: float) -> tuple[int, ...]:
        return tuple(int(calls * (k / count) ** power) for k in range(count))


@dataclass(frozen=True)
class DenseLate(_Dense):
    """Refresh more often at the end: calls T·(1 - (1 - k/n)^power) of T calls, n refreshes and k = 0, ..., n - 1.

    Args:
        interval: the mean number of calls from one refresh to the next.
        power: the exponent; a larger one is denser. It is lowered in steps of 0.02 until the calls are distinct.
    Raises:
        ScheduleError: an argument is out of range, or a generation has no such calls.
    Source:
        DeepCache (Ma et al., 2023).
    """

    def _spaced(self, calls: int, count: int, power: float) -> tuple[int, ...]:
        return tuple(int(calls * (1 - (1 - k / count) ** power)) for k in range(count))


@dataclass(frozen=True)
class DenseCenter(_Dense):
    """Refresh more often around one call: DeepCache's quadratic schedule, with its published values.

    The calls are equal steps between the roots of -center and T - center, raised to `power` again. The root of a
    negative number is complex, and only the real part is taken at the end, as in DeepCache's code.

    Args:
        interval: the mean number of calls from one refresh to the next.
        power: the exponent; a larger one is denser. It is lowered in steps of 0.02 until the calls are distinct.
        center: the number of the call, from 0.
    Raises:
        ScheduleError: an argument is out of range, or a generation has no such calls.
    Source:
        DeepCache (Ma et al., 2023).
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
    """Follow one schedule up to a call, which refreshes, and another or none after it.

    Args:
        call: the number of the call, from 0.
        before: the schedule of the calls before it.
        after: the schedule of the calls after it; None never refreshes again.
    Example:
        `Gate(10, before=Uniform(2))`
    Source:
        T-GATE (Zhang et al., 2024).
    """

    call: Count
    before: Schedule = Uniform(1)
    after: Schedule | None = None

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        if call < self.call:
            return self.before.refreshes(call, timestep, run)
        return call == self.call or (self.after is not None and self.after.refreshes(call, timestep, run))


@dataclass(frozen=True)
class Range(Schedule):
    """Follow a schedule between two timesteps, both excluded; every other call refreshes.

    Args:
        low: the lower timestep.
        high: the higher timestep.
        within: the schedule of the calls between them.
    Raises:
        ScheduleError: `low` is not below `high`.
    Example:
        `Range(100, 800, Uniform(2))`
    Source:
        Pyramid attention broadcast (Zhao et al., 2024), as in diffusers.
    """

    low: Number
    high: Number
    within: Schedule = Uniform(2)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ScheduleError(
                f"no timestep lies between {self.low} and {self.high}", where="Range", hint="the smaller one first"
            )

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        return not self.low < timestep < self.high or self.within.refreshes(call, timestep, run)


@dataclass(frozen=True)
class Once(Schedule):
    """Refresh at the first call only, for values that do not change during a generation."""

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        return False


@dataclass(frozen=True)
class Warm(Schedule):
    """Follow a schedule, but refresh at all of the first and of the last calls.

    Args:
        then: the schedule of the calls between them.
        first: the number of calls at the beginning.
        last: the number of calls at the end; with any, the number of calls must be known.
    Example:
        `Warm(Uniform(3), first=4, last=1)`
    """

    then: Schedule
    first: Index = 1
    last: Index = 0

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        if call < self.first or (self.last and call >= _known(run.calls, self) - self.last):
            return True
        return self.then.refreshes(call, timestep, run)


@dataclass(frozen=True)
class Drift(Schedule):
    """Refresh more often the faster the features drift.

    Each refresh measures the relative error (L2) of the value that the site would have inherited; its only cost is that
    the host reads one number from the device. Above `bound` the gap to the next refresh becomes one call shorter, below
    half of it one call longer. Sites with the same schedule refresh together, by the largest of their errors.

    Args:
        bound: the largest relative error (L2) at which the gap does not shrink.
        least: the smallest number of calls from a refresh to the next, with which a generation begins.
        most: the largest number of calls from a refresh to the next.
    Raises:
        ScheduleError: an argument is out of range, or `most` is below `least`.
    Example:
        `Drift(0.05, most=5)`
    Source:
        The hold-out test of ComfyUI-Spectrum-SDXL-Proper, made gradual.
    """

    bound: Annotated[float, Bounds(gt=0, lt=10)] = 0.1
    least: Count = 1
    most: Count = 4

    def __post_init__(self) -> None:
        if self.most < self.least:
            raise ScheduleError(f"most is {self.most}", where=str(self), hint=f"at least {self.least}, which least is")

    def next_gap(self, gap: int, error: float) -> int:
        """Return the number of calls to the next refresh, at a refresh that has measured an error.

        Args:
            gap: the number of calls since the last refresh that the schedule asked for.
            error: the relative error (L2) that was measured; nan counts as too large.
        """
        if error != error or error > self.bound:
            return max(gap - 1, self.least)
        return min(gap + 1, self.most) if error < self.bound / 2 else gap

    def refreshes(self, call: int, timestep: float, run: SamplingRun) -> bool:
        return call % self.least == 0  # where nothing is measured, such as in a timetable


# -- several UNets in one generation ----------------------------------------------------------------------------------

Member = Annotated[str, Bounds(length=1)]
Members = Annotated[tuple[Member, ...], Bounds(length=1)]


@dataclass(frozen=True)
class MemberSchedule(Spec, abstract=True):
    """Base of the schedules that name the UNet which computes a call. Subclass it as a frozen dataclass.

    Args:
        members: the names of the UNets.

    Class attributes:
        counts: whether it depends on the number of the call, which an attached scheduler or `expecting` must say.
    """

    refusal: ClassVar[type[SdgraphError]] = ScheduleError
    counts: ClassVar[bool] = True
    members: Members

    def member(self, call: int, timestep: float, run: SamplingRun) -> str:
        """Return the name of the UNet that computes a call.

        Args:
            call: the number of the call, from 0.
            timestep: the timestep of the call.
            run: the known facts about the generation.
        Raises:
            ScheduleError: no UNet computes the call, or the schedule needs facts that are unknown.
        """
        raise NotImplementedError(f"{type(self).__name__}.member")

    @checked(ScheduleError)
    def turns(self, run: SamplingRun) -> tuple[str, ...]:
        """Return the name of the UNet that computes each call of a run; unknown timesteps are supposed.

        Args:
            run: the known facts about the generation; the number of calls is one of them.
        Raises:
            ScheduleError: the number of calls is unknown, or no UNet computes one of them.
        Example:
            `InTurns(("large", "small")).turns(SamplingRun(3))` is `("large", "small", "large")`
        """
        timesteps = run.supposed().timesteps
        if timesteps is None:
            raise ScheduleError("the number of calls is unknown", where=str(self), hint="SamplingRun.of(calls)")
        return tuple(self.member(i, t, run) for i, t in enumerate(timesteps))

    def _check_starts(self, starts: tuple[float, ...], rising: bool) -> None:
        """Refuse starts that are not one for every member after the first, in the order of the generation."""
        if len(starts) != len(self.members) - 1:
            raise ScheduleError(
                f"{len(self.members)} members have {len(starts)} starts",
                where=str(self),
                hint="give one start for each member after the first",
            )
        if list(starts) != sorted(set(starts), reverse=not rising):
            raise ScheduleError(
                f"the starts {starts} are not in the order of the generation",
                where=str(self),
                hint="numbers of calls rise, and timesteps fall",
            )


@dataclass(frozen=True)
class ByTimestep(MemberSchedule):
    """Switch to the next UNet below a timestep. It needs neither `attach` nor `expecting`.

    Args:
        members: the names of the UNets, in the order of the generation.
        starts: the timestep below which each UNet after the first computes; timesteps fall.
    Raises:
        ScheduleError: there is not one start for each UNet after the first, or the starts do not fall.
    Example:
        `ByTimestep(("large", "small"), (500,))`
    Source:
        Wan 2.2's `boundary_ratio` and SDXL's `denoising_end`, as in diffusers.
    """

    counts: ClassVar[bool] = False
    starts: tuple[Finite, ...] = ()

    def __post_init__(self) -> None:
        self._check_starts(self.starts, rising=False)

    def member(self, call: int, timestep: float, run: SamplingRun) -> str:
        least = min(run.timesteps or (timestep,))
        if least < 0:  # those of EDM are logarithms
            raise ScheduleError(
                f"timestep {least:g} is none of the training timesteps, which the starts are",
                where=str(self),
                hint="use a schedule by call, or a scheduler of training timesteps",
            )
        return self.members[sum(timestep < start for start in self.starts)]

    @classmethod
    def boundary_ratio(
        cls, ratio: Share, members: Members = ("high", "low"), num_train_timesteps: Count = TRAINED
    ) -> ByTimestep:
        """Return the schedule of Wan's `boundary_ratio` in diffusers.

        Args:
            ratio: the share of the training timesteps from which the first of two UNets computes; 0 leaves all calls to
                the first, 1 to the second.
            members: the names of the two UNets, the one of the noisier calls first.
            num_train_timesteps: the number of training timesteps.
        Example:
            `ByTimestep.boundary_ratio(0.875, ("large", "small"))`
        """
        return cls(members, (ratio * num_train_timesteps,))

    @classmethod
    def denoising_end(
        cls, end: Share, members: Members = ("base", "refiner"), num_train_timesteps: Count = TRAINED
    ) -> ByTimestep:
        """Return the schedule of SDXL's `denoising_end` in diffusers, which rounds to whole timesteps.

        Args:
            end: the share of the training timesteps that the first of two UNets denoises.
            members: the names of the two UNets, in the order of the generation.
            num_train_timesteps: the number of training timesteps.
        Example:
            `ByTimestep.denoising_end(0.8)`
        """
        return cls(members, (round(num_train_timesteps - end * num_train_timesteps),))


@dataclass(frozen=True)
class ByCall(MemberSchedule):
    """Switch to the next UNet at a call.

    Args:
        members: the names of the UNets, in the order of the generation.
        starts: the number of the call, from 0, at which each UNet after the first begins.
        of: the number of calls that the generation must have; None allows any.
    Raises:
        ScheduleError: there is not one start for each UNet after the first, or the starts do not rise.
    Example:
        `ByCall(("large", "small"), (10,), of=25)`
    """

    starts: tuple[Index, ...] = ()
    of: Count | None = None

    def __post_init__(self) -> None:
        self._check_starts(self.starts, rising=True)

    def member(self, call: int, timestep: float, run: SamplingRun) -> str:
        if self.of is not None and run.calls is not None and run.calls != self.of:
            what = f"made for {self.of} calls, this generation has {run.calls}"
            raise ScheduleError(what, where=str(self), hint="another schedule, or of=None")
        return self.members[sum(call >= start for start in self.starts)]

    @classmethod
    def of_calls(cls, names: Members) -> ByCall:
        """Return the schedule of a generation whose calls are computed by the named UNets.

        Args:
            names: the name of the UNet of each call, in order.
        Example:
            `ByCall.of_calls(("large", "small", "small"))` is `ByCall(("large", "small"), (1,), 3)`
        """
        starts = tuple(n for n in range(1, len(names)) if names[n] != names[n - 1])
        return cls(tuple(names[n] for n in (0, *starts)), starts, len(names))

    @classmethod
    def hybrid_sd(cls, calls: Index, of: Count | None = None, members: Members = ("large", "small")) -> ByCall:
        """Return Hybrid SD's schedule: the large UNet first, and the small one for the rest.

        Args:
            calls: the number of calls of the large UNet.
            of: the number of calls that the generation must have; None allows any.
            members: the names of the two UNets, the large one first.
        Example:
            `ByCall.hybrid_sd(10, of=25)`
        Source:
            Hybrid SD (Yan et al., 2024), whose grid of 25 calls gives the large UNet 0, 5, 10, 15, 20 or 25.
        """
        return cls(members, (calls,), of)


@dataclass(frozen=True)
class ByShare(MemberSchedule):
    """Switch to the next UNet after a share of the calls, whose number must be known.

    Args:
        members: the names of the UNets, in the order of the generation.
        starts: the share of the calls that are made before each UNet after the first begins. The number of these calls
            is rounded down.
    Raises:
        ScheduleError: there is not one start for each UNet after the first, or the starts do not rise.
    Example:
        `ByShare(("small", "large"), (0.4,))`
    """

    starts: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        self._check_starts(self.starts, rising=True)

    def member(self, call: int, timestep: float, run: SamplingRun) -> str:
        calls = _known(run.calls, self)
        # 0.29 * 100 is a little less than 29
        return self.members[sum(call >= int(start * calls + 1e-9) for start in self.starts)]

    @classmethod
    def t_stitch(cls, share: Share, members: Members = ("small", "large")) -> ByShare:
        """Return T-Stitch's schedule: the small UNet first, and the large one for the rest.

        Args:
            share: the share of the calls that the small UNet computes.
            members: the names of the two UNets, the small one first.
        Example:
            `ByShare.t_stitch(0.4)`
        Source:
            T-Stitch (Pan et al., 2024).
        """
        return cls(members, (share,))


@dataclass(frozen=True)
class InTurns(MemberSchedule):
    """Let UNets compute calls in turns, over and over.

    Args:
        members: the names of the UNets, in the order of their turns.
        calls: the number of calls in a turn of each UNet; by default one.
    Raises:
        ScheduleError: there is not one number for each UNet.
    Example:
        `InTurns(("large", "small"), (1, 2))`
    """

    calls: tuple[Count, ...] | None = None

    def __post_init__(self) -> None:
        if self.calls is not None and len(self.calls) != len(self.members):
            what = f"{len(self.members)} members have {len(self.calls)} numbers of calls"
            raise ScheduleError(what, where=str(self), hint="give one number for each member")

    def member(self, call: int, timestep: float, run: SamplingRun) -> str:
        row = [name for name, count in zip(self.members, self.calls or (1,) * len(self.members), strict=True)
               for _ in range(count)]  # fmt: skip
        return row[call % len(row)]


@dataclass(frozen=True)
class PerCall(MemberSchedule):
    """Name the UNet of every call.

    Args:
        members: the name of the UNet of each call, in order. A generation of more calls is refused.
    Example:
        `PerCall(("large", "small", "small", "large"))`
    """

    def member(self, call: int, timestep: float, run: SamplingRun) -> str:
        calls = max(call + 1, run.calls or 0)
        if calls > len(self.members):
            raise ScheduleError(
                f"no UNet computes call {len(self.members)}; the schedule names those of {len(self.members)} calls",
                where=str(self)[:200],
                hint=f"name {calls} UNets, or make fewer steps",
            )
        return self.members[call]
