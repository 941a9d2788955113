"""Which generation a call belongs to: features never come from another one."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from scenes import models

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.errors import CallError, PathError
from sdgraph.passes import InheritFeatures

from ..loops import calls_that_compute

SCHEDULERS = {
    "ddim": DDIMScheduler.from_config,
    "pndm": partial(PNDMScheduler.from_config, skip_prk_steps=True),
    "heun": HeunDiscreteScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "euler ancestral": EulerAncestralDiscreteScheduler.from_config,
    "dpm++ 2m": DPMSolverMultistepScheduler.from_config,
    "dpm++ 2m karras": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    "dpm2 ancestral": KDPM2AncestralDiscreteScheduler.from_config,
    "unipc": UniPCMultistepScheduler.from_config,
    "lcm": LCMScheduler.from_config,
}

RANDOM = ("euler ancestral", "dpm2 ancestral", "lcm")  # samplers that add noise at every step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # diffusers' KDPM2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_calls_are_counted_under_every_scheduler(
    name: str, pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caching: GraphUNet,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    caching = copy.deepcopy(caching)  # which has warned of nothing yet
    counted = calls_that_compute(caching, monkeypatch)
    first = run(caching, steps=5)
    calls = len(pipe.scheduler.timesteps)
    expected = [i % 3 == 0 for i in range(calls)]
    if name in RANDOM:  # latents with new noise could be those of another image
        assert sum(counted) > sum(expected)
        assert "the latents of a call do not follow" in caplog.text
    else:
        assert counted == expected
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
    counted.clear()
    with sdgraph.attach(pipe):
        assert torch.equal(run(caching, steps=5), first) == (name not in RANDOM)
    assert counted == expected


@pytest.mark.law("Earlier generations never change an image.")
@pytest.mark.slow
def test_no_history_changes_an_image(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caching: GraphUNet
) -> None:
    """Interrupted, failed, other prompts, sizes, batches: the next image is that of a fresh module."""
    fresh = run(copy.deepcopy(caching))

    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return values

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    histories: list[Callable[[], Any]] = [
        lambda: run(caching, callback_on_step_end=interrupt),
        lambda: run(caching, prompt="a blue star", seed=1),
        lambda: run(caching, height=32, width=64),
        lambda: run(caching, num_images_per_prompt=2),
        lambda: run(caching, guidance_scale=1.0),
        lambda: run(caching, steps=1),
    ]
    for history in histories:
        history()
        assert torch.equal(run(caching), fresh)
    with pytest.raises(KeyboardInterrupt):
        run(caching, callback_on_step_end=fail)
    assert torch.equal(run(caching), fresh)


def call(seed: int, timestep: int, prompt: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"sample": scale * sample, "timestep": timestep, "encoder_hidden_states": prompt, "return_dict": False}


def test_a_generation_is_recognised_by_its_calls(caching: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = calls_that_compute(caching, monkeypatch)
    prompt, other = torch.randn(2, 1, 24, models.TEXT_WIDTH)
    with torch.no_grad():
        for timestep in (900, 800, 700, 600):
            caching(**call(0, timestep, prompt))
        assert counted == [True, False, False, True]
        counted.clear()
        caching(**call(0, 500, other))  # another prompt
        caching(**call(0, 500, prompt))  # goes on with the first
        caching(**call(0, 400, other))
        assert counted == [True, False, False]
        counted.clear()
        caching(**call(0, 900, prompt))  # the timestep rose
        caching(**call(0, 800, prompt))
        caching(**call(0, 800, prompt, scale=0.9))  # a repeated timestep with new latents, as PNDM and Heun have
        caching(**call(0, 800, prompt, scale=0.9))  # the same call again: an image begun anew
        assert counted == [True, False, False, True]
        counted.clear()
        caching(**call(0, 900, prompt))  # the timestep rose
        caching(**call(1, 900, prompt))  # another sample
        caching(**call(0, 800, prompt))
        caching(**call(1, 800, prompt))
        assert counted == [True, True, True, True]
        counted.clear()
        for timestep in (900, 800):
            caching(**call(0, timestep, prompt))
        counted.clear()
        prompt *= 2  # edited in place
        caching(**call(0, 700, prompt))
        caching.reset()
        caching(**call(0, 600, prompt))
        assert counted == [True, True]


@pytest.mark.law("A call that fails ends its generation.")
def test_a_failed_call_ends_its_generation(caching: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    failing = call(0, 800, prompt)
    with torch.no_grad():
        caching(**call(0, 900, prompt))
        with monkeypatch.context() as patch:
            patch.setattr(caching.backend, "module", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                caching(**failing)
        counted = calls_that_compute(caching, monkeypatch)
        caching(**call(0, 700, prompt))
        assert counted == [True]


@pytest.mark.slow
def test_values_are_kept_no_longer_than_the_prompt(whole: Graph) -> None:
    unet = sdgraph.apply(whole, InheritFeatures.deep_cache(3, branch=1))
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    with torch.no_grad():
        unet(**call(0, 900, prompt))
    (site,) = unet.graph.sites
    channels, side = 32, 16
    assert unet.cache_bytes() == 4 * channels * side * side
    del prompt
    gc.collect()
    assert unet.cache_bytes() == 0
    assert site == "up_blocks.3.resnets.1"


@pytest.mark.law("Threads share no features.")
def test_threads_do_not_meet(caching: GraphUNet) -> None:
    """Two threads with the same prompt object and other samples, their calls interleaved."""
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    turns = threading.Barrier(2)
    found: dict[int, list[torch.Tensor]] = {}

    def generate(unet: GraphUNet, seed: int, wait: bool) -> list[torch.Tensor]:
        outputs = []
        with torch.no_grad():
            for timestep in (900, 800, 700, 600):
                if wait:
                    turns.wait()
                outputs.append(unet(**call(seed + timestep, timestep, prompt))[0])
        return outputs

    threads = [threading.Thread(target=lambda s=s: found.update({s: generate(caching, s, True)})) for s in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        caching.reset()
        alone = generate(caching, seed, False)
        assert all(torch.equal(a, b) for a, b in zip(alone, found[seed], strict=True))


@pytest.mark.slow
def test_image_to_image_begins_anywhere(pipe: StableDiffusionPipeline, caching: GraphUNet) -> None:
    """At every strength, after every other: the image is that of a fresh module; attached or not."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    components = {**pipe.components, "unet": None, "image_encoder": None}
    other = StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def run(unet: Any, strength: float) -> torch.Tensor:
        other.unet = unet
        options = {"strength": strength, "num_inference_steps": 8, "output_type": "latent"}
        return other("a red circle", image, generator=torch.Generator().manual_seed(0), **options).images

    fresh = {s: run(copy.deepcopy(caching), s) for s in (0.3, 0.6, 1.0)}
    for strength in (0.3, 1.0, 0.6, 0.6, 0.3):
        assert torch.equal(run(caching, strength), fresh[strength])
    with sdgraph.attach(other):
        for strength in (0.3, 1.0, 0.6, 0.6, 0.3):
            assert torch.equal(run(caching, strength), fresh[strength])


