"""Schedulers that several pipelines, or loops of the caller, use while attached."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import sdgraph
from sdgraph import Graph
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import Explicit, Uniform, Warm

from ..loops import calls_that_compute
from ..models import CROSS, build


@pytest.mark.slow
@pytest.mark.parametrize("order", ["text first", "image first"])
def test_pipelines_that_share_a_scheduler(
    order: str, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, whole: Graph
) -> None:
    """As `pipe.components` makes them: each knows how many calls it made last, and only one of them is running."""
    unet = sdgraph.apply(whole, InheritFeatures("mid_block", Warm(Uniform(4), last=1)), verify=False)
    text = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    image = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    for each in (text, image):
        each.set_progress_bar_config(disable=True)
    calls = calls_that_compute(unet, monkeypatch)
    start = torch.rand(1, 3, 64, 64)
    for each in (text, image) if order == "text first" else (image, text):
        sdgraph.attach(each)
    for _ in range(2):
        image("a red circle", start, strength=0.5, num_inference_steps=8, output_type="latent")
        text("a red circle", num_inference_steps=7, output_type="latent")
        assert [i for i, full in enumerate(calls) if full] == [0, 3, 4, 8, 10]
        calls.clear()


@pytest.mark.slow
def test_a_loop_of_ones_own_on_an_attached_scheduler(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, whole: Graph
) -> None:
    unet = sdgraph.apply(whole, InheritFeatures.deep_cache(3, branch=1), verify=False)
    text = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    text.set_progress_bar_config(disable=True)
    calls = calls_that_compute(unet, monkeypatch)
    with sdgraph.attach(text):
        text("a red circle", num_inference_steps=4, output_type="latent")
        calls.clear()
        prompt, _ = text.encode_prompt("a red circle", "cpu", 1, False)
        text.scheduler.set_timesteps(10)
        for seed in range(2):  # one image after the other, with one prompt
            latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
            for timestep in text.scheduler.timesteps:
                with torch.no_grad():
                    output = unet(latents, timestep, prompt).sample
                latents = text.scheduler.step(output, timestep, latents).prev_sample
            if isinstance(text.scheduler, DPMSolverMultistepScheduler):
                text.scheduler._step_index = None
    assert calls == [i % 3 == 0 for i in range(10)] * 2


def test_a_run_that_ends_early_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's `denoising_end`: the schedule is laid over the calls that are made."""
    unet = sdgraph.apply(build("sdxl"), InheritFeatures("mid_block", Explicit((0, 3), of=6)), verify=False)
    pipe = StableDiffusionXLPipeline(None, None, None, None, None, unet, DDIMScheduler())  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    calls = calls_that_compute(unet, monkeypatch)
    prompts = {"prompt_embeds": torch.randn(1, 5, CROSS), "pooled_prompt_embeds": torch.randn(1, 16)}
    with sdgraph.attach(pipe):
        pipe(
            **prompts, num_inference_steps=10, denoising_end=0.6, guidance_scale=1.0, output_type="latent",
            height=64, width=64,
        )  # fmt: skip
    assert [i for i, full in enumerate(calls) if full] == [0, 3]
    assert len(calls) == 6
