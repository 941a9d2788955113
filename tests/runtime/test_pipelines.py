"""Drop-in: `pipe.unet = sdgraph.apply(pipe.unet)` changes no bit of what a diffusers pipeline makes."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

import sdgraph

from ..models import build, load_ip_adapter
from ..pipelines import PIPELINES, make

FIRST = ("text", "image", "inpaint-9", "controlnet", "xl-text", "lcm", "ip-adapter")

REST = [pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES if name not in FIRST]


@pytest.mark.law("A pipeline makes the same images with a traced UNet, bit for bit.")
@pytest.mark.slow
@pytest.mark.parametrize("name", [*FIRST, *REST])
def test_same_images(name: str) -> None:
    build_pipe, call = PIPELINES[name]
    pipe = build_pipe()
    expected = make(pipe, call)
    pipe.unet = sdgraph.apply(pipe.unet)
    assert isinstance(pipe.unet, sdgraph.GraphUNet)
    found = make(pipe, call)
    assert torch.equal(expected, found)
    assert expected.isfinite().all()
    assert torch.equal(found, make(pipe, call))  # nothing is left over from the run before


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler, diffusers.PNDMScheduler])
def test_schedulers_that_call_in_other_ways(scheduler: Any) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = make(pipe, call, steps=5)
    pipe.unet = sdgraph.apply(pipe.unet)
    assert torch.equal(expected, make(pipe, call, steps=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casting_the_pipeline(dtype: torch.dtype) -> None:
    build_pipe, call = PIPELINES["text"]
    source, pipe = build_pipe().to(dtype), build_pipe()
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.to(dtype)
    assert pipe.unet.dtype is dtype
    call = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    assert torch.equal(make(source, call), make(pipe, call))


def test_image_prompts_are_counted_and_told_apart() -> None:
    unet = sdgraph.apply(load_ip_adapter(build(), "base", "plus"))
    layers = unet.encoder_hid_proj.image_projection_layers
    assert [isinstance(layer, diffusers.models.embeddings.ImageProjection) for layer in layers] == [True, False]
    assert len(copy.deepcopy(unet).encoder_hid_proj.image_projection_layers) == 2


@pytest.mark.slow
def test_saved_and_loaded_inside_a_pipeline(tmp_path: Any) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    expected = make(pipe, call)
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, sdgraph.GraphUNet)
    assert torch.equal(expected, make(loaded, call))
