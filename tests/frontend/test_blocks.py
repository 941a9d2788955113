"""Blocks that no released model has are traced exactly, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sdgraph
from sdgraph.errors import CallError, SourceError

from ..models import (
    CALLS,
    CROSS,
    KARRAS,
    LEVELS,
    PLAIN,
    answer,
    build,
    call_of,
    same,
    trace,
)

RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "mid_block_type": None,
}

OTHERS: dict[str, dict[str, Any]] = {
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet-sampling": RESNETS,
    "resnet-sampling-shift": {**RESNETS, "resnet_time_scale_shift": "scale_shift"},
    "simple-attention": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
    "self-attention": {
        "down_block_types": ("AttnDownBlock2D", PLAIN),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "fourier": {"time_embedding_type": "fourier"},
    "text-embedding": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "layer-norm": {"cross_attention_norm": "layer_norm"},
    "group-norm": {"cross_attention_norm": "group_norm"},
    "activations": {"act_fn": "mish", "time_embedding_act_fn": "silu", "timestep_post_act": "silu"},
    "skip-time": {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4},
    "uneven": {**LEVELS, "layers_per_block": (2, 1, 1, 2), "cross_attention_dim": (CROSS,) * 4},
    "reversed": {
        **LEVELS,
        "transformer_layers_per_block": [2, 1, 2, 1],
        "reverse_transformer_layers_per_block": [1, 2, 1, 1],
    },
    "no-padding": {"downsample_padding": 0},
}

FIRST = ("scale-shift", "resnet-sampling", "simple-attention", "self-attention", "fourier", "text-embedding")

REST = [pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS if kind not in FIRST]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FIRST, *REST])
def test_other_blocks_are_exact_where_the_source_runs(kind: str) -> None:
    unet = build(**OTHERS[kind])
    graph = trace(unet)
    assert unet.state_dict().keys() == graph.state_dict().keys()
    exact = 0
    for sizes in CALLS:
        call = call_of(unet, **sizes)
        try:
            found = answer(graph, call)
        except CallError:
            continue
        assert torch.equal(answer(unet, call), found)
        exact += 1
    assert exact >= 3
    if "resnet-sampling" not in kind and kind != "simple-attention":
        assert exact == len(CALLS)


@pytest.mark.parametrize("kind", ["resnet-sampling", "simple-attention"])
def test_sizes_that_the_blocks_cannot_serve_are_refused(kind: str) -> None:
    """These blocks up-sample by two, whatever the skip: the source fails on odd sizes."""
    unet = build(**OTHERS[kind])
    graph = trace(unet)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        answer(unet, call_of(unet, H=9))
    with pytest.raises(CallError, match=r"H % 2 == 0.*H=9"):
        answer(graph, call_of(unet, H=9))
    with pytest.raises(CallError, match=r"B >= 64.*\n.*resnet"):  # another memory layout, so other last bits
        answer(graph, call_of(unet, B=64, H=8, W=8))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"attention_type": "gated"}, SourceError, "GLIGEN"),
        ({"addition_embed_type": "text_image"}, SourceError, "addition_embed_type 'text_image'"),
        (
            {"addition_embed_type": "image", "encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj"},
            SourceError,
            "addition_embed_type 'image'",
        ),
        ({"encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj"}, SourceError, "encoder_hid_dim_type"),
        ({"dual_cross_attention": True}, SourceError, r"(?s)DualTransformer2DModel.*where: down_blocks.0.attentions.0"),
        ({"down_block_types": ("SkipDownBlock2D", PLAIN)}, SourceError, r"(?s)SkipDownBlock2D.*where: down_blocks.0"),
        (
            {"down_block_types": ("DownEncoderBlock2D", PLAIN)},
            SourceError,
            r"(?s)DownEncoderBlock2D.*where: down_blocks.0",
        ),
    ],
    ids=["gligen", "text-image", "image", "image-projection", "dual", "skip", "encoder"],
)
def test_what_is_not_covered_is_refused(changes: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        sdgraph.trace(build(**changes))


def test_karras_blocks_are_exact_where_the_source_runs() -> None:
    """The latent upscaler's: they edit their weights in place, and pad by reflection."""
    unet = build(**KARRAS)
    graph = trace(unet)
    assert unet.state_dict().keys() == graph.state_dict().keys()
    for sizes in ({"H": 16, "W": 16}, {"B": 3, "H": 24, "W": 16, "L": 2}):
        assert same(unet, graph, **sizes)
    for sizes in ({"H": 20, "W": 16}, {"H": 8, "W": 16}):
        with pytest.raises(RuntimeError):
            answer(unet, call_of(unet, **sizes))
        with pytest.raises(CallError, match=r"H (% 8 == 0|>= 16) is True; here H="):
            answer(graph, call_of(unet, **sizes))


@pytest.mark.slow
def test_karras_blocks_are_saved_and_go_back(tmp_path: Path) -> None:
    unet = build(**KARRAS)
    graph = trace(unet)
    graph.save_pretrained(tmp_path / "unet")
    assert same(unet, sdgraph.GraphUNet.from_pretrained(tmp_path / "unet"), H=16, W=16)
    assert same(unet, graph.to_diffusers(), H=16, W=16)


PAIRS = [
    (first, then)
    for first in ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D")
    for then in ("CrossAttnDownBlock2D", "DownBlock2D")
]


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_blocks_of_different_kinds_with_residuals(kinds: tuple[str, str]) -> None:
    """Their sizes are not all known as expressions, so the trace is compared without a part of the residuals."""
    ups = [kind.replace("Downsample", "Upsample").replace("Down", "Up") for kind in reversed(kinds)]
    unet = build(down_block_types=kinds, up_block_types=tuple(ups))
    graph = sdgraph.apply(unet)
    call = call_of(unet, H=8, W=8)
    assert torch.equal(answer(unet, call), answer(graph, call))
    skips: list[torch.Tensor] = []
    handles = [unet.conv_in.register_forward_hook(lambda module, args, output: skips.append(output))]
    handles += [
        block.register_forward_hook(lambda m, args, output: skips.extend(output[1])) for block in unet.down_blocks
    ]
    answer(unet, call)
    for handle in handles:
        handle.remove()
    call["down_block_additional_residuals"] = tuple(torch.randn_like(skip) for skip in skips)
    call["mid_block_additional_residual"] = torch.randn_like(skips[-1])
    assert torch.equal(answer(unet, call), answer(graph, call))


CLASSES: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "number": ({"num_class_embeds": 5}, torch.tensor([1, 3])),
    "concatenated": ({"num_class_embeds": 5, "class_embeddings_concat": True}, torch.tensor([1, 3])),
    "timestep": ({"class_embed_type": "timestep"}, torch.tensor([3.0, 5.0])),
    "projection": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
        torch.linspace(-1, 1, 12).reshape(2, 6),
    ),
    "simple-projection": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6},
        torch.linspace(-1, 1, 12).reshape(2, 6),
    ),
}


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["resnet-sampling", "simple-attention", "self-attention"])
def test_class_labels_in_all_kinds_of_blocks(kind: str, classes: str) -> None:
    changes, labels = CLASSES[classes]
    unet = build(**OTHERS[kind], **changes)
    call = {**call_of(unet, B=2, H=8, W=8, L=5), "class_labels": labels}
    graph = sdgraph.apply(unet, "CleanUp", verify=False)
    assert torch.equal(answer(unet, call), answer(graph, call))
    call["class_labels"] = labels.flip(0)
    assert torch.equal(answer(unet, call), answer(graph, call))
