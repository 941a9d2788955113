"""A pipeline that is attached tells its UNet which call of which run comes."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.errors import ModeError, ScheduleError
from sdgraph.inheritance.attach import EXCHANGING
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import DenseLate, SamplingRun

from ..documents import ROOT
from ..loops import calls_that_compute


@pytest.mark.slow
def test_a_schedule_that_depends_on_the_run_is_told_it(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, whole: Graph
) -> None:
    unet = sdgraph.apply(whole, InheritFeatures("mid_block", DenseLate(3)))
    with pytest.raises(ScheduleError, match=r"needs to know the calls(.*\n)*.*expecting"):
        run(unet, steps=8)
    counted = calls_that_compute(unet, monkeypatch)
    pipe.scheduler.set_timesteps(8)
    timesteps = pipe.scheduler.timesteps
    with unet.expecting(timesteps):
        run(unet, steps=8)
    assert [i for i, full in enumerate(counted) if full] == list(DenseLate(3).calls(SamplingRun(8)))


@pytest.mark.slow
def test_an_attached_pipeline_tells_the_run(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, whole: Graph
) -> None:
    """Also to a schedule that needs to know it, whatever the scheduler; and nothing is kept after the last call."""
    unet = sdgraph.apply(whole, InheritFeatures("mid_block", DenseLate(3)))
    counted = calls_that_compute(unet, monkeypatch)
    prompt, _ = pipe.encode_prompt("a red circle", "cpu", 1, False)
    pipe.unet = unet
    with sdgraph.attach(pipe):
        for scheduler in (DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler):
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
            counted.clear()
            run(unet, None, steps=8, prompt_embeds=prompt, guidance_scale=1.0)
            known = SamplingRun.of(pipe.scheduler.timesteps)
            assert [i for i, full in enumerate(counted) if full] == list(DenseLate(3).calls(known))
            assert unet.cache_bytes() == 0
    with pytest.raises(ScheduleError, match="needs to know the calls"):
        run(unet)


@pytest.mark.law("With an attached scheduler no value is read back from the device between calls.")
def test_no_value_is_read_once_attached(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caching: GraphUNet
) -> None:
    """Reading a timestep would stop a GPU. All of them are read once per generation."""
    expected = run(caching)

    class Unread(torch.utils._python_dispatch.TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def reads(unet: Any) -> list[int]:
        found, forward = [], unet.run

        def counting(flat: Any) -> torch.Tensor:
            with Unread() as mode:
                result = forward(flat)
            found.append(mode.reads)
            return result

        unet.run = counting
        try:
            assert torch.equal(run(unet), expected)
        finally:
            del unet.run
        return found

    assert sum(reads(caching)) > 0
    with sdgraph.attach(pipe):
        assert reads(caching)[1:] == [0] * 4


@pytest.mark.slow
def test_two_pipelines_on_one_unet(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caching: GraphUNet
) -> None:
    """The second makes an image within every step of the first."""
    fresh = run(copy.deepcopy(caching))
    second = StableDiffusionPipeline(**{**pipe.components, "unet": caching}, requires_safety_checker=False)
    second.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    second.set_progress_bar_config(disable=True)

    def between(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        second("a blue star", num_inference_steps=2, generator=generator, output_type="latent")
        return values

    assert torch.equal(run(caching, callback_on_step_end=between), fresh)
    pipe.unet = caching
    with sdgraph.attach(pipe), sdgraph.attach(second):
        assert torch.equal(run(caching, callback_on_step_end=between), fresh)
    assert caching.tracker.position_sources == []


def test_what_cannot_be_attached(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ModeError, match="UNet2DConditionModel as its unet"):
        sdgraph.attach(pipe)
    with pytest.raises(ModeError, match="no unet"):
        sdgraph.attach(object())


@pytest.mark.parametrize("name", EXCHANGING)
def test_pipelines_that_exchange_processors_are_refused(name: str, caching: GraphUNet) -> None:
    kind = getattr(diffusers, name)
    pipe = kind.__new__(type(f"My{name}", (kind,), {}))  # also a class of one's own
    vars(pipe).update(unet=caching, scheduler=DDIMScheduler(), _internal_dict={})
    with pytest.raises(ModeError, match="exchanges the processors"):
        sdgraph.attach(pipe)


def test_an_attached_pipeline_is_not_kept(pipe: StableDiffusionPipeline, caching: GraphUNet) -> None:
    other = StableDiffusionPipeline(**{**pipe.components, "unet": caching}, requires_safety_checker=False)
    sdgraph.attach(other)
    assert len(caching.tracker.position_sources) == 1
    del other
    gc.collect()
    assert caching.tracker.position_sources == []


SCRIPT = """
import sys
from diffusers import DiffusionPipeline
import sdgraph

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.unet = sdgraph.apply(pipe.unet, "InheritFeatures.damped(2)", verify=False)
sdgraph.attach(pipe)
pipe("a large red circle", num_inference_steps=2, output_type="latent", height=64, width=64)
"""


@pytest.mark.slow
def test_a_script_that_stays_attached_ends_quietly() -> None:
    """When Python ends, it clears modules and then objects, of which some expect a notice that others are gone."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(ROOT / "examples/scenes/model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr
