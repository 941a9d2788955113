"""Pipelines that guide in other ways: each call is recognised, whatever the batch is and is made into."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, IPNDMScheduler, StableDiffusionPAGPipeline

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import CallError, ModeError
from sdgraph.forecasts import Fitted, Polynomial, weighted
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import SamplingRun, Uniform

from ..models import build
from ..pipelines import PIPELINES, PROMPT, make, plain

STEPS = 6
DAMPED = InheritFeatures.damped(2)


class CountedUNet:
    """A UNet whose calls are counted from 0: what it inherits is decided by the number alone, and kept by hand."""

    def __init__(self, unet: GraphUNet, forecast: Any, run: SamplingRun) -> None:
        self.unet, self.forecast, self.run = unet, forecast, run
        self.number, self.values = 0, dict[str, list[tuple[int, torch.Tensor]]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **call: Any) -> tuple[torch.Tensor]:
        inherited = {}
        if not Uniform(2).refreshes(self.number, 0.0, self.run):
            for name, known in self.values.items():
                weights = self.forecast.weights([number for number, _ in known], self.number, self.run)
                inherited[name] = weighted([value for _, value in known], weights)
        call = {name: value for name, value in call.items() if name != "return_dict"}
        given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        output, fresh = self.unet.compute(inherited, **given, **call)
        for name, value in fresh.items():
            self.values[name] = [*self.values.get(name, ()), (self.number, value)][-self.forecast.memory :]
        self.number += 1
        return (output,)


def scale(to: float, at: int = 2) -> Any:
    """A callback that changes the guidance scale after a step."""

    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            pipe._guidance_scale = to
        return values

    return change


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "without guidance": ("text", {"guidance_scale": 1.0}),
    "below one": ("text", {"guidance_scale": 0.0}),
    "rescaled": ("text", {"guidance_scale": 5.0, "guidance_rescale": 0.7}),
    "changed midway": ("text", {"guidance_scale": 3.0, "callback_on_step_end": scale(9.0)}),
    "three images": ("text", {"num_images_per_prompt": 3}),
    "guess mode": ("guess-mode", {}),
    "guess mode without guidance": ("guess-mode", {"guidance_scale": 1.0}),
    "guess mode, two images": ("guess-mode", {"num_images_per_prompt": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_call_inherits_what_it_should(name: str) -> None:
    kind, options = CASES[name]
    build_pipe, call = PIPELINES[kind]
    pipe = build_pipe()
    whole = make(pipe, call, STEPS, **options)
    unet = sdgraph.apply(pipe.unet, DAMPED, verify=False)
    pipe.unet = CountedUNet(unet, DAMPED.forecast, SamplingRun(STEPS))
    expected = make(pipe, call, STEPS, **options)
    assert not torch.equal(whole, expected)
    pipe.unet = unet
    assert torch.equal(make(pipe, call, STEPS, **options), expected)  # recognised by the latents
    with sdgraph.attach(pipe):
        assert torch.equal(make(pipe, call, STEPS, **options), expected)


def test_guidance_that_is_switched_off_without_its_prompt_is_refused() -> None:
    """Diffusers then passes half the latents with the whole prompt."""
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.unet = sdgraph.apply(pipe.unet, DAMPED, verify=False)
    with sdgraph.attach(pipe), pytest.raises(CallError, match="encoder_hidden_states"):
        make(pipe, call, STEPS, callback_on_step_end=scale(0.0))
    with sdgraph.attach(pipe):  # and the next generation is none the worse
        assert make(pipe, call, 2).isfinite().all()


@pytest.mark.slow
def test_perturbed_attention_is_refused() -> None:
    """It exchanges processors of attention modules during the call, and a graph has no such modules."""
    whole = plain("StableDiffusionPAGPipeline", build(), image_encoder=None)
    assert isinstance(whole, StableDiffusionPAGPipeline)
    assert make(whole, {**PROMPT, "height": 32, "width": 48}, 2).isfinite().all()
    whole.unet = sdgraph.apply(whole.unet, DAMPED, verify=False)
    with pytest.raises(ModeError, match="perturbed-attention guidance"):
        sdgraph.attach(whole)
    with pytest.raises(ValueError, match="Cannot find PAG layer"):  # diffusers' own words, before any call
        make(whole, {**PROMPT, "height": 32, "width": 48}, 2)


# -- solvers ----------------------------------------------------------------------------------------------------------


def generated(scheduler: Any, forecast: Any, **options: Any) -> torch.Tensor:
    """Images of an attached pipeline that forecasts."""
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.scheduler = scheduler
    pipe.unet = sdgraph.apply(pipe.unet, replace(DAMPED, forecast=forecast), verify=False)
    with sdgraph.attach(pipe):
        return make(pipe, call, STEPS, **options)


@pytest.mark.slow
def test_a_solver_without_noise_levels(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdgraph"):
        found = generated(IPNDMScheduler(), Polynomial(1, 0.5, "lambda"))
    assert "go by the number of the call instead of lambda" in caplog.text
    assert torch.equal(found, generated(IPNDMScheduler(), Polynomial(1, 0.5)))


@pytest.mark.slow
def test_sigmas_of_the_caller() -> None:
    """Forecasts go by the noise levels that are run, not by those that the scheduler would choose."""
    sigmas = [14.0, 6.0, 3.0, 1.5, 0.7, 0.3]
    found = generated(EulerDiscreteScheduler(), Polynomial(1, 0.5, "sigma"), sigmas=sigmas)
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.scheduler = EulerDiscreteScheduler()
    lambdas = tuple(-float(torch.tensor(sigma).log()) for sigma in sigmas)
    unet = sdgraph.apply(pipe.unet, DAMPED, verify=False)
    pipe.unet = CountedUNet(unet, Polynomial(1, 0.5, "sigma"), SamplingRun(STEPS, lambdas=lambdas))
    expected = make(pipe, call, STEPS, sigmas=sigmas)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, generated(EulerDiscreteScheduler(), Polynomial(1, 0.5), sigmas=sigmas), atol=1e-5)


def test_the_noise_levels_of_a_part_are_those_of_the_part() -> None:
    scheduler = diffusers.EDMEulerScheduler()  # its levels are known by their places
    scheduler.set_timesteps(8)
    whole, late = SamplingRun.of(scheduler), SamplingRun.of(scheduler, slice(3, None))
    assert whole.lambdas is not None
    assert late.lambdas == whole.lambdas[3:]


@pytest.mark.law("Fitted forecasts are used only for the solver and the calls that they were fitted for.")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"scheduler": EulerDiscreteScheduler()}, "of EulerDiscreteScheduler"),
        ({"steps": 5}, "this run has 5 of DDIMScheduler"),
        ({"timesteps": (990, 700, 600, 400, 300, 100)}, "fitted for other timesteps"),
    ],
)
def test_fitted_weights_are_not_used_elsewhere(
    changed: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.scheduler.set_timesteps(STEPS)
    run, source = SamplingRun.of(pipe.scheduler), pipe.unet
    otherwise = Polynomial(1, 0.5)
    run = replace(run, timesteps=changed.get("timesteps", run.timesteps))
    fitted = Fitted.of(((), (1.0,), (), (0.4, 0.6), (), (0.4, 0.6)), run, otherwise)
    pipe.scheduler = changed.get("scheduler", pipe.scheduler)
    images = []
    for forecast in (fitted, otherwise):
        pipe.unet = sdgraph.apply(source, replace(DAMPED, forecast=forecast), verify=False)
        with sdgraph.attach(pipe), caplog.at_level(logging.WARNING, "sdgraph"):
            images.append(make(pipe, call, changed.get("steps", STEPS)))
    assert torch.equal(*images)
    assert warning in caplog.text
    assert str(otherwise) in caplog.text


@pytest.mark.slow
def test_fitted_weights_are_used_where_they_belong(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = PIPELINES["text"][0]().scheduler
    scheduler.set_timesteps(STEPS)
    fitted = Fitted.of(((), (1.0,), (), (0.4, 0.6), (), (0.4, 0.6)), SamplingRun.of(scheduler), Polynomial(0))
    with caplog.at_level(logging.WARNING, "sdgraph"):
        found = generated(scheduler, fitted)
    assert not caplog.text
    assert torch.allclose(found, generated(scheduler, Polynomial(1, -0.8)), atol=1e-6)  # the same weights here
