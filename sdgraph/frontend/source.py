"""Checks of the source: which UNets can be traced faithfully."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as processors
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils.prune import BasePruningMethod

from ..errors import SourceError
from ..ir.state import GraphState
from ..ir.weights import HOOKS, own_code

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

SCALED = tuple(kind for kind in PURE_PROCESSORS if kind.__name__.startswith("IPAdapter"))  # by numbers, see numbers_of

DEFAULTS = ("AttnProcessor2_0", "AttnAddedKVProcessor2_0")  # the processors of a new UNet
FREEU = ("s1", "s2", "b1", "b2")

EVERYWHERE = tuple(f"_global{name}" for name in HOOKS)
REMOVED_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}  # functions, by class of hook
QUANTISED = ("torch.ao.", "torchao.", "bitsandbytes.", "optimum.quanto.", "quanto.", "diffusers.quantizers.")
UNQUANTISED = (
    "load the UNet in a floating dtype (or unet.dequantize()), apply, and quantise what is exported from the result"
)

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
    if isinstance(getattr(unet, "members", None), nn.ModuleDict):
        raise SourceError(
            "a switch of several UNets has several graphs",
            where=type(unet).__name__,
            hint="apply passes to each of them, tune and export each, and switch between the results",
        )
    if not isinstance(unet, UNet2DConditionModel):
        hints = {"unet": "pass pipe.unet, not the pipeline", "_orig_mod": "pass unet._orig_mod, and compile the result"}
        hint = next(
            (hint for name, hint in hints.items() if hasattr(unet, name)), "pass a diffusers UNet2DConditionModel"
        )
        raise SourceError(f"expected a UNet2DConditionModel, got {type(unet).__name__}", hint=hint)
    for path, parameter in unet.named_parameters():
        if parameter.device.type == "meta":
            raise SourceError(
                "the UNet has parameters on the meta device, so it has no weights",
                where=path,
                hint="load the weights first (from_pretrained, or to_empty + load_state_dict); with CPU offload "
                "hooks, call pipe.remove_all_hooks() before apply",
            )
    if any(getattr(everywhere, name) for name in EVERYWHERE):
        raise SourceError(
            "PyTorch has hooks for all modules, which a trace would freeze or lose",
            where="torch.nn.modules.module",
            hint="remove them (handle.remove()), apply, then add them again: they see the leaves of the result",
        )
    check_modules(unet, trusted)
    for path, parameter in unet.named_parameters():
        _check_parameter(path, parameter)
    dtypes = {parameter.dtype for parameter in unet.parameters()}
    if len(dtypes) > 1:
        raise SourceError(f"the UNet mixes dtypes {sorted(map(str, dtypes))}", hint="call unet.to(dtype) first")


def _check_parameter(path: str, parameter: nn.Parameter) -> None:
    kind = type(parameter)
    plain = kind.__torch_function__ is torch._C._disabled_torch_function_impl or kind is torch.Tensor
    if not parameter.is_floating_point() or not plain or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise SourceError(
            f"the weight is quantised, or replaces operations: a {kind.__name__} of {parameter.dtype}",
            where=path,
            hint=UNQUANTISED,
        )
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise SourceError(
            "the weight has hooks of its gradient, which the result would not have",
            where=path,
            hint="remove them (handle.remove()), apply, then add them to the parameters of the result",
        )


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
        kind = type(processor)
        known = kind in PURE_PROCESSORS and kind.__call__.__module__ == kind.__module__  # not exchanged by somebody
        if not known and kind not in trusted:
            raise SourceError(
                f"attention processor {kind.__name__} may keep state between calls",
                where=path,
                hint="unet.set_default_attn_processor(), or, if it is a pure function of its tensors, "
                f"sdgraph.apply(..., processors=({kind.__name__},))",
            )


def _check_module(path: str, module: nn.Module) -> None:
    for what, hint in _faults(module):
        raise SourceError(what, where=path, hint=hint)


def _faults(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield why a module cannot be traced faithfully, with what to do about it."""
    kind = type(module)
    if kind.__name__ in UNCOVERED:
        yield f"{kind.__name__} is not covered: {UNCOVERED[kind.__name__]}", "use a UNet without such modules"
    if kind.__module__.startswith(QUANTISED) or getattr(module, "hf_quantizer", None) is not None:
        yield f"{kind.__name__} is quantised", UNQUANTISED
    for name in getattr(module, "parametrizations", ()):
        methods = ", ".join(type(method).__name__.lstrip("_") for method in module.parametrizations[name])  # type: ignore[index]
        yield (
            f"its {name} is computed by a parametrization ({methods})",
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}), apply, and parametrize the result",
        )
    for hook in module._forward_pre_hooks.values():
        method = type(hook).__name__
        name = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
        if isinstance(hook, BasePruningMethod):
            yield (
                f"its {name} is pruned by torch.nn.utils.prune ({method}), which masks it at every call",
                f"torch.nn.utils.prune.remove(module, {name!r}), which makes the zeros permanent",
            )
        if method in REMOVED_BY:
            yield (
                f"its {name} is computed at every call by {method}",
                f"torch.nn.utils.{REMOVED_BY[method]}(module), which keeps the weight as it is now",
            )
    if any(vars(module)[name] for name in HOOKS) or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
        yield (
            "the module has hooks, which a trace would freeze or lose",
            "remove them (handle.remove(), pipe.remove_all_hooks()) and apply; the result takes hooks of its leaves, "
            "such as convolutions and linear layers, but no longer calls blocks",
        )
    for name, value in vars(module).items():
        if callable(value) and own_code(module, name, value):
            yield (
                f"the module has a replaced {name}, which a trace would freeze or lose",
                f"take it away (DeepCache's disable(), tomesd.remove_patch ..., or `del module.{name}`); to keep what "
                "it does, write it as a class of modules and put those in",
            )
    if getattr(module, "_compiled_call_impl", None) is not None:
        yield "the module is compiled", "apply to the UNet before it is compiled, and call compile() of the result"
    if getattr(module, "gradient_checkpointing", False):
        yield "gradient checkpointing is on", "call unet.disable_gradient_checkpointing() first"
    if getattr(module, "_chunk_size", None) is not None:
        yield "feed-forward chunking is on", "call unet.disable_forward_chunking() first"
    if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        yield (
            "the UNet is in training mode with active dropout, so it is not one function",
            "call unet.eval() first; the result has a separate train()",
        )
    if module.training and isinstance(module, nn.modules.batchnorm._NormBase):
        yield f"{kind.__name__} is in training mode, and edits its statistics at every call", "call unet.eval() first"
    if hasattr(module, "lora_A") and (not getattr(module, "merged", False) or module.disable_adapters):
        yield (
            "LoRA is loaded but not fused",
            "call pipe.fuse_lora(lora_scale=...) first, or pipe.unload_lora_weights() and load it into the result",
        )


def numbers_of(processor: Any, scales: Any, where: str) -> list[float]:
    """Return the scales of the IP-Adapters in an attention processor, one number for each.

    Args:
        processor: an attention processor of diffusers for IP-Adapters.
        scales: what it has for its scales.
        where: its module path.
    Raises:
        SourceError: they are not one number for each IP-Adapter.
    """
    given = list(scales) if isinstance(scales, list | tuple) else []
    off = [isinstance(scale, list) and all(each == 0 for each in scale) for scale in given]  # as diffusers has it
    single = [
        isinstance(scale, numbers.Real) or (isinstance(scale, torch.Tensor) and scale.dim() == 0) for scale in given
    ]
    if len(given) != len(processor.to_k_ip) or not all(map(operator.or_, off, single)):
        raise SourceError(
            f"the scales of {len(processor.to_k_ip)} IP-Adapters are {scales!r}",
            where=where,
            hint="one number for each, as pipe.set_ip_adapter_scale sets; a number for each image needs masks, which "
            "are not covered",
        )
    return [0.0 if none else float(scale) for none, scale in zip(off, given, strict=True)]


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
