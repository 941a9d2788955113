"""A pipeline that is analysed within a second."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from scenes import models

from ..models import build
from ..pipelines import vae


@pytest.fixture(scope="session")
def tiny() -> StableDiffusionPipeline:
    """A pipeline with a UNet of two levels. Leave it as it is."""
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    unet = build(cross_attention_dim=models.TEXT_WIDTH)
    pipe = models.pipeline(tokenizer, models.text_encoder(tokenizer).eval(), vae(), unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe
