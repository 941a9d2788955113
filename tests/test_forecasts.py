"""Forecasts: the weights of the last refreshes, at each call of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from sdgraph.errors import ScheduleError, SpecError
from sdgraph.forecasts import REPEAT, Fitted, Forecast, Polynomial, as_forecast, weighted
from sdgraph.schedules import SamplingRun
from sdgraph.spec import read

LINE = Polynomial(1)
RUN = SamplingRun(6, lambdas=(-3.0, -1.0, 0.0, 0.5, 2.0, 3.0), solver="Solver()")


def test_a_line_a_parabola_and_the_last_value() -> None:
    assert REPEAT.weights((0, 2), 3, SamplingRun()) == (0, 1)
    assert LINE.weights((0, 2), 3, SamplingRun()) == pytest.approx((-0.5, 1.5))
    assert Polynomial(2).weights((0, 1, 2), 3, SamplingRun()) == pytest.approx((1, -3, 3))
    assert LINE.weights((4,), 5, SamplingRun()) == (1,)  # no line goes through one refresh


@pytest.mark.parametrize("order", [1, 2])
def test_damping_lies_between_the_last_value_and_the_polynomial(order: int) -> None:
    known = tuple(range(0, 2 * order + 1, 2))
    last, whole = np.eye(len(known))[-1], np.array(Polynomial(order).weights(known, 6, SamplingRun()))
    for damping in (0.25, 0.5, 1.0):
        damped = Polynomial(order, damping).weights(known, 6, SamplingRun())
        np.testing.assert_allclose(damped, last + damping * (whole - last))
        assert sum(damped) == pytest.approx(1)  # so that a feature that stays the same is forecast to
    assert Polynomial(order, 0).memory == 1  # it keeps no values for nothing


def test_noise_levels_take_the_place_of_the_calls_numbers() -> None:
    assert Polynomial(1, along="lambda").weights((0, 1), 2, RUN) == pytest.approx((-0.5, 1.5))
    sigma = np.exp([3.0, 1.0, 0.0])
    slope = (sigma[2] - sigma[1]) / (sigma[1] - sigma[0])
    assert Polynomial(1, along="sigma").weights((0, 1), 2, RUN) == pytest.approx((-slope, 1 + slope))


def test_where_nobody_tells_the_noise_levels_calls_are_counted_and_that_is_said() -> None:
    forecast = Polynomial(1, along="lambda")
    assert forecast.weights((0, 2), 3, SamplingRun()) == LINE.weights((0, 2), 3, SamplingRun())
    assert "sdgraph.attach(pipe)" in forecast.doubt(SamplingRun())
    assert not forecast.doubt(RUN)


def test_calls_at_the_same_noise_level_are_counted() -> None:
    """As Heun's second order has them."""
    twice = SamplingRun(4, lambdas=(0.0, 1.0, 1.0, 2.0))
    assert Polynomial(1, along="lambda").weights((1, 2), 3, twice) == LINE.weights((1, 2), 3, twice)


def test_random_steps_are_not_forecast_and_that_is_said() -> None:
    random = SamplingRun(6, random=True)
    assert LINE.weights((0, 2), 3, random) == (0, 1)
    assert "random" in LINE.doubt(random)
    assert not REPEAT.doubt(random)


def test_fitted_weights_are_those_of_their_solver() -> None:
    fitted = Fitted(((), (1.0,), (), (-0.2, 1.2), (-0.4, 1.4), ()), "Solver()", LINE)
    assert fitted.weights((0, 2), 4, RUN) == (-0.4, 1.4)
    assert not fitted.doubt(RUN)
    for other in (SamplingRun(7, solver="Solver()"), SamplingRun(6, solver="Other()"), SamplingRun()):
        assert fitted.weights((0, 2), 4, other) == LINE.weights((0, 2), 4, other)
        assert "fitted for 6 calls of Solver()" in fitted.doubt(other)


@pytest.mark.parametrize("forecast", [REPEAT, Polynomial(1, 0.5, "lambda"), Fitted(((), (1.0,), ()), "Solver(a='b')")])
def test_a_forecast_is_text(forecast: Forecast) -> None:
    assert read(str(forecast), Forecast) == forecast


def test_an_order_stands_for_its_polynomial() -> None:
    assert as_forecast(2) == Polynomial(2)
    assert as_forecast(LINE) is LINE


@pytest.mark.parametrize(
    "options",
    [{"order": 3}, {"order": True}, {"order": 1.0}, {"damping": float("nan")}, {"damping": "half"}, {"along": "time"}],
)
def test_forecasts_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises((ScheduleError, SpecError)):
        Polynomial(**options)


@pytest.mark.parametrize("table", [3, (), (1.0,), ((float("inf"),),), (("1",),)])
def test_fitted_weights_that_are_none(table: Any) -> None:
    with pytest.raises(ScheduleError, match="table is"):
        Fitted(table)
    with pytest.raises(ScheduleError, match="otherwise is 1"):
        Fitted(((1.0,),), otherwise=1)  # type: ignore[arg-type]


def test_a_weighted_sum() -> None:
    one, other = torch.randn(3), torch.randn(3)
    assert weighted([one, other], (0.0, 1.0)) is other  # bit for bit, and nothing is computed
    torch.testing.assert_close(weighted([one, other], (-0.5, 1.5)), 1.5 * other - 0.5 * one)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("karras", [False, True])
def test_noise_levels_are_the_schedulers(scheduler: Any, karras: bool) -> None:
    made = scheduler() if scheduler is DDIMScheduler else scheduler(use_karras_sigmas=karras)
    made.set_timesteps(12)
    run = SamplingRun.of(made)
    assert run.calls == 12
    assert run.lambdas is not None
    assert not run.random
    assert list(run.lambdas) == sorted(run.lambdas)  # noise goes down
    if scheduler is not DDIMScheduler:
        sigmas = made.sigmas[:12].double().numpy()
        np.testing.assert_allclose(run.lambdas, -np.log(sigmas), atol=0.02)  # timesteps are rounded
    assert scheduler.__name__ in run.solver
    assert ("karras" in run.solver) == (karras and scheduler is not DDIMScheduler)


def test_a_part_of_a_run() -> None:
    """As image-to-image begins in the middle."""
    made = DPMSolverMultistepScheduler()
    made.set_timesteps(10)
    whole, part = SamplingRun.of(made), SamplingRun.of(made, slice(4, 10))
    assert whole.lambdas is not None
    assert part.calls == 6
    assert part.lambdas == whole.lambdas[4:]


def test_other_kinds_of_schedulers() -> None:
    for random in (EulerAncestralDiscreteScheduler(), LCMScheduler()):
        random.set_timesteps(4)
        assert SamplingRun.of(random).random
    sde = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    sde.set_timesteps(4)
    assert SamplingRun.of(sde).random
    heun = HeunDiscreteScheduler()
    heun.set_timesteps(4)
    assert SamplingRun.of(heun).calls == len(heun.timesteps) == 7
    edm = EDMEulerScheduler()  # without alphas_cumprod
    edm.set_timesteps(4)
    levels = SamplingRun.of(edm).lambdas
    assert levels is not None
    assert levels == pytest.approx([-float(torch.log(sigma)) for sigma in edm.sigmas[:4]])
