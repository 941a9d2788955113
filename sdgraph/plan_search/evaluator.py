"""The evaluator of proposals: their costs and the errors of their final latents, each measured once."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import written
from ..errors import SavedError, ScheduleError
from ..forecasts import DAMPINGS
from ..options import Misfit, Number, fitted
from ..runtime.recorded_calls import first_call
from ..runtime.switch import SwitchUNet
from ..runtime.unet import GraphUNet
from ..schedules import SamplingRun
from ..text import json_object
from .candidates import Candidates, Proposal
from .costs import Cost, MemberCost, seconds_here, seconds_of
from .final_latents import Array, final_latents, relative_errors
from .fit_forecast import gauss_newton

FORMAT = 1  # of the file of measurements
TUNING, VALIDATION, HELD_OUT = "tuning", "validation", "held-out"


class SearchedPipeline:
    """A pipeline that generates by proposals, for groups of prompts.

    Args:
        pipe: the pipeline, which every method leaves as it was.
        candidates: the UNets, and the passes that proposals refer to.
        groups: the prompts, by the name of their group.
        seed: the seed of the first image's latents; those of the others, of all groups in order, count up from it.
        call: further arguments of the pipeline.
    Raises:
        ScheduleError: the pipeline's calls do not follow its scheduler.
    """

    def __init__(
        self,
        pipe: Any,
        candidates: Candidates,
        groups: Mapping[str, Sequence[str]],
        seed: int,
        call: Mapping[str, Any],
    ) -> None:
        self._pipe, self.candidates, self._groups, self._call = pipe, candidates, groups, call
        images, self._seeds = int(call.get("num_images_per_prompt") or 1), dict[str, int]()
        for name, prompts in groups.items():
            self._seeds[name], seed = seed, seed + len(prompts) * images
        first, *others = map(candidates.alone, candidates.members)
        generated = {name: self._generate(first, name, call) for name in groups}
        self.unchanged = {name: latents for name, (latents, _) in generated.items()}  # by the first UNet as it is
        self.unchanged_others = [self._generate(other, TUNING, call)[0] for other in others]
        self.run: SamplingRun = next(run for _, run in generated.values())
        if self.run.calls is None:
            hint = "pass a pipeline of diffusers"
            raise ScheduleError("its calls do not follow its scheduler", where=type(pipe).__name__, hint=hint)

    def latents(self, proposal: Proposal, group: str) -> Tensor:
        """Return the final latents of a group with a proposal, (images, channels, height, width)."""
        return self._generate(self.candidates.unet(proposal, self.run), group, self._call)[0]

    def computed(self, steps: int, group: str, member: str) -> Tensor:
        """Return the final latents of a group with another number of steps, if a UNet computes everything."""
        others = {name: value for name, value in self._call.items() if name not in ("timesteps", "sigmas")}
        source = self.candidates.members[member].source
        return self._generate(source, group, {**others, "num_inference_steps": steps})[0]

    def fitted(self, proposal: Proposal, group: str, reference: Tensor) -> Array:
        """Return the dampings of a proposal's damped calls, fitted to the error of the final latents of a group."""
        free = self.candidates.damped_calls(proposal)
        begun = np.array([proposal.calls[number].damping for number in free])

        def residual(dampings: Array) -> Array:
            now = self.latents(with_dampings(proposal, free, dampings), group)
            return (now.double() - reference.double()).flatten(1).cpu().numpy()

        return gauss_newton(residual, begun, float(np.median(begun)), 1).round(4)

    def first_call(self, group: str) -> Mapping[str, Tensor]:
        """Return the inputs of the first call for one prompt of a group, by name."""
        prompt = self._groups[group][:1]
        return first_call(
            self.candidates.members[self.candidates.first].unet.graph,
            lambda unet: final_latents(self._pipe, unet, prompt, self._seeds[group], self._call),
        )

    def _generate(
        self, unet: GraphUNet | SwitchUNet, group: str, call: Mapping[str, Any]
    ) -> tuple[Tensor, SamplingRun]:
        return final_latents(self._pipe, unet, self._groups[group], self._seeds[group], call)


def with_dampings(proposal: Proposal, calls: Sequence[int], dampings: Array) -> Proposal:
    """Return the proposal with other dampings of some calls."""
    within = np.clip(dampings, *DAMPINGS).tolist()
    changed = dict(zip(calls, within, strict=True))
    return Proposal(tuple(replace(c, damping=changed.get(n, c.damping)) for n, c in enumerate(proposal.calls)))


