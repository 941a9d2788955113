"""UNets of released configurations with random weights, whose values do not matter for speed and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

# The fields of `unet/config.json` of the released checkpoints that differ from the defaults of the class.
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {  # for smoke tests of the benchmarks
        "sample_size": 16,
        "block_out_channels": (16, 16, 32, 32),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
    },
    "small": {
        "sample_size": 32,
        "block_out_channels": (32, 64, 128, 128),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def build(name: str, device: str, dtype: torch.dtype, **changes: Any) -> UNet2DConditionModel:
    """Create a UNet in inference mode. Its memory is allocated only once, in `dtype`.

    Args:
        name: a name of `CONFIGURATIONS`.
        device: the device of the weights.
        dtype: the dtype of the weights.
        changes: fields of the configuration to change.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**CONFIGURATIONS[name], **changes})
    torch.nn.Module.to(unet, dtype).to_empty(device=device)  # diffusers' `to` warns about a cast
    torch.manual_seed(0)
    with torch.no_grad():
        for path, parameter in unet.named_parameters():
            if "norm" in path:
                parameter.fill_(1.0 if path.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=0.02)
    return unet.eval().requires_grad_(False)


def call(unet: UNet2DConditionModel, batch: int, height: int, width: int) -> dict[str, Any]:
    """Create random arguments of a call, with all inputs that the configuration requires.

    Args:
        unet: the UNet.
        batch: the number of samples.
        height: the height of the latents.
        width: the width of the latents.
    """
    config = unet.config
    like = {"device": unet.device, "dtype": unet.dtype}
    arguments: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, height, width, **like),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, **like),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, text, **like),
            "time_ids": torch.full((batch, ids), 1024.0, **like),
        }
    return arguments
