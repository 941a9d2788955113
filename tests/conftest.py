"""Shared by all tests: traces of the tiny models, made once per session, and hypothesis' profile."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import hypothesis
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from scenes import models

import sdgraph

from .models import build

hypothesis.settings.register_profile(
    "sdgraph", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("sdgraph")

Pair = tuple[UNet2DConditionModel, sdgraph.GraphUNet]


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Pair]:
    """A tiny UNet by architecture and its trace. Shared: call them, never change them."""

    @functools.cache
    def pair(name: str) -> Pair:
        unet = build(name)
        return unet, sdgraph.GraphUNet(sdgraph.trace(unet))

    return pair


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """A pipeline of the scenes' architecture with random weights. Leave it as it is."""
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    pipe = models.pipeline(tokenizer, models.text_encoder(tokenizer), models.vae(), models.unet())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
