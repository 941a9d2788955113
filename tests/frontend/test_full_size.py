"""The released sizes, from their configurations with random weights. `make test-full` runs them: minutes, gigabytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph.passes import PruneBlocks

from ..models import ATTEND, PLAIN, answer
from ..passes.test_prune_blocks import PRESETS, student

pytestmark = pytest.mark.full

UP, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
SD15: dict[str, Any] = {"cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
SD21: dict[str, Any] = {
    **SD15,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "sample_size": 96,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, ATTEND, ATTEND),
    "up_block_types": (UP, UP, UP_PLAIN),
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER: dict[str, Any] = {
    **SDXL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (PLAIN, ATTEND, ATTEND, PLAIN),
    "up_block_types": (UP_PLAIN, UP, UP, UP_PLAIN),
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
# Parameters in millions, as published.
MODELS = {"sd15": (SD15, 859.5), "sd21": (SD21, 865.9), "sdxl": (SDXL, 2567.5), "refiner": (REFINER, 2259.5)}


@pytest.fixture(scope="module", params=MODELS)
def unet(request: pytest.FixtureRequest) -> Iterator[UNet2DConditionModel]:
    config, millions = MODELS[request.param]
    torch.set_default_dtype(torch.bfloat16 if millions > 1000 else torch.float32)  # 24 GB should do
    try:
        model = UNet2DConditionModel(**config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    yield model
    del model
    gc.collect()


def call_of(unet: UNet2DConditionModel, B: int, H: int, W: int, L: int) -> dict[str, Any]:
    generator, dtype = torch.Generator().manual_seed(0), next(unet.parameters()).dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    call: dict[str, Any] = {"sample": noise(B, 4, H, W), "timestep": 501}
    call["encoder_hidden_states"] = noise(B, L, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type:
        ids = 6 if unet.config.cross_attention_dim == 2048 else 5
        call["added_cond_kwargs"] = {"text_embeds": noise(B, 1280), "time_ids": torch.full((B, ids), 512.0).to(dtype)}
    return call


def test_exact_and_without_a_copy(unet: UNet2DConditionModel) -> None:
    traced = sdgraph.apply(unet, [], verify=False)
    shared = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    assert all(p.untyped_storage().data_ptr() in shared for p in traced.parameters())
    assert traced.state_dict().keys() == unet.state_dict().keys()
    for sizes in ((2, 16, 24, 77), (1, 17, 9, 11)):
        call = call_of(unet, *sizes)
        assert torch.equal(answer(traced, call), answer(unet, call))


def test_presets_are_the_plain_models(unet: UNet2DConditionModel) -> None:
    if unet.config.cross_attention_dim not in (768, 1024):
        pytest.skip("BK-SDM's presets are for SD 1.x and 2.x")
    for preset in PRESETS:
        pruned = sdgraph.apply(unet, [PruneBlocks(preset)], verify=False)
        expected = student(unet, preset)
        call = call_of(unet, 1, 16, 8, 77)
        assert torch.equal(answer(pruned, call), answer(expected, call))
        del pruned, expected
        gc.collect()
