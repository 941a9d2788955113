"""The signature of a UNet, from its configuration: flat inputs, free sizes, and conditions on the sizes."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models import embeddings
from torch import nn

from ..errors import SourceError
from ..ir.dims import Symbol
from ..ir.guards import Guard
from ..ir.inputs import Input


def free_sizes(unet: UNet2DConditionModel, divisible: bool = False) -> tuple[Symbol, ...]:
    """Return the sizes that a call may choose, with their nominal and generic values.

    Args:
        divisible: whether the generic height and width are multiples of the number that the UNet divides them by.
    Raises:
        SourceError: the configuration leaves no room for the text embedding that it requires.
    """
    size = unet.config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    levels = len(unet.down_blocks)
    if any(_karras(block) for block in unet.down_blocks):  # these pad by reflection, and a single pixel has none
        height, width = max(height, 2**levels), max(width, 2**levels)
    symbols = [
        Symbol("B", 1, 5),
        Symbol("H", height, _generic(height, levels, 101, divisible)),
        Symbol("W", width, _generic(width, levels, 149, divisible)),
        Symbol("L", 77, 31),
    ]
    if unet.config.get("addition_embed_type") == "text_time":
        total, step = unet.config["projection_class_embeddings_input_dim"], unet.config["addition_time_embed_dim"]
        if total <= 2 * step:
            raise SourceError(
                f"projection_class_embeddings_input_dim {total} does not hold two time ids of {step} features",
                where="config",
                hint="it is the width of text_embeds plus that of all embedded time_ids",
            )
        nominal, generic = (6, 5) if total > 6 * step else (2, 1)
        symbols += [Symbol("T", total - nominal * step, total - generic * step), Symbol("N", nominal, generic)]
    for i, _ in enumerate(_ip_layers(unet)):
        symbols += [Symbol(f"I{i}", 1, 3 + 4 * i), Symbol(f"S{i}", 257, 41 + 2 * i)]
    return tuple(symbols)


def _generic(nominal: int, levels: int, at_least: int, divisible: bool) -> int:
    """Return a size that differs from the nominal one at every level of the UNet, so that it does not seem fixed."""
    unit = 2**levels
    start = max(at_least, 2 * unit + 1)
    sizes = range(start // unit * unit, 8 * (start + nominal), unit) if divisible else range(start, 8 * start + nominal)
    by = [2**level for level in range(levels + 1)]
    return next(
        s for s in sizes if (divisible or s % 2) and all(math.ceil(s / d) != math.ceil(nominal / d) for d in by)
    )


def call_guards(unet: UNet2DConditionModel, divisible: bool) -> tuple[Guard, ...]:
    """Return the conditions on a call's sizes that follow from the configuration."""
    guards = []
    if unet.config.get("addition_embed_type") == "text_time":
        total, step = unet.config["projection_class_embeddings_input_dim"], unet.config["addition_time_embed_dim"]
        guards.append(Guard(f"T + N*{step} == {total}", True, "widths of text_embeds and of the embedded time_ids"))
    if divisible:
        unit = 2 ** (len(unet.down_blocks) - 1)
        place = "the blocks of this UNet cannot up-sample to another size"
        guards += [Guard(f"{side} % {unit} == 0", True, place) for side in "HW"]
    if any(_karras(block) for block in unet.down_blocks):
        least = 2 ** len(unet.down_blocks)
        place = "the samplers of this UNet pad by reflection, and a single pixel has none"
        guards += [Guard(f"{side} >= {least}", True, place) for side in "HW"]
    return tuple(guards)


