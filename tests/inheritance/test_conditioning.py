"""Conditioning that is edited in place between calls is noticed; what is unchanged is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from torch import Tensor

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.passes import HoistInvariants

from ..loops import Loop
from ..models import CROSS


def by_numpy(prompt: Tensor) -> None:
    prompt.numpy()[:] *= 2


def by_data(prompt: Tensor) -> None:
    prompt.data.mul_(2)


def in_place(prompt: Tensor) -> None:
    prompt.mul_(2)


@pytest.mark.law("A prompt that is edited in place begins a new generation.")
@pytest.mark.parametrize("edit", [in_place, by_data, by_numpy])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edited_prompt_is_noticed(edit: Callable[[Tensor], None], mode: Any, unet: Any, hoisting: Any) -> None:
    with mode():
        prompt = torch.randn(1, 5, CROSS)
        loop = Loop(hoisting, 0, prompt)
        for timestep in (900, 800):
            loop(timestep)
        edit(prompt)
        latents = loop.latents
        assert torch.equal(loop(700), unet(latents, 700, prompt).sample)


@pytest.mark.slow
def test_an_edited_prompt_is_noticed_in_an_attached_pipeline(pipe: StableDiffusionPipeline, whole: Graph) -> None:
    def edit(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            values["prompt_embeds"].mul_(0.5)
        return values

    def run(unet: Any) -> Tensor:
        own, pipe.unet = pipe.unet, unet
        options = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        with torch.inference_mode():
            images: Tensor = pipe(
                "a red circle", num_inference_steps=5, generator=torch.Generator().manual_seed(0),
                output_type="latent", **options,
            ).images  # fmt: skip
        pipe.unet = own
        return images

    hoisting = sdgraph.apply(whole, HoistInvariants(), verify=False)
    expected = run(pipe.unet)
    assert torch.equal(run(hoisting), expected)
    own, pipe.unet = pipe.unet, hoisting
    with sdgraph.attach(pipe):
        pipe.unet = own
        assert torch.equal(run(hoisting), expected)


def test_invariants_serve_all_samples_with_one_prompt(hoisting: GraphUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values depend on the prompt alone: they are computed once, whoever comes with it."""
    prompt, hoisted = torch.randn(1, 5, CROSS), frozenset(hoisting.graph.sites)
    reused: list[frozenset[str]] = []
    module = hoisting.backend.module
    monkeypatch.setattr(hoisting.backend, "module", lambda given, sites: reused.append(sites) or module(given, sites))
    for loop, timestep in itertools.product((Loop(hoisting, 0, prompt), Loop(hoisting, 1, prompt)), (900, 800)):
        loop(timestep)
    assert reused == [frozenset(), *[hoisted] * 3]
