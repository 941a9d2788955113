"""The inputs beside the latents and the text: masks, residuals, image prompts, added conditions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.models.attention_processor import AttnProcessor

from sdgraph.errors import CallError

from ..models import (
    CALLS,
    FEW,
    answer,
    build,
    call_of,
    load_ip_adapter,
    perturbed,
    trace,
)


def test_autocast_with_adapter_residuals(traced: Any) -> None:
    """diffusers adds them in place, so they take on the dtype of what they are added to."""
    unet, graph = traced("sd15")
    residuals = [torch.randn(2, 16, 8, 12), torch.randn(2, 32, 4, 6)]
    call = {**call_of(unet), "down_intrablock_additional_residuals": residuals}
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(CallError, match=r"residual_0 is torch\.float32, autocast computes in torch\.bfloat16"):
            answer(graph, call)
        call["down_intrablock_additional_residuals"] = [residual.bfloat16() for residual in residuals]
        assert torch.equal(answer(unet, call), answer(graph, call))


@pytest.mark.slow
@pytest.mark.parametrize("vanilla", [False, True])
def test_encoder_attention_mask(vanilla: bool) -> None:
    unet = build()
    if vanilla:
        unet.set_attn_processor(AttnProcessor())
    graph = trace(unet, inputs=("encoder_attention_mask",))
    for sizes in FEW:
        call = call_of(unet, **sizes)
        plain = answer(unet, call)
        assert torch.equal(plain, answer(graph, call))  # the mask stays optional
        mask = torch.rand(call["encoder_hidden_states"].shape[:2]) > 0.5
        for given in (mask, mask.long(), mask.float()):
            call["encoder_attention_mask"] = given
            expected = answer(unet, call)
            assert torch.equal(expected, answer(graph, call))
            assert not torch.equal(expected, plain)


@pytest.mark.parametrize("name", ["sd15", "sd15-levels", "sdxl"])
def test_controlnet(name: str, traced: Any) -> None:
    unet, graph = traced(name)
    control = perturbed(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)))
    for sizes in ({}, {"B": 65, "H": 8, "W": 8}, {"B": 1, "H": 10, "W": 14, "timestep": 0.5}):
        call = call_of(unet, **sizes)
        B, _, H, W = call["sample"].shape
        with torch.no_grad():
            down, mid = control(**call, controlnet_cond=torch.rand(B, 3, 2 * H, 2 * W), return_dict=False)
        plain = answer(unet, call)
        call |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        expected = answer(unet, call)
        assert torch.equal(expected, answer(graph, call))
        assert not torch.equal(expected, plain)


@pytest.mark.parametrize(
    ("name", "kind", "channels"),
    [("sd15-levels", "full_adapter", [16, 16, 32, 32]), ("sdxl", "full_adapter_xl", [16, 32, 32, 32])],
)
def test_t2i_adapter(name: str, kind: str, channels: list[int], traced: Any) -> None:
    """The XL adapter has one residual more than there are down blocks; it is added after the mid block."""
    unet, graph = traced(name)
    factor = 16 if kind.endswith("xl") else 8
    adapter = T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind).eval()
    for sizes in ({}, {"B": 1, "H": 16, "W": 24}):
        call = call_of(unet, **sizes)
        B, _, H, W = call["sample"].shape
        with torch.no_grad():
            residuals = adapter(torch.rand(B, 3, 8 * H, 8 * W))
        plain = answer(unet, call)
        call["down_intrablock_additional_residuals"] = residuals
        expected = answer(unet, call)
        assert not torch.equal(expected, plain)
        assert torch.equal(expected, answer(graph, call))
        for count in (1, 2, 3):  # fewer residuals than blocks
            call["down_intrablock_additional_residuals"] = residuals[:count]
            assert torch.equal(answer(unet, call), answer(graph, call))
        del call["down_intrablock_additional_residuals"]
        call["down_block_additional_residuals"] = residuals
        with pytest.warns(FutureWarning, match="T2I"):
            assert torch.equal(expected, answer(graph, call))


def test_controlnet_and_adapter_together(traced: Any) -> None:
    unet, graph = traced("sd15")
    call = call_of(unet)
    call |= {
        "down_intrablock_additional_residuals": [torch.randn(2, 16, 8, 12), torch.randn(2, 32, 4, 6)],
        "down_block_additional_residuals": tuple(
            torch.randn(2, c, h, w) for c, h, w in ((16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6))
        ),
        "mid_block_additional_residual": torch.randn(2, 32, 4, 6),
    }
    assert torch.equal(answer(unet, call), answer(graph, call))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kinds", "scale"), [(("base",), 1.0), (("plus",), 1.0), (("base", "plus"), 0.4), (("base",), 0.0)], ids=str
)
def test_ip_adapter(kinds: tuple[str, ...], scale: float, dtype: torch.dtype) -> None:
    unet = load_ip_adapter(build(), *kinds, scale=scale)
    graph = trace(unet).to(dtype)
    unet.to(dtype)
    for sizes, images, tokens in ((CALLS[0], 1, 5), (CALLS[2], 3, 1), (CALLS[5], 2, 9)):
        call = call_of(unet, **sizes)
        B = len(call["sample"])
        shapes = [(B, images, 14) if kind == "base" else (B, images, tokens, 14) for kind in kinds]
        call["added_cond_kwargs"] = {"image_embeds": [torch.randn(shape).to(dtype) for shape in shapes]}
        assert torch.equal(answer(unet, call), answer(graph, call))


@pytest.mark.parametrize("kind", ["base", "face"])
@pytest.mark.parametrize("images", [1, 2])
def test_image_embeddings_of_one_token(kind: str, images: int) -> None:
    """Those of faces have a dimension more, which diffusers flattens."""
    unet = load_ip_adapter(build(), kind)
    graph, call = trace(unet), call_of(unet)
    for shape in ((2, images, 14), (2, images, 1, 14)):
        call["added_cond_kwargs"] = {"image_embeds": [torch.randn(shape)]}
        assert torch.equal(answer(unet, call), answer(graph, call))
    call["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, images, 3, 14)]}
    with pytest.raises(CallError, match="image_embeds_0 has shape"):
        answer(graph, call)


def test_the_added_widths_must_add_up(traced: Any) -> None:
    unet, graph = traced("sdxl")
    call = call_of(unet)
    call["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 5)}
    assert torch.equal(answer(unet, call), answer(graph, call))  # 24 + 5 * 8 is what the model takes as well
    call["added_cond_kwargs"]["time_ids"] = torch.ones(2, 4)
    with pytest.raises(CallError, match=r"T \+ N\*8 == 64.*N=4, T=24"):
        answer(graph, call)
