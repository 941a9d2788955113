"""Checks of the source: which UNets can be traced faithfully."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as processors
from torch import nn

from ..errors import SourceError
from ..ir.state import GraphState

# Processors of diffusers that are pure functions of their tensors; others may keep state between calls.
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


DEFAULTS = ("AttnProcessor2_0", "AttnAddedKVProcessor2_0")  # the processors of a new UNet
FREEU = ("s1", "s2", "b1", "b2")

# Blocks of diffusers that a UNet2DConditionModel can be configured with, and fails on when called.
UNCOVERED = {
    **dict.fromkeys(
        ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"), "diffusers' UNet fails on it"
    ),
    **dict.fromkeys(
        ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        "it is a block of autoencoders, and diffusers' UNet fails on it",
    ),
    "DualTransformer2DModel": "it splits the text at a fixed token",
    "GatedSelfAttentionDense": "its inputs (GLIGEN) are not covered",
}


def check_source(unet: Any, trusted: Collection[type] = ()) -> None:
    """Refuse a model that a graph cannot replace.

    Args:
        trusted: classes of attention processors that are pure functions of their tensors.
    Raises:
        SourceError: the model cannot be replaced; the error names the module path.
    """
    if isinstance(getattr(unet, "graph", None), GraphState):
        raise SourceError(
            f"got {type(unet).__name__}, which is traced already", hint="sdgraph.apply(unet, passes) goes on from it"
        )
    if not isinstance(unet, UNet2DConditionModel):
        hint = "pass pipe.unet, not the pipeline" if hasattr(unet, "unet") else "pass a diffusers UNet2DConditionModel"
        raise SourceError(f"expected a UNet2DConditionModel, got {type(unet).__name__}", hint=hint)
    dtypes = set()
    for path, parameter in unet.named_parameters():
        if parameter.device.type == "meta":
            raise SourceError(
                "the UNet has parameters on the meta device, so it has no weights",
                where=path,
                hint="load the weights first (from_pretrained, or to_empty + load_state_dict); with CPU offload "
                "hooks, call pipe.remove_all_hooks() before apply",
            )
        dtypes.add(parameter.dtype)
    if len(dtypes) > 1:
        raise SourceError(f"the UNet mixes dtypes {sorted(map(str, dtypes))}", hint="call unet.to(dtype) first")
    check_modules(unet, trusted)


def check_modules(unet: UNet2DConditionModel, trusted: Collection[type] = ()) -> None:
    """Refuse modules, settings of modules and attention processors that a graph cannot replace.

    Args:
        trusted: classes of attention processors that are pure functions of their tensors.
    Raises:
        SourceError: one of them cannot be replaced; the error names the module path.
    """
    for path, module in unet.named_modules():
        _check_module(path or "(the UNet itself)", module)
    for path, processor in unet.attn_processors.items():
        if type(processor) not in PURE_PROCESSORS and type(processor) not in trusted:
            raise SourceError(
                f"attention processor {type(processor).__name__} may keep state between calls",
                where=path,
                hint="unet.set_default_attn_processor(), or, if it is a pure function of its tensors, "
                f"sdgraph.apply(..., processors=({type(processor).__name__},))",
            )


def _check_module(path: str, module: nn.Module) -> None:
    if type(module).__name__ in UNCOVERED:
        reason = UNCOVERED[type(module).__name__]
        raise SourceError(
            f"{type(module).__name__} is not covered: {reason}", where=path, hint="use a UNet without such modules"
        )
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or hasattr(module, "_hf_hook"):
        raise SourceError(
            "the module has forward hooks or a replaced forward, which a trace would freeze or lose",
            where=path,
            hint="remove them (pipe.remove_all_hooks(), DeepCache's disable(), tomesd.remove_patch ...), apply, then "
            "add them to the result",
        )
    if getattr(module, "gradient_checkpointing", False):
        raise SourceError(
            "gradient checkpointing is on", where=path, hint="call unet.disable_gradient_checkpointing() first"
        )
    if getattr(module, "_chunk_size", None) is not None:
        raise SourceError("feed-forward chunking is on", where=path, hint="call unet.disable_forward_chunking() first")
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        raise SourceError(
            "the UNet is in training mode with active dropout, so it is not one function",
            where=path,
            hint="call unet.eval() first; the result has train() of its own",
        )
    if hasattr(module, "lora_A") and (not getattr(module, "merged", False) or module.disable_adapters):
        raise SourceError(
            "LoRA is loaded but not fused",
            where=path,
            hint="call pipe.fuse_lora(lora_scale=...) first, or pipe.unload_lora_weights() and load it into the result",
        )


def settings_of(unet: UNet2DConditionModel | None) -> dict[str, Any]:
    """Return the settings of a UNet that its configuration does not hold, as JSON: attention processors and FreeU."""
    settings: dict[str, Any] = {}
    if unet is not None:
        names = {path: type(processor).__name__ for path, processor in unet.attn_processors.items()}
        if set(names.values()) - set(DEFAULTS):
            settings["processors"] = names
        freeu = {
            f"up_blocks.{i}": [getattr(block, key) for key in FREEU]
            for i, block in enumerate(unet.up_blocks)
            if all(getattr(block, key, None) for key in FREEU)
        }
        if freeu:
            settings["freeu"] = freeu
    return settings


def make_settings(unet: UNet2DConditionModel, settings: Mapping[str, Any]) -> None:
    """Apply the settings that `settings_of` returned to a UNet.

    Raises:
        SourceError: an attention processor has weights, or is not known.
    """
    for path, name in settings.get("processors", {}).items():
        kind = next((kind for kind in PURE_PROCESSORS if kind.__name__ == name and "IPAdapter" not in name), None)
        if kind is None:
            raise SourceError(f"no attention processor {name!r} without weights is known", where=path)
        attention = unet.get_submodule(path.removesuffix(".processor"))
        if "Fused" in name:
            attention.fuse_projections(fuse=True)
        attention.set_processor(kind())
    for path, scales in settings.get("freeu", {}).items():
        for key, scale in zip(FREEU, scales, strict=True):
            setattr(unet.get_submodule(path), key, scale)