def unet_inputs(unet: UNet2DConditionModel, extra: Collection[str] = ()) -> tuple[Input, ...]:
    """Return all flat inputs of a UNet: those that its configuration requires, and optional residuals.

    Args:
        extra: the names of further inputs; only "encoder_attention_mask" is known.
    Raises:
        SourceError: the configuration or an extra input is not covered.
    """
    config = config_of(unet)
    for name in extra:
        if name != "encoder_attention_mask":
            raise SourceError(f"unknown input {name!r}", hint="inputs may hold 'encoder_attention_mask'")
    cross = config["cross_attention_dim"]
    hidden = config.get("encoder_hid_dim_type")
    if hidden == "text_proj" or (hidden and getattr(unet, "text_encoder_hid_proj", None) is not None):
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
        inputs.append(Input("encoder_attention_mask", place, ("B", "L"), kind="mask", optional=True))
    inputs += _class_inputs(unet) + _added_inputs(unet)
    if config.get("time_cond_proj_dim"):
        shape = ("B", config["time_cond_proj_dim"])
        inputs.append(Input("timestep_cond", ("timestep_cond",), shape, optional=True, broadcast=True))
    skips = _skips(unet)
    adapters = len(unet.down_blocks) + (unet.mid_block is not None) if _accepts_adapter(unet) else 0
    for name, count in (
        ("down_block_additional_residuals", skips),
        ("down_intrablock_additional_residuals", adapters),
    ):
        blocks = len(unet.down_blocks)
        inputs += [
            Input(f"{name[:-1]}_{i}", (name, i), None, optional=True, fitting=count == adapters and i >= blocks)
            for i in range(count)
        ]
    if skips:
        name = "mid_block_additional_residual"
        inputs.append(Input(name, (name,), None, optional=True))
    return tuple(inputs)


def _skips(unet: UNet2DConditionModel) -> int:
    """Return the number of skips that a ControlNet can add to."""
    count = 1
    for block in unet.down_blocks:
        samplers = getattr(block, "downsamplers", None) or ()
        if _karras(block) and not samplers:
            return 0  # its skip is None, to which diffusers cannot add either
        count += len(block.resnets) + (0 if _karras(block) else len(samplers))
    return count


def _karras(block: nn.Module) -> bool:
    return type(block).__name__.startswith("K")


def _accepts_adapter(unet: UNet2DConditionModel) -> bool:
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
    one_for_all = not unet.config.get("class_embeddings_concat")
    return [Input("class_labels", ("class_labels",), shape, kind=value, broadcast=one_for_all)]


def _added_inputs(unet: UNet2DConditionModel) -> list[Input]:
    place, kind = "added_cond_kwargs", unet.config.get("addition_embed_type")
    inputs = []
    if kind == "text_time":
        inputs = [
            Input("text_embeds", (place, "text_embeds"), ("B", "T")),
            Input("time_ids", (place, "time_ids"), ("B", "N"), kind="time"),
        ]
    elif kind not in (None, "text"):
        raise SourceError(
            f"addition_embed_type {kind!r} is not covered", where="config", hint="covered: text, text_time"
        )
    hidden = config_of(unet).get("encoder_hid_dim_type")
    if hidden not in (None, "text_proj", "ip_image_proj"):
        raise SourceError(
            f"encoder_hid_dim_type {hidden!r} is not covered", where="config", hint="covered: text_proj, ip_image_proj"
        )
    for i, (width, tokens) in enumerate(_ip_layers(unet)):
        shape = ("B", f"I{i}", f"S{i}", width) if tokens else ("B", f"I{i}", width)
        inputs.append(Input(f"image_embeds_{i}", (place, "image_embeds", i), shape))
    return inputs


def _ip_layers(unet: UNet2DConditionModel) -> list[tuple[int, bool]]:
    """Return the width of image embeddings of every loaded IP-Adapter, and whether they are sequences of tokens."""
    if config_of(unet).get("encoder_hid_dim_type") != "ip_image_proj":
        return []
    layers = []
    for i, layer in enumerate(unet.encoder_hid_proj.image_projection_layers):
        if isinstance(layer, embeddings.ImageProjection):
            layers.append((layer.image_embeds.in_features, False))
        elif isinstance(layer, embeddings.IPAdapterPlusImageProjection):
            layers.append((layer.proj_in.in_features, True))
        elif isinstance(layer, embeddings.IPAdapterFullImageProjection):
            layers.append((layer.ff.net[0].proj.in_features, True))
        elif isinstance(layer, embeddings.IPAdapterFaceIDImageProjection):
            layers.append((layer.ff.net[0].proj.in_features, False))
        else:
            raise SourceError(
                f"IP-Adapter projection {type(layer).__name__} is not covered",
                where=f"encoder_hid_proj.image_projection_layers.{i}",
                hint="covered: the base, plus, full-face and FaceID IP-Adapters; FaceID Plus keeps state between calls",
            )
    return layers


def config_of(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Return a copy of the configuration as it is now. IP-Adapters change its attributes, not its items."""
    return {name: copy.deepcopy(getattr(unet.config, name, value)) for name, value in unet.config.items()}
