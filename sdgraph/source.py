"""What a UNet must be to be traced faithfully, and the inputs its configuration calls for."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as processors
from torch import nn

from .dims import Symbol
from .errors import SourceError
from .inputs import Input

# Processors of diffusers that are pure functions of their tensors. Others may keep state between calls.
PURE_PROCESSORS: tuple[type, ...] = tuple(
    getattr(processors, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "AttnAddedKVProcessor",
        "AttnAddedKVProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
    )
    if hasattr(processors, name)
)


def check_source(unet: Any, trusted: Collection[type] = ()) -> None:
    """Refuse a model that a graph could not stand in for.

    Raises:
        SourceError: naming the module path and the cure.
    """
    if not isinstance(unet, UNet2DConditionModel):
        hint = "pass pipe.unet, not the pipeline" if hasattr(unet, "unet") else "pass a diffusers UNet2DConditionModel"
        raise SourceError(f"expected a UNet2DConditionModel, got {type(unet).__name__}", cure=hint)
    dtypes = set()
    for path, parameter in unet.named_parameters():
        if parameter.device.type == "meta":
            raise SourceError(
                "the UNet has parameters on the meta device, so it has no weights",
                where=path,
                cure="load the weights first (from_pretrained, or to_empty + load_state_dict); with CPU offload "
                "hooks, call pipe.remove_all_hooks() before apply",
            )
        dtypes.add(parameter.dtype)
    if len(dtypes) > 1:
        raise SourceError(f"the UNet mixes dtypes {sorted(map(str, dtypes))}", cure="call unet.to(dtype) first")
    for path, module in unet.named_modules():
        _check_module(path or "(the UNet itself)", module)
    for path, processor in unet.attn_processors.items():
        if type(processor) not in PURE_PROCESSORS and type(processor) not in trusted:
            raise SourceError(
                f"attention processor {type(processor).__name__} may keep state between calls",
                where=path,
                cure="unet.set_default_attn_processor(), or, if it is a pure function of its tensors, "
                f"sdgraph.apply(..., processors=({type(processor).__name__},))",
            )


def _check_module(path: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or hasattr(module, "_hf_hook"):
        raise SourceError(
            "the module has forward hooks or a replaced forward, which a trace would freeze or lose",
            where=path,
            cure="remove them (pipe.remove_all_hooks(), DeepCache's disable(), tomesd.remove_patch ...), apply, then "
            "add them to the result",
        )
    if getattr(module, "gradient_checkpointing", False):
        raise SourceError(
            "gradient checkpointing is on", where=path, cure="call unet.disable_gradient_checkpointing() first"
        )
    if all(getattr(module, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise SourceError("FreeU is on, and edits tensors in place", where=path, cure="call unet.disable_freeu() first")
    if getattr(module, "_chunk_size", None) is not None:
        raise SourceError(
            "feed-forward chunking is on", where=path, cure="call unet.disable_forward_chunking() first"
        )
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        raise SourceError(
            "the UNet is in training mode with active dropout, so it is not one function",
            where=path,
            cure="call unet.eval() first; the result has train() of its own",
        )
    if hasattr(module, "lora_A") and not getattr(module, "merged", False):
        raise SourceError(
            "LoRA is loaded but not fused", where=path, cure="call pipe.fuse_lora(lora_scale=...) first"
        )


def free_sizes(unet: UNet2DConditionModel) -> tuple[Symbol, ...]:
    """The sizes a call may choose, each with its nominal value (costs are quoted for it) and a generic one."""
    size = unet.config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    symbols = [Symbol("B", 1, 5), Symbol("H", height, 101), Symbol("W", width, 149), Symbol("L", 77, 31)]
    if unet.config.get("addition_embed_type") == "text_time":
        total, step = unet.config["projection_class_embeddings_input_dim"], unet.config["addition_time_embed_dim"]
        nominal, generic = (6, 5) if total > 6 * step else (2, 1)
        symbols += [Symbol("T", total - nominal * step, total - generic * step), Symbol("N", nominal, generic)]
    symbols += [Symbol(f"I{i}", 1, 3) for i, _ in enumerate(_ip_layers(unet))]
    symbols += [Symbol(f"S{i}", 257, 41) for i, _ in enumerate(_ip_layers(unet))]
    return tuple(symbols)


def unet_inputs(unet: UNet2DConditionModel, extra: Collection[str] = ()) -> tuple[Input, ...]:
    """All flat inputs of a UNet: what its configuration requires, and the optional residuals it can take.

    Args:
        extra: further inputs to trace with; the only one is "encoder_attention_mask".
    Raises:
        SourceError: a configuration or an extra input that is not covered.
    """
    config = unet.config
    for name in extra:
        if name != "encoder_attention_mask":
            raise SourceError(f"unknown input {name!r}", cure="inputs may hold 'encoder_attention_mask'")
    cross = config["cross_attention_dim"]
    if config.get("encoder_hid_dim") and config.get("encoder_hid_dim_type") in ("text_proj", None):
        cross = config["encoder_hid_dim"]
    if not isinstance(cross, int):
        cross = cross[0]
    inputs = [
        Input("sample", ("sample",), ("B", config["in_channels"], "H", "W")),
        Input("timestep", ("timestep",), ("B",), kind="time", broadcast=True),
        Input("encoder_hidden_states", ("encoder_hidden_states",), ("B", "L", cross)),
    ]
    if "encoder_attention_mask" in extra:
        place = ("encoder_attention_mask",)
        inputs.append(Input("encoder_attention_mask", place, ("B", "L"), optional=True))
    inputs += _class_inputs(unet) + _added_inputs(unet)
    if config.get("time_cond_proj_dim"):
        shape = ("B", config["time_cond_proj_dim"])
        inputs.append(Input("timestep_cond", ("timestep_cond",), shape, optional=True, broadcast=True))
    skips = 1 + sum(
        len(b.resnets) + len(getattr(b, "downsamplers", None) or ()) for b in unet.down_blocks
    )
    adapters = len(unet.down_blocks) + (unet.mid_block is not None) if _takes_adapter(unet) else 0
    for name, count in (
        ("down_block_additional_residuals", skips),
        ("down_intrablock_additional_residuals", adapters),
    ):
        inputs += [Input(f"{name[:-1]}_{i}", (name, i), None, optional=True) for i in range(count)]
    name = "mid_block_additional_residual"
    inputs.append(Input(name, (name,), None, optional=True))
    return tuple(inputs)


def _takes_adapter(unet: UNet2DConditionModel) -> bool:
    attending = [b for b in unet.down_blocks if getattr(b, "has_cross_attention", False)]
    return all("additional_residuals" in inspect.signature(b.forward).parameters for b in attending)


def _class_inputs(unet: UNet2DConditionModel) -> list[Input]:
    if unet.class_embedding is None:
        return []
    kind = unet.config.get("class_embed_type")
    width = {
        "projection": unet.config.get("projection_class_embeddings_input_dim"),
        "simple_projection": unet.config.get("projection_class_embeddings_input_dim"),
        "identity": unet.time_embedding.linear_2.out_features,
    }.get(kind)
    shape: tuple[int | str, ...] = ("B",) if width is None else ("B", width)
    value = "index" if kind is None else "time" if kind == "timestep" else "float"
    return [Input("class_labels", ("class_labels",), shape, kind=value, broadcast=True)]


def _added_inputs(unet: UNet2DConditionModel) -> list[Input]:
    place, kind = "added_cond_kwargs", unet.config.get("addition_embed_type")
    inputs = []
    if kind == "text_time":
        inputs = [
            Input("text_embeds", (place, "text_embeds"), ("B", "T")),
            Input("time_ids", (place, "time_ids"), ("B", "N"), kind="time"),
        ]
    elif kind not in (None, "text"):
        raise SourceError(f"addition_embed_type {kind!r} is not covered", where="config", cure="covered: text, text_time")
    hidden = unet.config.get("encoder_hid_dim_type")
    if hidden not in (None, "text_proj", "ip_image_proj"):
        raise SourceError(
            f"encoder_hid_dim_type {hidden!r} is not covered", where="config", cure="covered: text_proj, ip_image_proj"
        )
    for i, (width, tokens) in enumerate(_ip_layers(unet)):
        shape = ("B", f"I{i}", f"S{i}", width) if tokens else ("B", f"I{i}", width)
        inputs.append(Input(f"image_embeds_{i}", (place, "image_embeds", i), shape))
    return inputs


def _ip_layers(unet: UNet2DConditionModel) -> list[tuple[int, bool]]:
    """Width of the image embeddings of each loaded IP-Adapter, and whether they are sequences of tokens."""
    if unet.config.get("encoder_hid_dim_type") != "ip_image_proj":
        return []
    layers = []
    for i, layer in enumerate(unet.encoder_hid_proj.image_projection_layers):
        if hasattr(layer, "image_embeds"):
            layers.append((layer.image_embeds.in_features, False))
        elif hasattr(layer, "proj_in"):
            layers.append((layer.proj_in.in_features, True))
        else:
            raise SourceError(
                f"IP-Adapter projection {type(layer).__name__} is not covered",
                where=f"encoder_hid_proj.image_projection_layers.{i}",
                cure="covered: the base and the plus IP-Adapters",
            )
    return layers


def device_of(unet: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next(unet.parameters()).device
