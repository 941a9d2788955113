"""The members of a switch: their names, what has to agree between them, what they have in common, and equal weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..errors import SourceError, SpecError
from ..graph import Graph
from ..ir.inputs import Input
from ..ir.sites import sites

MemberName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,40}\Z")]
SiteShape = tuple[str, tuple[int | str, ...]]
NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
# Entries of a configuration that say which latents and conditioning a UNet takes.
AGREEING = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "class_embed_type",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "time_cond_proj_dim",
    "prediction_type",
)


def unet_of(member: Any) -> Any:
    """Return the UNet of a member, which may be a pipeline."""
    return member.unet if hasattr(member, "scheduler") and hasattr(member, "unet") else member


def facts(member: Any) -> dict[str, Any]:
    """Return what has to agree between members."""
    unet = unet_of(member)
    if not isinstance(unet, UNet2DConditionModel):
        raise SourceError(
            f"a member is a {type(unet).__name__}", where="members", hint="pass UNets of diffusers or of sdgraph"
        )
    config = {name: unet.config.get(name) for name in AGREEING}
    widths = config["cross_attention_dim"]
    if isinstance(widths, list | tuple) and len(set(widths)) == 1:
        config["cross_attention_dim"] = widths[0]
    scheduler = getattr(getattr(member, "scheduler", None), "config", {})
    config["prediction_type"] = scheduler.get("prediction_type", config["prediction_type"])
    return config | {"dtype": unet.dtype, "device": unet.device}


def check_names(members: Mapping[Any, Any]) -> None:
    for name in members:
        if not isinstance(name, str) or not NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
            raise SpecError(
                f"a member is named {name!r}",
                where="members",
                hint="use 1 to 40 letters, digits, _ and -, as in 'large'",
            )


def check_agreement(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse members that take other latents or conditioning than the first one."""
    first, *others = facts
    for other in others:
        ours, theirs = facts[first], facts[other]
        differing = [
            f"{name} {ours[name]} and {theirs[name]}"
            for name in ours
            if ours[name] != theirs[name] and not (name == "prediction_type" and None in (ours[name], theirs[name]))
        ]
        if differing:
            raise SourceError(
                f"{first} and {other} differ: {'; '.join(differing)}",
                where="members",
                hint="the UNets of a switch get the same latents, prompts and timesteps, in one dtype on one device",
            )


def common_inputs(inputs: list[Sequence[Input]]) -> Iterator[Input]:
    """Yield the inputs that all members have. Residuals are left out together, as a ControlNet passes them.

    Raises:
        SourceError: a member needs an input that another one does not have.
    """
    first, *others = inputs
    by_name = [{spec.name: spec for spec in other} for other in others]
    differing = {str(spec.place[0]) for spec in first for other in by_name if other.get(spec.name) != spec}
    names = {spec.name for spec in first}
    differing |= {str(spec.place[0]) for other in others for spec in other if spec.name not in names}
    if any(name.startswith(("down_block_add", "mid_block_add")) for name in differing):
        differing |= {"down_block_additional_residuals", "mid_block_additional_residual"}
    for each in inputs:
        for spec in each:
            if str(spec.place[0]) in differing and not spec.optional:
                raise SourceError(
                    f"the members take {spec.name} differently", where="members", hint="use UNets of one conditioning"
                )
    yield from (spec for spec in first if str(spec.place[0]) not in differing)


def site_shapes(graph: Graph) -> frozenset[SiteShape]:
    """Return the sites of a graph whose values are kept, each with its shape.

    Args:
        graph: the graph.
    """
    nodes = sites(graph.fx)
    return frozenset(
        (name, graph.dims.expressions(nodes[name].meta["val"], nodes[name].meta["probe"]))
        for name, site in graph.sites.items()
        if not site.bypassed
    )


def common_sites(members: Sequence[Collection[SiteShape]]) -> frozenset[str]:
    """Return the sites that all members have in one shape, and whose values are kept.

    Args:
        members: the sites of each member, with their shapes.
    Raises:
        SpecError: there is no such site.
    """
    first, *others = map(frozenset, members)
    common = frozenset(name for name, shape in first.intersection(*others) if "?" not in shape)
    if not common:
        raise SpecError(
            "the members have no site in common, in one shape",
            where="carry_features",
            hint="leave it out, or apply InheritFeatures with the same sites to all members",
        )
    return common


# -- equal weights ----------------------------------------------------------------------------------------------------


def tensors_of(unet: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return an iterator over parameters and buffers by name."""
    yield from unet.named_parameters()
    yield from unet.named_buffers()


def hold_once(models: list[list[tuple[str, torch.Tensor]]]) -> None:
    """Let tensors of a model share the storage of tensors of earlier models with equal contents.

    Args:
        models: the parameters and buffers of each model, with their names; of several equal tensors that of the same
            name is chosen.
    """
    earlier: dict[object, dict[str, torch.Tensor]] = {}
    for model in models:
        for name, tensor in model:
            known = earlier.get(_outline(tensor), {})
            candidates = [known[name]] if name in known else []
            for other in (*candidates, *known.values()):
                if other.data_ptr() == tensor.data_ptr() or torch.equal(_bits(other), _bits(tensor)):
                    tensor.data = other.data
                    break
        for name, tensor in model:
            if tensor.numel() and not tensor.is_meta:
                earlier.setdefault(_outline(tensor), {}).setdefault(name, tensor)


def _outline(tensor: torch.Tensor) -> object:
    """Return what equal tensors have in common, and different ones hardly: their form, and a few of their numbers."""
    if tensor.is_meta or not tensor.numel():
        return None
    flat = tensor.detach().reshape(-1)
    few = _bits(flat[:: max(1, len(flat) // 16)]).tolist()
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), tuple(few)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # nan equals nan, and 0 is not -0
