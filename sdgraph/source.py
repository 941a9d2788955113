"""What a UNet must be to be traced faithfully."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as processors
from torch import nn

from .errors import SourceError

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
    if unet.config.get("attention_type", "default") != "default":
        raise SourceError(
            f"attention_type {unet.config['attention_type']!r} (GLIGEN) is not covered",
            where="config",
            cure="use a UNet without grounding layers",
        )
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
        raise SourceError("feed-forward chunking is on", where=path, cure="call unet.disable_forward_chunking() first")
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        raise SourceError(
            "the UNet is in training mode with active dropout, so it is not one function",
            where=path,
            cure="call unet.eval() first; the result has train() of its own",
        )
    if hasattr(module, "lora_A") and (not getattr(module, "merged", False) or module.disable_adapters):
        raise SourceError("LoRA is loaded but not fused", where=path, cure="call pipe.fuse_lora(lora_scale=...) first")
