"""Shared by all tests: traces of the tiny models, made once per session, and hypothesis' profile."""

from __future__ import annotations

import functools
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from scenes import models

import sdgraph

from .models import ONE_LEVEL, build

for profile, examples in (("sdgraph", 10), ("thorough", 50)):  # `make test-long` takes the thorough one
    hypothesis.settings.register_profile(
        profile, deadline=None, max_examples=examples, derandomize="CI" in os.environ, print_blob=True
    )
hypothesis.settings.load_profile("sdgraph")

Pair = tuple[UNet2DConditionModel, sdgraph.GraphUNet]


def pytest_collection_finish() -> None:
    """Leave the half million objects of the imported libraries out of garbage collection, a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Pair]:
    """A tiny UNet by architecture and its trace. Shared: call them, never change them."""

    @functools.cache
    def pair(name: str) -> Pair:
        unet = build(name)
        return unet, sdgraph.GraphUNet(sdgraph.trace(unet))

    return pair


@pytest.fixture(scope="session")
def unet(traced: Callable[[str], Pair]) -> UNet2DConditionModel:
    """A tiny UNet. Leave it as it is."""
    return traced("sd15")[0]


@pytest.fixture
def graph(traced: Callable[[str], Pair]) -> sdgraph.Graph:
    """Its graph, to edit."""
    return traced("sd15")[1].graph.copy()


@pytest.fixture(scope="session")
def small() -> sdgraph.Graph:
    """The graph of a UNet of one level, for passes to be applied to. Leave it as it is; passes do."""
    return sdgraph.trace(build(**ONE_LEVEL))


@pytest.fixture(scope="session")
def reusing_folder(tmp_path_factory: pytest.TempPathFactory, small: sdgraph.Graph) -> Path:
    """The folder of a saved UNet that reuses features. To be read only."""
    folder = tmp_path_factory.mktemp("saved") / "unet"
    sdgraph.apply(small, "CleanUp, InheritFeatures('up_blocks.-1.resnets.-1')", verify=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, small: sdgraph.Graph) -> Path:
    """A bundle of a UNet that reuses features. To be read only."""
    pytest.importorskip("onnxruntime")
    from sdgraph.exporters import onnx

    folder = tmp_path_factory.mktemp("exported") / "bundle"
    passes = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"
    onnx.export(sdgraph.apply(small, passes, verify=False), folder, calls=4, progress=False)
    return folder


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """A pipeline of the scenes' architecture with random weights. Leave it as it is."""
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    pipe = models.pipeline(tokenizer, models.text_encoder(tokenizer), models.vae(), models.unet())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def whole(pipe: StableDiffusionPipeline) -> sdgraph.Graph:
    """The graph of the pipeline's UNet. Leave it as it is; passes do."""
    return sdgraph.trace(pipe.unet)


@pytest.fixture
def run(pipe: StableDiffusionPipeline) -> Iterator[Callable[..., torch.Tensor]]:
    """`run(unet, prompt=..., steps=..., seed=...)`: the final latents; the pipeline is as it was."""
    own, scheduler = pipe.unet, pipe.scheduler

    def latents(unet: Any, prompt: str = "a red circle", steps: int = 5, seed: int = 0, **call: Any) -> torch.Tensor:
        pipe.unet = unet
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **call).images

    yield latents
    pipe.unet, pipe.scheduler = own, scheduler


@pytest.fixture
def ways_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `engines.compare` run its ways here: each of its processes imports PyTorch and diffusers anew."""

    from sdgraph.exporters import engines

    def failure(self: Any, command: list[str]) -> str | None:
        try:
            engines._measure(Path(command[-1]))
        except Exception as error:
            return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        return None

    monkeypatch.setattr(engines._Measured, "_failure", failure)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