class Measurements:
    """Measured numbers and latents, so that a stopped search continues and a search for another budget reuses them.

    Args:
        folder: the folder that keeps them; None keeps them in memory.
        key: the bytes of everything that they depend on.
    Raises:
        SavedError: a file in the folder is damaged, or has another format.
    """

    def __init__(self, folder: Path | None, key: bytes) -> None:
        self._path = None if folder is None else folder / f"{hashlib.sha256(key).hexdigest()[:20]}.json"
        self._known: dict[str, list[float]] = {}
        if self._path is not None and self._path.exists():
            hint = "delete it; the same command measures again"
            plain = json_object(self._path, SavedError, hint=hint, format=FORMAT)
            try:
                self._known = fitted(plain.get("numbers"), dict[str, list[Number]])
            except Misfit as error:
                raise SavedError("the measurements are damaged", where=str(self._path), hint=hint) from error

    def numbers(self, quantity: str, subject: str, measure: Callable[[], Array]) -> Array:
        """Return the numbers of a quantity of a subject, and measure them if they are not known."""
        name = f"{quantity}: {subject}"
        if name not in self._known:
            self._known[name] = [float(number) for number in measure()]
            if self._path is not None:
                text = json.dumps({"format": FORMAT, "numbers": self._known}, indent=0)
                self._write(self._path, text.encode())
        return np.array(self._known[name])

    def latents(self, name: str, generate: Callable[[], Tensor]) -> Tensor:
        """Return the latents of a name, and generate them if they are not known.

        Raises:
            SavedError: their file is damaged.
        """
        if self._path is None:
            return generate()
        path = self._path.with_name(f"{self._path.stem}-{name}.npy")
        if not path.exists():
            content = io.BytesIO()
            np.save(content, generate().float().cpu().numpy())
            self._write(path, content.getvalue())
        try:
            return torch.from_numpy(np.load(path))
        except (ValueError, EOFError, TypeError) as error:
            hint = "delete it; the same command generates them again"
            raise SavedError("the latents are damaged", where=str(path), hint=hint) from error

    def subjects(self, quantity: str) -> Iterator[str]:
        """Yield the subjects of which numbers of a quantity are known."""
        for name in tuple(self._known):
            if name.startswith(f"{quantity}: "):
                yield name.removeprefix(f"{quantity}: ")

    def _write(self, path: Path, data: bytes) -> None:
        with written(path) as file:
            file.write_bytes(data)


class Evaluator:
    """The costs and the errors of proposals.

    Args:
        pipeline: the pipeline, with the candidates and the groups of prompts.
        measurements: the measurements that are known.
        cost: the measure of costs, see `search`.
        reference_steps: the number of steps of the reference latents.
        budget: the largest cost of a proposal, as a share of the cost of computing everything.
        progress: the bar, which counts generations.
    """

    def __init__(
        self,
        pipeline: SearchedPipeline,
        measurements: Measurements,
        cost: str | Path,
        reference_steps: int,
        budget: float,
        progress: Any,
    ) -> None:
        self.pipeline, self.candidates, self.measurements = pipeline, pipeline.candidates, measurements
        self.budget, self.calls = budget, pipeline.run.calls or 0
        self._progress, self._cost, self._costs = progress, cost, dict[tuple[str, frozenset[str]], float]()
        self._measure: MemberCost | None = None
        self._references = {
            group: measurements.latents(
                group, partial(pipeline.computed, reference_steps, group, self.candidates.first)
            )
            for group in pipeline.unchanged
        }
        self._full_cost = self._cost_of(Proposal.spaced(self.calls, self.calls, member=self.candidates.first))

    def share(self, proposal: Proposal) -> float:
        """Return the cost of a proposal as a share of the cost of computing everything with the first UNet."""
        return self._cost_of(proposal) / self._full_cost

    def fits(self, proposal: Proposal) -> bool:
        """Return whether a proposal meets the budget, which may itself be a share that was computed."""
        return self.share(proposal) <= self.budget * (1 + 1e-9)

    def errors(self, proposal: Proposal, group: str) -> Array:
        """Return the relative errors of the final latents of a group with a proposal, (images,)."""
        return self._errors(group, str(proposal), lambda: self.pipeline.latents(proposal, group))

    def gains(self, before: Proposal, after: Proposal, group: str) -> Array:
        """Return the logarithms of the factors by which the errors of a group fall, (images,)."""
        errors = [np.maximum(self.errors(proposal, group), 1e-12) for proposal in (before, after)]
        gains: Array = np.log(errors[0] / errors[1])
        return gains

    def computed(self, steps: int, member: str) -> Array:
        """Return the relative errors of the held-out prompts with a number of steps, if a UNet computes everything."""
        subject = f"{steps} steps" + (f" of {member}" if member else "")
        return self._errors(HELD_OUT, subject, lambda: self.pipeline.computed(steps, HELD_OUT, member))

    def fitted(self, proposal: Proposal) -> Proposal:
        """Return the proposal with dampings that are fitted to the tuning prompts."""
        free = self.candidates.damped_calls(proposal)
        if not free:
            return proposal
        fit = partial(self.pipeline.fitted, proposal, TUNING, self._references[TUNING])
        return self.candidates.simplified(
            with_dampings(proposal, free, self.measurements.numbers("fit", str(proposal), fit))
        )

    def _errors(self, group: str, subject: str, generate: Callable[[], Tensor]) -> Array:
        def measure() -> Array:
            self._progress.update()
            return relative_errors(generate(), self._references[group])

        return self.measurements.numbers(group, subject, measure)

    def _cost_of(self, proposal: Proposal) -> float:
        return self.candidates.cost(proposal, self.pipeline.run, self._cost_of_call)

    def _cost_of_call(self, member: str, reused: frozenset[str]) -> float:
        call = member, reused
        if call not in self._costs:
            if self._cost == "macs":
                self._costs[call] = self.candidates.members[member].unet.graph.call_macs(reused)
            elif self._cost == "time":
                subject = (f"{member}@" if member else "") + ", ".join(sorted(reused))
                numbers = self.measurements.numbers("seconds", subject, lambda: self._seconds(member, reused))
                self._costs[call] = float(numbers[0])
            else:
                self._costs[call] = self._seconds_of_file(reused)
        return self._costs[call]

    def _seconds(self, member: str, reused: frozenset[str]) -> Array:
        if self._measure is None:
            unets = {name: one.unet for name, one in self.candidates.members.items()}
            self._measure = seconds_here(unets, self.pipeline.first_call(TUNING))
        return np.array([self._measure(member, reused)])

    @cached_property
    def _seconds_of_file(self) -> Cost:
        return seconds_of(Path(self._cost))
