"""`fit_forecast`: the weights of a forecast that bring the final latents closest to where they should be.

In a multistep solver the errors of neighbouring calls cancel or add up, so that weights which fit the *features* best
are not those that fit the *image* best. So the damping of every inherited call is a parameter, and the error of the
final latents is what is made small: it is nearly linear in the dampings, which a generation for each of them shows
(Gauss-Newton with finite differences).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..compiler.base import Pass
from ..errors import ScheduleError, SourceError, SpecError
from ..forecasts import Fitted, Polynomial, weighted
from ..graph import Graph
from ..runtime.apply import apply
from ..runtime.interface import no_value
from ..runtime.pipelines import with_unet
from ..runtime.unet import GraphUNet
from ..schedules import Run, Schedule
from .replay import Array

STEP = 0.25  # of a damping, to see what it does
RIDGE = 0.03  # weight of the distance from the damping that all calls share, beside the error of the latents


@dataclass(frozen=True)
class Fit:
    """A fitted forecast.

    Args:
        fitted: the pass with the fitted forecast.
        damping: of each inherited call, in order.
        before: mean squared error of the final latents with the forecast that the fit began with, the geometric mean
            over the prompts that were fitted on.
        after: the same with the fitted forecast.
        held_out_before: as `before`, on the held-out prompts; nan without any.
        held_out_after: as `after`, on the held-out prompts; nan without any.
    """

    fitted: Pass
    damping: tuple[float, ...]
    before: float
    after: float
    held_out_before: float
    held_out_after: float

    def __str__(self) -> str:
        errors = f"{self.before:.3g} -> {self.after:.3g}"
        held_out = f"{self.held_out_before:.3g} -> {self.held_out_after:.3g}"
        dampings = " ".join(f"{damping:.2f}" for damping in self.damping)
        return f"{self.fitted}\n  error of the final latents: {errors}; on held-out prompts: {held_out}\n  {dampings}"


class DampedUNet(GraphUNet):
    """A UNet that inherits along a line through the last two refreshes, with a damping for each call.

    Args:
        graph: with sites.
        schedule: of all of them.
        run: the calls of a generation.
    """

    def __init__(self, graph: Graph, schedule: Schedule, run: Run, along: str) -> None:
        super().__init__(graph)
        self.refreshes, self.expected, self.along = schedule.calls(run), run, along
        self.inherited = [call for call in range(run.calls or 0) if call not in self.refreshes]
        self.begin({})

    def begin(self, damping: Mapping[int, float]) -> None:
        """Start a generation with these dampings of inherited calls."""
        self.damping, self.number, self.known = damping, -1, list[tuple[int, Mapping[str, Tensor]]]()

    def run(self, flat: Mapping[str, Tensor]) -> Tensor:
        self.number += 1
        if self.number in self.refreshes:
            output, values = self._step(flat, frozenset(), no_value)
            self.known = [*self.known, (self.number, values)][-2:]
            return output
        weights = self.weights(self.number, self.damping[self.number])
        held = [values for _, values in self.known]
        value = lambda site: weighted([values[site] for values in held], weights)  # noqa: E731
        return self._step(flat, frozenset(self._sites), value)[0]

    def weights(self, call: int, damping: float) -> tuple[float, ...]:
        """The weights at a call, of the values of the refreshes before it."""
        known = [refresh for refresh in self.refreshes if refresh < call][-2:]
        return Polynomial(1, damping, self.along).weights(known, call, self.expected)  # type: ignore[arg-type]


def fit_forecast(
    pipe: Any,
    one: Pass,
    prompts: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    reference_steps: int | None = None,
    rounds: int = 2,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> Fit:
    """Fit the damping of every inherited call to the error of the final latents, for the pipeline's solver and steps.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. It is as it was afterwards.
        one: a pass with `schedule` and `forecast`, such as `InheritFeatures.damped(2)`.
        prompts: to fit on, in one batch.
        held_out: prompts on which the result is measured only.
        reference_steps: steps of the generation whose final latents are aimed at; by default those of `call`, with
            everything computed. Many steps aim at the converged image.
        rounds: of Gauss-Newton; each makes a generation for every inherited call.
        seed: of the latents.
        progress: show a bar.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Returns:
        the pass with fitted weights, and its errors.
    Raises:
        SourceError: the pipeline has no UNet, or a solver with random steps.
        SpecError: the pass has no sites, or there are no prompts.
        ScheduleError: the pass inherits at no call.
    Example:
        `fit = sdgraph.fit_forecast(pipe, InheritFeatures.damped(2), prompts, num_inference_steps=20)`
    """
    if getattr(pipe, "unet", None) is None:
        raise SourceError(f"{type(pipe).__name__} has no UNet", where="fit_forecast", hint="pass a pipeline with one")
    if not prompts or not {"schedule", "forecast"} <= {field.name for field in fields(one)}:
        raise SpecError(f"there is nothing to fit: {one}, {len(prompts)} prompts", where="fit_forecast",
                        hint="pass InheritFeatures and some prompts")  # fmt: skip
    source = apply(pipe.unet, ())
    inheriting = apply(source, one, verify=False)

    def generate(unet: GraphUNet, texts: Sequence[str], **options: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        with with_unet(pipe, unet):
            result = pipe(prompt=list(texts), generator=generators, **{**call, **options, "output_type": "latent"})
        return result.images.double()  # type: ignore[no-any-return]

    aim = {} if reference_steps is None else {"num_inference_steps": reference_steps}
    references = {texts: generate(source, texts, **aim) for texts in map(tuple, (prompts, held_out)) if texts}
    generate(source, tuple(prompts)[:1])  # sets the scheduler's timesteps
    run = Run.of(pipe.scheduler)
    if run.random:
        raise SourceError(f"{run.solver} adds random numbers at each step", where="fit_forecast",
                          hint="fit with a deterministic solver")  # fmt: skip
    schedule, forecast = one.schedule, one.forecast  # type: ignore[attr-defined]
    start = forecast if isinstance(forecast, Polynomial) and forecast.order == 1 else Polynomial(1, 0.5)
    trial = DampedUNet(inheriting.graph.copy(), schedule, run, start.along)
    if not trial.inherited:
        raise ScheduleError(
            f"{schedule} inherits at none of {run.calls} calls", where=str(one), hint="a larger interval"
        )
    free = [number for number in trial.inherited if len(trial.weights(number, 1.0)) > 1]

    def residual(damping: Array, texts: tuple[str, ...]) -> Array:
        trial.begin({**dict.fromkeys(trial.inherited, 0.0), **dict(zip(free, damping, strict=True))})
        error = (generate(trial, texts) - references[texts]).flatten(1)
        found: Array = error.numpy()
        return found

    chosen, texts = np.full(len(free), float(start.damping)), tuple(prompts)
    with tqdm(total=rounds * (1 + len(free)), desc="fit", unit="run", disable=not progress) as bar:
        for _ in range(rounds):
            now = residual(chosen, texts)
            bar.update()
            columns = []
            for moved in STEP * np.eye(len(free)):
                columns.append((residual(chosen + moved, texts) - now) / STEP)
                bar.update()
            chosen = _least_squares(now, np.array(columns), chosen, float(start.damping))
    errors = {texts: (_typical(residual(np.full(len(free), float(start.damping)), texts)),
                      _typical(residual(chosen, texts))) for texts in references}  # fmt: skip
    damping = dict.fromkeys(trial.inherited, 0.0) | dict(zip(free, chosen.tolist(), strict=True))
    table = tuple(
        tuple(round(weight, 4) for weight in trial.weights(number, damping[number])) if number in damping else ()
        for number in range(run.calls or 0)
    )
    fitted = replace(one, forecast=Fitted(table, run.solver, start))  # type: ignore[call-arg]
    none = (float("nan"), float("nan"))
    return Fit(fitted, tuple(damping.values()), *errors[texts], *(errors.get(tuple(held_out), none)))


def _least_squares(now: Array, columns: Array, chosen: Array, shared: float) -> Array:
    """The dampings with the least error, prompts counted alike, near the shared one.

    Args:
        now: (prompts, numbers) of the final latents.
        columns: (calls, prompts, numbers) by how much they move with each damping.
    """
    scale = np.sqrt((now**2).mean(1, keepdims=True)) + 1e-12  # some prompts are a hundred times as touchy as others
    rows, target = (columns / scale).reshape(len(columns), -1).T, -(now / scale).reshape(-1)
    strength = np.sqrt(RIDGE * len(target))
    rows = np.concatenate([rows, strength * np.eye(len(columns))])
    target = np.concatenate([target, strength * (shared - chosen)])
    moved, *_ = np.linalg.lstsq(rows, target, rcond=None)
    result: Array = np.clip(chosen + moved, -0.5, 1.5)
    return result


def _typical(residual: Array) -> float:
    return float(np.exp(np.log(np.maximum((residual**2).mean(1), 1e-300)).mean()))
