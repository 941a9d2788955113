"""Pipelines around an exported UNet, without the weights of the UNet that it replaces."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdgraph.exporters.ort import load_pipeline

from ..documents import ROOT
from ..pipelines import PIPELINES, make
from .exports import Exported, opened

pytestmark = pytest.mark.slow

TEXTLESS: Any = {"text_encoder": None, "tokenizer": None}  # diffusers asks for what a saved pipeline did not have


@pytest.fixture
def folder(pipe: Any, tmp_path: Path) -> Path:
    """The tiny pipeline on disk."""
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("kept", [True, False], ids=["with the UNet on disk", "without"])
def test_a_pipeline_is_loaded_around_an_exported_unet(
    pipe: Any, folder: Path, exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    if not kept:
        shutil.rmtree(folder / "unet")
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("reads the UNet"))
    unet = opened(exported("sd15").directory)
    loaded = load_pipeline(folder, unet, **TEXTLESS)
    assert type(loaded) is type(pipe)
    assert loaded.unet is unet
    loaded.set_progress_bar_config(disable=True)
    call = {**PIPELINES["text"][1], "output_type": "latent"}
    size = {name: call.pop(name) for name in ("height", "width")}
    own = type(pipe).from_pipe(pipe, unet=unet)
    for options in (call, call | size):  # without sizes those of the exported UNet
        assert torch.equal(make(loaded, options, steps=2), make(own, options, steps=2))


def test_it_is_saved_without_the_unet_and_loaded_around_the_bundle_again(
    folder: Path, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    unet = opened(exported("sd15").directory)
    load_pipeline(folder, unet, **TEXTLESS).save_pretrained(tmp_path / "rest")
    assert not (tmp_path / "rest/unet").exists()
    again = load_pipeline(tmp_path / "rest", unet, **TEXTLESS)
    again.set_progress_bar_config(disable=True)
    call = {**PIPELINES["text"][1], "output_type": "latent"}
    first = load_pipeline(folder, unet, **TEXTLESS)
    first.set_progress_bar_config(disable=True)
    assert torch.equal(make(again, call, steps=2), make(first, call, steps=2))


def test_options_reach_diffusers(exported: Callable[[str], Exported]) -> None:
    unet = opened(exported("sd15").directory)
    loaded = load_pipeline(ROOT / "examples/scenes/model", unet, text_encoder=None)
    assert loaded.text_encoder is None
    assert loaded.vae.dtype is unet.dtype


def test_a_warmed_bundle_opens_no_session_afterwards(exported: Callable[[str], Exported]) -> None:
    unet = opened(exported("deep cache").directory)
    unet.warm_up(16, 24, tokens=7)
    ready = dict(unet.backend.open_sessions._open)
    assert len(ready) == len(unet.manifest.variants)
    prompt = torch.randn(2, 7, unet.config.cross_attention_dim)
    with unet.expecting(6):
        for timestep in range(600, 0, -100):
            unet(torch.randn(2, 4, 16, 24), timestep, prompt)
    assert unet.backend.open_sessions._open == ready
