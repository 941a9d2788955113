"""Generations of a pipeline by plans, for groups of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ScheduleError
from ..forecasts import DAMPINGS
from ..runtime.unet import GraphUNet
from ..schedules import SamplingRun
from .candidates import Candidates, Plan
from .final_latents import Array, final_latents
from .fit_forecast import gauss_newton


class Rehearsal:
    """A pipeline that generates by plans.

    Args:
        pipe: the pipeline. It is as it was after every call.
        source: the UNet without the candidates.
        candidates: what plans refer to.
        groups: the prompts, by the name of their group.
        seed: the seed of the first image's latents; those of the others, of all groups in order, count up from it.
        call: further arguments of the pipeline.
    Raises:
        ScheduleError: the calls of the pipeline do not go by its scheduler.
    """

    def __init__(
        self,
        pipe: Any,
        source: GraphUNet,
        candidates: Candidates,
        groups: Mapping[str, Sequence[str]],
        seed: int,
        call: Mapping[str, Any],
    ) -> None:
        self._pipe, self._source, self._candidates, self._groups, self._call = pipe, source, candidates, groups, call
        images, self._seeds = int(call.get("num_images_per_prompt") or 1), dict[str, int]()
        for name, prompts in groups.items():
            self._seeds[name], seed = seed, seed + len(prompts) * images
        whole = {name: self._generate(candidates.unet, name, call) for name in groups}
        self.whole = {name: latents for name, (latents, _) in whole.items()}  # of the pipeline as it is
        self.run: SamplingRun = next(run for _, run in whole.values())
        if self.run.calls is None:
            hint = "pass a pipeline of diffusers"
            raise ScheduleError("its calls do not go by its scheduler", where=type(pipe).__name__, hint=hint)

    def latents(self, plan: Plan, group: str) -> Tensor:
        """Return the final latents of a group with a plan."""
        return self._generate(self._candidates.play(plan, self.run), group, self._call)[0]

    def computed(self, steps: int, group: str) -> Tensor:
        """Return the final latents of a group if everything is computed, with another number of steps."""
        others = {name: value for name, value in self._call.items() if name not in ("timesteps", "sigmas")}
        return self._generate(self._source, group, {**others, "num_inference_steps": steps})[0]

    def fitted(self, plan: Plan, group: str, reference: Tensor) -> Array:
        """Return the dampings of the free calls of a plan, fitted to the error of the final latents of a group."""
        free = self._candidates.free(plan)
        begun = np.array([plan.calls[number].damping for number in free])

        def off(dampings: Array) -> Array:
            now = self.latents(with_dampings(plan, free, dampings), group)
            return (now.double() - reference.double()).flatten(1).cpu().numpy()

        return gauss_newton(off, begun, float(np.median(begun)), 1).round(4)

    def first_call(self, group: str) -> Mapping[str, Tensor]:
        """Return the flat inputs of the first call for one prompt of a group."""
        recorder = _Recorder(self._candidates.unet.graph.copy())
        try:
            final_latents(self._pipe, recorder, self._groups[group][:1], self._seeds[group], self._call)
        except _FirstCall as call:
            return call.flat
        raise ScheduleError("the pipeline makes no call", where=type(self._pipe).__name__, hint="more steps")

    def _generate(self, unet: GraphUNet, group: str, call: Mapping[str, Any]) -> tuple[Tensor, SamplingRun]:
        return final_latents(self._pipe, unet, self._groups[group], self._seeds[group], call)


def with_dampings(plan: Plan, calls: Sequence[int], dampings: Array) -> Plan:
    """Return the plan with other dampings of some calls."""
    within = np.clip(dampings, *DAMPINGS).tolist()
    changed = dict(zip(calls, within, strict=True))
    return Plan(tuple(replace(c, damping=changed.get(n, c.damping)) for n, c in enumerate(plan.calls)))


class _FirstCall(Exception):
    """The first call of a generation has come."""

    def __init__(self, flat: Mapping[str, Tensor]) -> None:
        self.flat = flat


class _Recorder(GraphUNet):
    """A UNet that stops a generation at its first call."""

    def run(self, flat: Mapping[str, Tensor]) -> Tensor:
        raise _FirstCall(flat)
