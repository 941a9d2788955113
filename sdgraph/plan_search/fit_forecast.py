"""`fit_forecast`: the weights of a forecast with which the final latents have the least error.

In a multistep solver the errors of neighbouring calls cancel or add up, so weights that fit the *features* best do not
fit the *image* best. Therefore the parameters are the dampings of all inherited calls, and what is minimised is the
error of the final latents. That error is nearly linear in the dampings. One generation for every damping gives the
derivatives, and a linear least-squares problem gives the next dampings (Gauss-Newton with finite differences).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..compiler.passes import Pass
from ..errors import ScheduleError, SpecError
from ..forecasts import DAMPINGS, REPEAT, Fitted, Forecast, Polynomial, as_forecast
from ..options import Index, Seed, checked
from ..progress import Bar
from ..runtime.apply import apply
from ..schedules import SamplingRun, Steps
from ..views.timetable import timetable
from .final_latents import Array, check_request, final_latents, typical

STEP = 0.25  # of a damping, for finite differences
RIDGE = 0.03  # weight of the distance from the damping that all calls share, beside the error of the latents


@dataclass(frozen=True)
class Fit:
    """A fitted forecast.

    Args:
        fitted: the pass with the fitted forecast.
        dampings: the damping of every call that forecasts from two refreshes, in order, (calls,).
        before: the mean squared error of the final latents with the forecast that the fit began with, as the geometric
            mean over the prompts that were fitted on.
        after: the same with the fitted forecast.
        held_out_before: the same as `before`, on the held-out prompts; nan without any.
        held_out_after: the same as `after`, on the held-out prompts; nan without any.
    """

    fitted: Pass
    dampings: tuple[float, ...]
    before: float
    after: float
    held_out_before: float
    held_out_after: float

    def __str__(self) -> str:
        errors = f"{self.before:.3g} -> {self.after:.3g}"
        held_out = f"{self.held_out_before:.3g} -> {self.held_out_after:.3g}"
        dampings = " ".join(f"{damping:.2f}" for damping in self.dampings)
        return f"{self.fitted}\n  error of the final latents: {errors}; on held-out prompts: {held_out}\n  {dampings}"


@checked(SpecError)
def fit_forecast(
    pipe: Any,
    inherit: Pass,
    prompts: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    reference_steps: Steps | None = None,
    iterations: Index = 2,
    seed: Seed = 0,
    progress: bool = True,
    **call: Any,
) -> Fit:
    """Fit the dampings of all calls that forecast to the error of the final latents, for a solver and number of steps.

    Use it when the schedule is settled; `search` also chooses the schedule, and fits the dampings as part of it.

    Args:
        pipe: a diffusers pipeline; its UNet is diffusers' own or a `GraphUNet`. The call leaves it as it was.
        inherit: a pass with `schedule` and `forecast`, such as `InheritFeatures.damped(2)`. The fit begins with its
            forecast, of order 0 or 1, and keeps the dampings near that of this forecast where the error allows.
        prompts: the prompts to fit on, in one batch.
        held_out: the prompts on which only the result is measured.
        reference_steps: the number of steps of the reference generation, which computes everything and whose final
            latents are the aim. By default it is that of `call`; many steps aim at the converged image.
        iterations: the number of Gauss-Newton steps, each of which makes a generation for every fitted call.
        seed: the seed of the latents.
        progress: whether to show a bar.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Returns:
        The pass with fitted weights, and its errors.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: the pass has no sites or another forecast, or there are no prompts.
        ScheduleError: no call forecasts from two refreshes.
    Example:
        `fit = sdgraph.fit_forecast(pipe, InheritFeatures.damped(2), prompts, num_inference_steps=20)`
    """
    check_request("fit_forecast", pipe, prompts, call)
    start = _forecast_of(inherit)
    source = apply(pipe.unet, ())
    trial = apply(source, inherit, verify=False)
    names = trial.graph.sites.keys() - source.graph.sites.keys()
    if not names:
        raise SpecError(f"{inherit} has no sites", where="fit_forecast", hint="pass InheritFeatures")
    aim = {} if reference_steps is None else {"num_inference_steps": reference_steps}
    groups = [group for group in (tuple(prompts), tuple(held_out)) if group]
    references = {group: final_latents(pipe, source, group, seed, {**call, **aim})[0] for group in groups}

    def residual(forecast: Forecast, group: tuple[str, ...]) -> tuple[Array, SamplingRun]:
        """Return the errors of the final latents if the sites have a forecast, (prompts, numbers)."""
        trial.reschedule({name: replace(trial.backend.sites[name], forecast=forecast) for name in names})
        latents, run = final_latents(pipe, trial, group, seed, call)
        return (latents.double() - references[group].double()).flatten(1).cpu().numpy(), run

    before = [residual(start, group) for group in groups]
    run = before[0][1]
    table = timetable({"": trial.graph}, run)
    refreshes = sorted(set().union(*(table.refreshes(name) for name in names)))
    known = {n: [r for r in refreshes if r < n][-2:] for n in range(run.calls or 0) if n not in refreshes}
    free = [number for number, calls in known.items() if len(calls) == 2]
    if not free:
        raise ScheduleError(
            f"there is nothing to fit in {run.calls} calls: none forecasts from two refreshes",
            where=str(inherit),
            hint="more steps, or a schedule that refreshes at some calls only",
        )

    def fitted(dampings: Array) -> Fitted:
        """Return the forecast with a damping for every call of `free`."""
        within = np.clip(dampings, *DAMPINGS)
        damped = {n: Polynomial(1, float(d), start.along) for n, d in zip(free, within, strict=True)}
        rows = [damped.get(n, REPEAT).weights(known[n], n, run) if n in known else () for n in range(run.calls or 0)]
        return Fitted.of(rows, run, start)

    begun = float(start.damping) if start.order else 0.0
    with Bar(total=iterations * (1 + len(free)), desc="fit", unit="run", disable=not progress) as bar:

        def off(dampings: Array) -> Array:
            bar.update()
            return residual(fitted(dampings), groups[0])[0]

        dampings = gauss_newton(off, np.full(len(free), begun), begun, iterations)
    after = [residual(fitted(dampings), group) for group in groups]
    errors = [typical((error**2).mean(1)) for error, _run in (*before, *after)]
    best = replace(inherit, forecast=fitted(dampings))  # type: ignore[call-arg]
    nan = float("nan")
    if len(groups) == 1:
        return Fit(best, tuple(dampings.tolist()), errors[0], errors[1], nan, nan)
    return Fit(best, tuple(dampings.tolist()), errors[0], errors[2], errors[1], errors[3])


def _forecast_of(inherit: Pass) -> Polynomial:
    """Return the forecast that the fit of a pass begins with.

    Raises:
        SpecError: the pass has no schedule and forecast, or a forecast of another kind.
    """
    if not {"schedule", "forecast"} <= {field.name for field in fields(inherit)}:
        raise SpecError(f"{inherit} has no forecast to fit", where="fit_forecast", hint="pass InheritFeatures")
    forecast = as_forecast(inherit.forecast)  # type: ignore[attr-defined]
    if not isinstance(forecast, Polynomial) or forecast.order > 1:
        raise SpecError(f"{forecast} is no line", where="fit_forecast", hint="begin with a forecast of order 0 or 1")
    return forecast


def gauss_newton(residual: Callable[[Array], Array], dampings: Array, shared: float, iterations: int) -> Array:
    """Return the dampings with the least error, regularised towards a shared damping, (calls,).

    Args:
        residual: the function that maps dampings, (calls,), to the errors of the final latents, (prompts, numbers).
        dampings: the dampings to begin with, (calls,).
        shared: the damping that calls keep where the error does not depend on it.
        iterations: the number of steps, each of which measures the residual once and for every damping.
    """
    for _ in range(iterations):
        now = residual(dampings)
        columns = [(residual(dampings + moved) - now) / STEP for moved in STEP * np.eye(len(dampings))]
        dampings = _least_squares(now, np.array(columns), dampings, shared)
    return dampings


def _least_squares(now: Array, columns: Array, chosen: Array, shared: float) -> Array:
    """Return the dampings with the least error, with equal weights of prompts, regularised towards a shared damping.

    Args:
        now: the errors of the final latents, (prompts, numbers).
        columns: the derivatives of the errors by the dampings, (calls, prompts, numbers).
        chosen: the dampings so far, (calls,).
        shared: the shared damping.
    """
    scale = np.sqrt((now**2).mean(1, keepdims=True)) + 1e-12  # the errors of prompts differ by a factor of a hundred
    rows, target = (columns / scale).reshape(len(columns), -1).T, -(now / scale).reshape(-1)
    strength = np.sqrt(RIDGE * len(target))
    rows = np.concatenate([rows, strength * np.eye(len(columns))])
    target = np.concatenate([target, strength * (shared - chosen)])
    moved, *_ = np.linalg.lstsq(rows, target, rcond=None)
    result: Array = np.clip(chosen + moved, -0.5, 1.5)
    return result
