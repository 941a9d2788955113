"""The rota of a switch: the member that computes each call, in PyTorch and in ONNX Runtime alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from ..errors import CallError, ModeError, ScheduleError, did_you_mean
from ..inheritance.attach import Attachment
from ..inheritance.cache import Backend, Turn, no_value
from ..inheritance.tracker import GenerationTracker
from ..schedules import MemberSchedule, SamplingRun
from ..solvers import looks_back
from ..spec import known, read


class Rota:
    """The turns of a switch.

    Args:
        schedule: the schedule that names the member of each call.
        members: the names of the members.
        tracker: the tracker of the generations of the switch.
        carried: the sites whose values are taken over when the turn changes.
        guidance_scale: the scale of classifier-free guidance of members by name, where it is not the pipeline's.
    Raises:
        ScheduleError: the schedule or the scales name a member that there is not, or a member is never named.
    """

    def __init__(
        self,
        schedule: MemberSchedule,
        members: Collection[str],
        tracker: GenerationTracker,
        carried: frozenset[str] = frozenset(),
        guidance_scale: Mapping[str, float] | None = None,
    ) -> None:
        self.members = tuple(members)
        check_schedule(schedule, self.members)
        check_known(schedule, guidance_scale or (), self.members, "guidance_scale")
        self.schedule, self.tracker, self.carried = schedule, tracker, carried
        self.guidance_scale = dict(guidance_scale or {})
        self._checked_run: SamplingRun | None = None

    def run(
        self,
        flat: Mapping[str, torch.Tensor],
        conditioning: Collection[str],
        backend: Callable[[str], Backend[Any, Any]],
        inherits: bool,
        weights: Callable[[bool], object] = lambda waits: None,
    ) -> torch.Tensor:
        """Compute the next call of the generation that it belongs to.

        Args:
            flat: the inputs of the call, by name.
            conditioning: the names of the inputs that a generation keeps.
            backend: the function that returns the backend of a member, which covers the call.
            inherits: whether a member inherits features.
            weights: see `GenerationTracker.run`.
        Returns:
            the prediction of the call, (B, out_channels, H, W).
        Raises:
            ScheduleError: no member computes the call, or nothing says which call of the generation it is.
        """

        def turns(call: int | None, timestep: float | None, run: SamplingRun) -> Turn:
            return self._turn(flat, self._member(flat["timestep"], call, timestep, run), backend)

        if flat["sample"].is_meta:  # where no timestep can be read
            alone = self._turn(flat, self.members[0], backend)
        elif not self.schedule.counts and not inherits:
            position = self.tracker.position(flat["timestep"])
            place = (None, SamplingRun()) if position is None else (position.timestep, position.run)
            alone = turns(None, *place)
        else:
            return self.tracker.run(flat, conditioning, turns, weights)
        output: torch.Tensor = alone.backend.compute(flat, frozenset(), no_value)[0]
        return output

    def _turn(self, flat: Mapping[str, torch.Tensor], name: str, backend: Callable[[str], Backend[Any, Any]]) -> Turn:
        """Return the turn of a member."""
        its = backend(name)
        if name in self.guidance_scale and not flat["sample"].is_meta:
            its = _Guided(its, self.guidance_scale[name] / self._pipeline_scale(flat))
        return Turn(its, name, self.carried)

    def _pipeline_scale(self, flat: Mapping[str, torch.Tensor]) -> float:
        """Return the scale of guidance of the attached pipeline that makes a call."""
        sources = [one for one in self.tracker.position_sources if isinstance(one, Attachment)]
        source = next((one for one in sources if one.read(flat["timestep"]) is not None), None)
        scale = source.guidance_scale if source is not None else None
        if scale is None or flat["sample"].shape[0] % 2:
            what = "the pipeline runs without guidance, or combines its predictions in another way"
            raise ModeError(
                what if source is not None else "no attached pipeline makes this call, so its guidance is unknown",
                where="guidance_scale",
                hint="sdgraph.attach(pipe), with guidance_scale above 1 and without guidance_rescale; or leave it out",
            )
        return scale

    def _member(self, timesteps: torch.Tensor, call: int | None, timestep: float | None, run: SamplingRun) -> str:
        """Return the name of the UNet that computes a call, see `Turns`."""
        if call is None and self.schedule.counts:
            raise ScheduleError(
                "nothing says which call of the generation this is, and the schedule counts calls",
                where=str(self.schedule),
                hint="sdgraph.attach(pipe), or `with unet.expecting(timesteps)` in a loop of your own",
            )
        if timestep is None:
            names = {self.schedule.member(0, float(one), run) for one in timesteps.reshape(-1).tolist()}
            if len(names) > 1:
                raise CallError(
                    f"the samples of a batch have timesteps of {' and '.join(sorted(names))}",
                    where="argument timestep",
                    hint="call the UNet once for each of them",
                )
            return names.pop()
        if run is not self._checked_run and (run.timesteps is not None or run.calls is not None):
            self._check_run(run)
        return self.schedule.member(call or 0, timestep, run)

    def _check_run(self, run: SamplingRun) -> None:
        """Refuse a run of which a call has no UNet, and warn where the solver looks back over a switch."""
        names = self.schedule.turns(run)
        check_known(self.schedule, names, self.members)
        if looks_back(run.solver) and len(set(names)) > 1:
            self.tracker.warn(
                f"{run.solver.partition('(')[0]} combines the predictions of several calls, so the steps after a "
                f"switch also use those of the UNet before it; see docs/switching.md for what that changes"
            )
        self._checked_run = run


class Whole:
    """A backend whose calls compute everything, and of which nothing is kept.

    Args:
        backend: the backend that computes them.
    """

    def __init__(self, backend: Backend[Mapping[str, torch.Tensor], torch.Tensor]) -> None:
        self.sites: Mapping[str, Any] = {}
        self._backend = backend

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the output of a call."""
        return self._backend.compute(inputs, frozenset(), no_value)[0], {}


class _Guided:
    """A backend whose prediction with a prompt lies farther from that without, or nearer to it.

    Args:
        backend: the backend that computes the calls, of samples without a prompt and the same ones with it.
        factor: the factor of the difference.
    """

    def __init__(self, backend: Backend[Mapping[str, torch.Tensor], torch.Tensor], factor: float) -> None:
        self.sites, self._backend, self._factor = backend.sites, backend, factor

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the output of a call, and the values of the sites that it computed."""
        output, computed = self._backend.compute(inputs, reused, read)
        without, given = output.chunk(2)
        return torch.cat([without, without + self._factor * (given - without)]), computed


def read_schedule(text: str) -> MemberSchedule:
    schedule = read(text, MemberSchedule)
    if not isinstance(schedule, MemberSchedule):
        kinds = ", ".join(sorted(known(MemberSchedule)))
        raise ScheduleError(f"{text} names no UNets", where="schedule", hint=f"schedules of UNets: {kinds}")
    return schedule


def check_schedule(schedule: MemberSchedule, members: tuple[str, ...]) -> None:
    check_known(schedule, schedule.members, members)
    unnamed = [name for name in members if name not in schedule.members]
    if unnamed:
        raise ScheduleError(
            f"the schedule never names {', '.join(unnamed)}", where=str(schedule), hint="leave it out of the members"
        )


def check_known(
    schedule: MemberSchedule, names: Iterable[str], members: tuple[str, ...], who: str = "the schedule"
) -> None:
    for name in names:
        if name not in members:
            raise ScheduleError(
                f"{who} names a UNet {name!r}",
                where=str(schedule),
                hint=did_you_mean(name, members) or f"members: {', '.join(members)}",
            )
