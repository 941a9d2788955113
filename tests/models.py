"""Tiny models with the architectures of the released ones, built from configurations, and calls for them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph

CROSS = 24  # features of encoder_hidden_states
ATTEND, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

BASE: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": (ATTEND, PLAIN),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": CROSS,
    "attention_head_dim": 2,
}
SDXL: Mapping[str, Any] = {
    "down_block_types": (PLAIN, ATTEND, ATTEND),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 32),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,  # text_embeds, and six time ids
}
LEVELS: Mapping[str, Any] = {
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": (ATTEND, ATTEND, ATTEND, PLAIN),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

# For what takes long at every node, as an export does: a level down and up, with attention.
ONE_LEVEL: Mapping[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": (ATTEND,),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}

# What sets each released architecture apart, over BASE.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "sd15": {},
    "sd15-levels": {**LEVELS, "layers_per_block": 2},
    "sd21": {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True},
    "inpaint": {"in_channels": 9},
    "upscaler": {
        **LEVELS,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "down_block_types": (PLAIN, ATTEND, ATTEND, ATTEND),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
    },
    "pix2pix": {"in_channels": 8},
    "sdxl": SDXL,
    "refiner": {
        **SDXL,
        **LEVELS,
        "down_block_types": (PLAIN, ATTEND, ATTEND, PLAIN),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": [1, 2, 4, 4],
        "projection_class_embeddings_input_dim": 16 + 5 * 8,
    },
    "lcm": {"time_cond_proj_dim": 12},
    "class-timestep": {"class_embed_type": "timestep"},
    "class-identity": {"class_embed_type": "identity"},
    "class-projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "class-simple": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 10},
    "class-concat": {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 10,
        "class_embeddings_concat": True,
    },
    "text-projection": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
    "centred": {"center_input_sample": True, "mid_block_scale_factor": 2.0, "flip_sin_to_cos": False, "freq_shift": 1},
    "no-mid": {"mid_block_type": None},
    "plain-mid": {"mid_block_type": "UNetMidBlock2D"},
}


def build(name: str = "sd15", seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A UNet of one of the `ARCHITECTURES` in inference mode, with random weights in every parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**BASE, **ARCHITECTURES[name], **changes}).eval()
        with torch.no_grad():
            for parameter in unet.parameters():  # norms and biases start at ones and zeros, which hides mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return unet


def call_of(
    unet: Any, B: int = 2, H: int = 8, W: int = 12, L: int = 5, timestep: Any = 7, seed: int = 0
) -> dict[str, Any]:
    """Arguments of a call, with all that the configuration requires, in the UNet's dtype."""
    config, dtype = unet.config, unet.dtype
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    call: dict[str, Any] = {
        "sample": noise(B, config.in_channels, H, W),
        "timestep": timestep,
        "encoder_hidden_states": noise(B, L, config.encoder_hid_dim or CROSS),
    }
    kind, width = config.class_embed_type, config.projection_class_embeddings_input_dim
    if kind == "timestep":
        call["class_labels"] = torch.arange(B) * 3
    elif kind == "identity":
        call["class_labels"] = noise(B, 4 * config.block_out_channels[0])
    elif kind is not None:
        call["class_labels"] = noise(B, width)
    elif config.num_class_embeds:
        call["class_labels"] = torch.arange(B) % config.num_class_embeds
    if config.addition_embed_type == "text_time":
        ids = (width - 16) // config.addition_time_embed_dim
        call["added_cond_kwargs"] = {
            "text_embeds": noise(B, 16),
            "time_ids": torch.randint(0, 1024, (B, ids), generator=generator).to(dtype),
        }
    if config.time_cond_proj_dim:
        call["timestep_cond"] = noise(B, config.time_cond_proj_dim)
    return call


def answer(unet: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """The output for a call, without gradients; lists are copied, because diffusers empties the adapter's."""
    call = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    with torch.no_grad():
        return unet(**call).sample  # type: ignore[no-any-return]


def load_ip_adapter(
    unet: UNet2DConditionModel, *kinds: str, scale: float = 1.0, seed: int = 3, **options: bool
) -> UNet2DConditionModel:
    """Give a UNet image prompts through diffusers' own loader; one adapter per kind: "base", "face" or "plus"."""
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    widths = [
        unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    states = []
    for kind in kinds:
        if kind == "base":
            image = {"proj.weight": noise(4 * CROSS, 14), "proj.bias": noise(4 * CROSS)}
            image |= {"norm.weight": noise(CROSS) + 1, "norm.bias": noise(CROSS)}
        elif kind == "face":
            image = {"proj.0.weight": noise(28, 14), "proj.0.bias": noise(28)}
            image |= {"proj.2.weight": noise(4 * CROSS, 28), "proj.2.bias": noise(4 * CROSS)}
            image |= {"norm.weight": noise(CROSS) + 1, "norm.bias": noise(CROSS)}
        else:
            image = IPAdapterPlusImageProjection(
                embed_dims=14, output_dims=CROSS, hidden_dims=16, heads=1, num_queries=3
            ).state_dict()
            image = {name.replace("attn.to_out.0", "attn.to_out"): noise(*t.shape) for name, t in image.items()}
        attention = {
            f"{2 * i + 1}.to_{which}_ip.weight": noise(width, CROSS) for i, width in enumerate(widths) for which in "kv"
        }
        states.append({"image_proj": image, "ip_adapter": attention})
    unet._load_ip_adapter_weights(states, **options)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale] * len(kinds)
    return unet.eval()


INHERITING = "InheritFeatures.deep_cache(interval=2)"
CALLS: list[dict[str, Any]] = [
    {"B": 1, "H": 8, "W": 8, "L": 1, "timestep": 3},
    {"B": 2, "H": 16, "W": 24, "timestep": 981.5},
    {"B": 3, "H": 7, "W": 13, "L": 77, "timestep": torch.tensor(501)},
    {"B": 5, "H": 9, "W": 8, "timestep": torch.tensor([0, 1, 20, 500, 999])},
    {"B": 2, "H": 8, "W": 8, "timestep": torch.tensor([7.25])},
    {"B": 64, "H": 8, "W": 8, "timestep": torch.tensor(3.5, dtype=torch.float64)},
    {"B": 65, "H": 8, "W": 11, "timestep": 0},
]

FEW = [CALLS[1], CALLS[2], CALLS[5]]


def same(unet: Any, graph: Any, **sizes: Any) -> bool:
    call = call_of(unet, **sizes)
    return torch.equal(answer(unet, call), answer(graph, call))


def trace(unet: UNet2DConditionModel, **options: Any) -> sdgraph.GraphUNet:
    return sdgraph.GraphUNet(sdgraph.trace(unet, **options))


def perturbed(model: nn.Module) -> Any:
    """ControlNets start with zero convolutions; give them something to say."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


KARRAS: dict[str, Any] = {
    "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    "block_out_channels": (32, 32, 64, 64),
    "mid_block_type": None,
    "norm_num_groups": None,
    "layers_per_block": 2,
    "time_embedding_type": "fourier",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
}


def assert_same(unet: Any, graph: Any, **call: Any) -> torch.Tensor:
    expected = answer(unet, call_of(unet) | call)
    assert torch.equal(expected, answer(graph, call_of(unet) | call))
    assert torch.equal(answer(unet, call_of(unet, H=9) | call), answer(graph, call_of(unet, H=9) | call))
    return expected


def statements(graph: sdgraph.Graph, within: str = "") -> list[str]:
    """The operations of a graph or of a region as they are printed, without shapes and costs."""
    lines = graph.text(within=within or None).splitlines()
    return [re.split(r" {2,}", line.strip())[0] for line in lines if re.match(r" *([%\w', …]+ = |return )", line)]


def edits(before: sdgraph.Graph, after: sdgraph.Graph, within: str) -> list[str]:
    """The operations of a region that a pass removed (-) and added (+), with % for values by number."""
    was, now = ([re.sub(r"%\d+", "%", line) for line in statements(graph, within)] for graph in (before, after))
    return [line for line in difflib.unified_diff(was, now, n=0, lineterm="") if line[:3] not in ("---", "+++", "@@ ")]