def test_guidance_switched_off_midway(
    pipe: StableDiffusionPipeline, run: Callable[..., torch.Tensor], caching: GraphUNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The batch is another from there: everything is computed, then inherited again."""

    def off(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    options = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 8}
    counted = calls_that_compute(caching, monkeypatch)
    run(caching, **options)
    assert counted == [True, False, False, True, True, False, False, True]
    counted.clear()
    pipe.unet = caching
    with sdgraph.attach(pipe):  # the calls of the run go on being counted
        run(caching, **options)
    assert counted == [True, False, False, True, True, False, True, False]


def test_the_functional_form(caching: GraphUNet) -> None:
    """The values that the module keeps between calls are arguments and results instead."""
    prompt = torch.randn(1, 24, models.TEXT_WIDTH)
    copy_of = copy.deepcopy(caching)
    with torch.no_grad(), copy_of.expecting(4):
        values: dict[str, torch.Tensor] = {}
        for number, timestep in enumerate((900, 800, 700, 600)):
            given = {k: v for k, v in call(number, timestep, prompt).items() if k != "return_dict"}
            output, fresh = caching.compute(values if number % 3 else {}, **given)
            values |= fresh
            assert torch.equal(output, copy_of(**given)[0])
        assert caching.cache_bytes() == 0
        assert list(values) == list(caching.graph.sites)
        with pytest.raises(PathError, match="no value of a site 'mid_block'"):
            caching.compute(values, ["mid_block"], **given)
        with pytest.raises(CallError, match=r"sample is torch\.float64"):
            caching.compute({}, **{**given, "sample": given["sample"].double()})
