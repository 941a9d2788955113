"""`fit_forecast`: dampings fitted to the error of the final latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from scenes.pipeline import load
from scenes.quality import held_out_captions

import sdgraph
from sdgraph.errors import ScheduleError, SourceError, SpecError
from sdgraph.forecasts import Fitted
from sdgraph.passes import Bypass, HoistInvariants, InheritFeatures, PruneBlocks
from sdgraph.plan_search.fit_forecast import gauss_newton
from sdgraph.schedules import Uniform


@pytest.fixture(scope="module")
def scenes() -> Any:
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    return pipe


@pytest.mark.long
def test_the_error_falls_on_the_trained_model(scenes: Any) -> None:
    _, prompts = held_out_captions(8)
    own = scenes.unet
    fit = sdgraph.fit_forecast(
        scenes, InheritFeatures.damped(2), prompts[:4], held_out=prompts[4:], iterations=1, progress=False,
        num_inference_steps=8,
    )  # fmt: skip
    assert scenes.unet is own
    assert fit.after < fit.before
    forecast = fit.fitted.forecast  # type: ignore[attr-defined]
    assert isinstance(forecast, Fitted)
    assert [len(row) for row in forecast.table] == [0, 1, 0, 2, 0, 2, 0, 2]
    assert sdgraph.parse(str(fit.fitted)) == (fit.fitted,)

    def error(one: Any) -> float:
        """Of a whole generation with a pass, in the attached pipeline."""
        results = []
        for unet in (own, sdgraph.apply(own, one, verify=False)):
            scenes.unet = unet
            with sdgraph.attach(scenes) if unet is not own else torch.no_grad():
                generators = [torch.Generator().manual_seed(i) for i in range(4)]
                results.append(scenes(prompts[:4], num_inference_steps=8, generator=generators, output_type="latent"))
        scenes.unet = own
        difference = (results[0].images - results[1].images).double().square().flatten(1).mean(1)
        return float(difference.log().mean().exp())

    assert error(fit.fitted) == pytest.approx(fit.after, rel=1e-6)
    assert error(InheritFeatures.damped(2)) == pytest.approx(fit.before, rel=1e-6)


@pytest.mark.slow
def test_other_sites_keep_their_schedules_and_forecasts(scenes: Any) -> None:
    own = scenes.unet
    scenes.unet = sdgraph.apply(own, [HoistInvariants(), Bypass("mid_block", Uniform(3))])
    fit = sdgraph.fit_forecast(
        scenes, InheritFeatures.damped(2), ["a red circle"], iterations=1, progress=False, num_inference_steps=5
    )
    unet = sdgraph.apply(scenes.unet, fit.fitted)
    scenes.unet = own
    assert [unet.graph.timetable(5).row(name) for name in ("mid_block", "up_blocks.3.resnets.2")] == ["■·○·○", "■□■◪■"]
    assert np.isfinite(fit.after)


def test_gauss_newton_finds_the_dampings_that_cancel_an_error() -> None:
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(3, 4, 50))
    wanted = np.array([0.2, 0.9, 0.4])
    found = gauss_newton(lambda dampings: np.tensordot(dampings - wanted, columns, 1), np.full(3, 0.5), 0.5, 1)
    np.testing.assert_allclose(found, wanted, atol=0.05)


@pytest.mark.slow
def test_bad_input(scenes: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "progress": False}
    with pytest.raises(SpecError, match="no prompts"):
        sdgraph.fit_forecast(scenes, InheritFeatures.damped(2), [], **options)
    with pytest.raises(SpecError, match="has no forecast to fit"):
        sdgraph.fit_forecast(scenes, PruneBlocks("bk-sdm-base"), ["a red circle"], **options)
    parabola = replace(InheritFeatures.damped(2), forecast=2)
    with pytest.raises(SpecError, match="is no line"):
        sdgraph.fit_forecast(scenes, parabola, ["a red circle"], **options)
    with pytest.raises(SpecError, match="fit_forecast sets output_type itself"):
        sdgraph.fit_forecast(scenes, InheritFeatures.damped(2), ["a red circle"], output_type="np", **options)
    with pytest.raises(SourceError, match="has no UNet"):
        sdgraph.fit_forecast(object(), InheritFeatures.damped(2), ["a red circle"], **options)
    everything = replace(InheritFeatures.damped(2), schedule=Uniform(1))
    with pytest.raises(ScheduleError, match="nothing to fit in 3 calls"):
        sdgraph.fit_forecast(scenes, everything, ["a red circle"], **options)
    own, scenes.scheduler = scenes.scheduler, EulerAncestralDiscreteScheduler.from_config(scenes.scheduler.config)
    with pytest.raises(SourceError, match="adds random numbers"):
        sdgraph.fit_forecast(scenes, InheritFeatures.damped(2), ["a red circle"], **options)
    scenes.scheduler = own
