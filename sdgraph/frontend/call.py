"""The calling convention: how a call of a diffusers UNet maps to flat, named tensors, and back.

Only this module knows how `sample, timestep, encoder_hidden_states, added_cond_kwargs, ...` map to the inputs of a
graph. Tracing uses `unflatten`; the PyTorch module and the ONNX Runtime module use `flatten`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import CallError
from ..ir.dims import evaluate
from ..ir.inputs import Dim, Input

LISTS = ("down_block_additional_residuals", "down_intrablock_additional_residuals")


ARGUMENTS = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "cross_attention_kwargs",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
)


def unflatten(values: Mapping[str, Any], inputs: Sequence[Input]) -> dict[str, Any]:
    """Return the keyword arguments of diffusers' `forward` for flat values; the reverse of `flatten`."""
    call: dict[str, Any] = {}
    for spec in inputs:
        if spec.name not in values:
            continue
        head, *rest = spec.place
        value = values[spec.name]
        if not rest:
            call[str(head)] = value
        elif isinstance(rest[0], int):
            call.setdefault(str(head), []).append(value)
        elif len(rest) == 1:
            call.setdefault(str(head), {})[rest[0]] = value
        else:  # a list inside a dict: IP-Adapter's image_embeds
            call.setdefault(str(head), {}).setdefault(rest[0], []).append(value)
    if "down_block_additional_residuals" in call:
        call["down_block_additional_residuals"] = tuple(call["down_block_additional_residuals"])
    return call


def time_tensor(timestep: Any, device: torch.device, name: str = "timestep") -> torch.Tensor:
    """Return a timestep as a tensor of one dimension; a number becomes int64 or float64, as in diffusers.

    Args:
        name: the name of the argument, for errors.
    Raises:
        CallError: it is neither a number nor a tensor.
    """
    if isinstance(timestep, torch.Tensor):
        return timestep[None].to(device) if timestep.ndim == 0 else timestep
    if isinstance(timestep, bool) or not isinstance(timestep, int | float | np.integer):
        raise CallError(
            f"{name} is a {type(timestep).__name__}", where=f"argument {name}", hint="pass a number or a tensor"
        )
    double = torch.float32 if device.type in ("mps", "npu") else torch.float64
    integer = torch.int32 if device.type in ("mps", "npu") else torch.int64
    if not -(2**31) <= timestep < 2**31:  # nan as well
        raise CallError(f"{name} is {timestep}", where=f"argument {name}", hint="pass a timestep of the scheduler")
    return torch.tensor([timestep], dtype=double if isinstance(timestep, float) else integer, device=device)


def flatten(call: Mapping[str, Any], inputs: Sequence[Input]) -> dict[str, torch.Tensor]:
    """Return the flat tensors of a diffusers call. An argument without an input of the graph is refused.

    Args:
        call: the arguments by name; None means not given.
        inputs: the inputs of the graph.
    Raises:
        CallError: an argument is missing, has the wrong type or is not covered; the error names it.
    """
    given = {name: value for name, value in call.items() if value is not None}
    for name in given:
        if name not in ARGUMENTS:
            raise CallError(f"unknown argument {name!r}", where="call", hint=f"known: {', '.join(ARGUMENTS)}")
    _check_containers(given)
    _as_adapter(given)
    _check_cross_attention(given.pop("cross_attention_kwargs", None))
    flat: dict[str, torch.Tensor] = {}
    for spec in inputs:
        value: Any = given
        try:
            for step in spec.place:
                value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
        if value is None:
            if not spec.optional:
                raise CallError(
                    f"{_place(spec.place)} is missing", where="call", hint="this UNet's configuration requires it"
                )
            continue
        if spec.kind == "time":
            value = time_tensor(value, flat["sample"].device, _place(spec.place))
        if not isinstance(value, torch.Tensor):
            raise CallError(
                f"{_place(spec.place)} is a {type(value).__name__}, not a tensor", where="call", hint="pass a tensor"
            )
        if spec.place[1:2] == ("image_embeds",) and spec.shape is not None and value.ndim == len(spec.shape) + 1:
            value = _of_one_token(value)
        if spec.fitting and spec.shape is not None and not _fits(value, spec.shape, flat["sample"]):
            continue
        flat[spec.name] = value
    _refuse_rest(given, inputs)
    return flat


def _of_one_token(embeds: torch.Tensor) -> torch.Tensor:
    """Return image embeddings (B, images, 1, width), as those of faces, as (B, images, width). diffusers takes both."""
    return embeds.squeeze(2) if embeds.shape[2] == 1 else embeds


def _fits(value: torch.Tensor, shape: tuple[Dim, ...], sample: torch.Tensor) -> bool:
    sizes = dict(zip("BHW", (sample.shape[0], *sample.shape[2:]), strict=True))
    return list(value.shape) == [dim if isinstance(dim, int) else evaluate(dim, sizes) for dim in shape]


def _check_containers(given: dict[str, Any]) -> None:
    kinds: dict[str, Any] = dict.fromkeys(LISTS, (list, tuple))
    kinds |= dict.fromkeys(("added_cond_kwargs", "cross_attention_kwargs"), Mapping)
    for name, kind in kinds.items():
        if name in given and not isinstance(given[name], kind):
            wanted = "dict" if kind is Mapping else "list or tuple of tensors"
            raise CallError(
                f"{name} is a {type(given[name]).__name__}", where=f"argument {name}", hint=f"pass a {wanted}"
            )


def _as_adapter(given: dict[str, Any]) -> None:
    """Rename down residuals without a mid residual: in diffusers' old convention they are a T2I-Adapter's."""
    if (
        "down_block_additional_residuals" in given
        and "mid_block_additional_residual" not in given
        and "down_intrablock_additional_residuals" not in given
    ):
        warnings.warn(
            "down_block_additional_residuals without mid_block_additional_residual is read as a T2I-Adapter's, as "
            "diffusers does; pass down_intrablock_additional_residuals instead",
            FutureWarning,
            stacklevel=5,
        )
        given["down_intrablock_additional_residuals"] = given.pop("down_block_additional_residuals")
    both = ("down_block_additional_residuals" in given) == ("mid_block_additional_residual" in given)
    if not both:  # diffusers would silently ignore a single part
        raise CallError(
            "ControlNet residuals come in two parts and only one was given",
            where="down_block_additional_residuals, mid_block_additional_residual",
            hint="pass both",
        )


def _check_cross_attention(kwargs: Mapping[str, Any] | None) -> None:
    for key, value in (kwargs or {}).items():
        if key == "scale" and value == 1.0:
            continue
        hint = (
            "the graph is fixed when traced: fuse LoRA at the scale you want, set IP-Adapter scales, then apply again"
        )
        raise CallError(f"cross_attention_kwargs[{key!r}] is not covered", where="argument", hint=hint)


def _refuse_rest(given: Mapping[str, Any], inputs: Sequence[Input]) -> None:
    covered = {str(spec.place[0]) for spec in inputs}
    for name, value in given.items():
        if name not in covered:
            hint = (
                f"trace with it: sdgraph.apply(unet, passes, inputs=({name!r},))"
                if name == "encoder_attention_mask"
                else "this UNet's configuration has no such input"
            )
            if name == "attention_mask":
                hint = "a self-attention mask has one length and a UNet has several; diffusers cannot apply it either"
            if name == "added_cond_kwargs" and all(v is None for v in value.values()):
                continue
            raise CallError(f"{name} is not covered by this graph", where=f"argument {name}", hint=hint)
        if name in LISTS:
            count = sum(spec.place[0] == name for spec in inputs)
            short_is_fine = name == "down_intrablock_additional_residuals"
            if len(value) > count or (len(value) < count and not short_is_fine):
                raise CallError(
                    f"{name} has {len(value)} tensors, the UNet this graph comes from takes {count}",
                    where=f"argument {name}",
                    hint="use a ControlNet or adapter made for the source UNet",
                )
        if name == "added_cond_kwargs":
            lists: dict[Any, int] = {}
            keys = {spec.place[1] for spec in inputs if spec.place[0] == name}
            for key in {key for key in value if value[key] is not None} - keys:
                raise CallError(
                    f"added_cond_kwargs[{key!r}] is not covered by this graph",
                    where="argument added_cond_kwargs",
                    hint=f"this UNet's configuration reads {sorted(map(str, keys))}",
                )
            for spec in inputs:
                if spec.place[0] == name and len(spec.place) == 3:
                    lists[spec.place[1]] = lists.get(spec.place[1], 0) + 1
            for key, count in lists.items():
                if not isinstance(value[key], list) or len(value[key]) != count:
                    raise CallError(
                        f"added_cond_kwargs[{key!r}] must be a list of {count} tensors, one per IP-Adapter",
                        where="argument added_cond_kwargs",
                        hint="pass a list",
                    )


def _place(place: tuple[str | int, ...]) -> str:
    head, *rest = place
    return str(head) + "".join(f"[{step!r}]" for step in rest)
