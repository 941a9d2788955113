"""Exported UNets that inherit features: whole generations equal PyTorch's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from scenes.pipeline import load

import sdgraph
from sdgraph.errors import CallError, ModeError
from sdgraph.evaluation import metrics as similarity
from sdgraph.exporters.onnx import export
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import Explicit

from ..models import ONE_LEVEL, answer, build, call_of
from ..pipelines import PIPELINES, make
from .exports import LONG, PRESETS, TWO_LEVELS, Exported, opened, source

pytestmark = pytest.mark.slow

SCHEDULERS = (
    DDIMScheduler,
    PNDMScheduler,
    HeunDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)


def latents(pipe: Any, unet: Any, scheduler: Any = None, **options: Any) -> torch.Tensor:
    """Of a generation of some steps, with the pipeline left as it was."""
    own = copy.copy(pipe)
    own.unet = unet
    if scheduler is not None:
        own.scheduler = scheduler.from_config(pipe.scheduler.config)
    call = {**PIPELINES["text"][1], "output_type": "latent", **options}
    with sdgraph.attach(own) if hasattr(unet, "generations") else contextlib.nullcontext():
        return make(own, call, steps=6, output_type="latent")


@pytest.mark.law("Generations on ONNX Runtime equal PyTorch's within the bounds of the export.")
@pytest.mark.parametrize("name", [pytest.param(each, marks=LONG * (each != "deep cache")) for each in PRESETS])
def test_generations_equal_pytorchs(pipe: Any, exported: Callable[[str], Exported], provider: str, name: str) -> None:
    """At two shapes and batches."""
    unet, directory, _ = exported(name)
    running = opened(directory, provider)
    for options in ({}, {"num_images_per_prompt": 1, "height": 24, "width": 40}):
        mine, theirs = latents(pipe, running, **options), latents(pipe, unet, **options)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert running.cache_bytes() == 0  # freed with the last call
    if name != "all passes":  # something was inherited
        assert (latents(pipe, running) - latents(pipe, source(name))).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_under_every_scheduler(pipe: Any, exported: Callable[[str], Exported], scheduler: Any) -> None:
    unet, directory, _ = exported("deep cache")
    mine, theirs = (latents(pipe, each, scheduler) for each in (opened(directory), unet))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["controlnet", "xl-text", "image", "inpaint-9", "lcm"])
def test_in_other_pipelines(name: str, tmp_path: Path) -> None:
    pipe, call = PIPELINES[name][0](), PIPELINES[name][1]
    if name == "xl-text":
        pipe.unet = build("sdxl", **TWO_LEVELS)
    unet = sdgraph.apply(pipe.unet, "HoistInvariants, InheritFeatures.deep_cache(2)", verify=False)
    inputs = ("mid_block_additional_residual", "down_block_additional_residuals") if name == "controlnet" else ()
    export(unet, tmp_path / "bundle", calls=5, inputs=inputs, progress=False)
    images = []
    for each in (unet, opened(tmp_path / "bundle")):
        pipe.unet = each
        with sdgraph.attach(pipe):
            images.append(make(pipe, call, steps=5))
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-3)


@pytest.mark.law("On ONNX Runtime, too, no generation reuses features of another one.")
def test_nothing_comes_from_another_generation(exported: Callable[[str], Exported], provider: str) -> None:
    """The driver is that of the PyTorch module; here are a batch that changes, an interruption, and another prompt."""
    unet, directory, _ = exported("deep cache")
    running = opened(directory, provider)
    call = call_of(unet, L=77)
    other = call_of(unet, L=77, B=1, seed=3)
    for step, given in enumerate((call, call, call, other, call, other, other, call)):
        now = {**given, "timestep": 900 - 10 * step}
        torch.testing.assert_close(answer(running, now), answer(unet, now), rtol=1e-4, atol=1e-5)
    running.reset()
    unet.reset()
    assert running.cache_bytes() == 0
    with pytest.raises(CallError):
        running(**{**call, "sample": call["sample"][:, :3]})


def test_a_kind_of_call_that_was_not_exported_computes_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = "down_blocks.0.resnets.0", "up_blocks.0.resnets.0"
    passes = [InheritFeatures(first, Explicit((0, 1))), InheritFeatures(second, Explicit((0, 1, 2)))]
    unet = sdgraph.apply(build(**ONE_LEVEL), passes, verify=False)
    export(unet, tmp_path / "short", calls=3, progress=False)  # so that there is no call that inherits both
    running = opened(tmp_path / "short")
    assert [set(model.reads) for model in running.manifest.variants] == [set(), {first}]
    call = call_of(unet)
    for step in range(5):
        mine, theirs = (answer(each, {**call, "timestep": 900 - step}) for each in (running, unet))
        if step < 3:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert "variant_1.onnx computes more" in caplog.text
    once = sdgraph.apply(build(**ONE_LEVEL), passes[0], verify=False)
    for step in range(5):
        expected = answer(once, {**call, "timestep": 900 - step})
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_images_of_the_trained_model(tmp_path: Path) -> None:
    """At least 50 dB between ONNX Runtime's images and PyTorch's."""
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    unet = sdgraph.apply(pipe.unet, InheritFeatures.deep_cache(3), verify=False)
    export(unet, tmp_path / "trained", calls=10, progress=False)
    images = []
    for each in (unet, opened(tmp_path / "trained")):
        pipe.unet = each
        with sdgraph.attach(pipe):
            generator = torch.Generator().manual_seed(1)
            caption = "a large red circle left of a small blue square"
            images.append(pipe([caption] * 2, num_inference_steps=10, generator=generator, output_type="np").images)
    assert similarity.psnr(*images) > 50


def test_attaching_takes_what_inherits(exported: Callable[[str], Exported], pipe: Any) -> None:
    own = copy.copy(pipe)
    own.unet = opened(exported("deep cache")[1])
    with sdgraph.attach(own):
        pass
    with pytest.raises(ModeError, match="object as its unet"):
        sdgraph.attach(SimpleNamespace(unet=object(), scheduler=None))
