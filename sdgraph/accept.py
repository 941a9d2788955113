"""Whether a call is one that a graph covers: asked before it runs, by torch modules and exported models alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .dims import evaluate
from .errors import CallError
from .guards import satisfied, sizes_in
from .inputs import Input
from .trace import Guard


def accept(
    inputs: Sequence[Input], guards: Iterable[Guard], flat: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, int]:
    """Refuse flat inputs that are not covered.

    Args:
        inputs: all inputs with their shapes; None is the shape of a residual whose place was pruned away.
        guards: what must hold for the sizes.
        flat: the call, as `sdgraph.inputs.flatten` gives it.
        dtype: of the model.
    Returns:
        the sizes of the call by symbol.
    Raises:
        CallError: naming the input, what it is and what it should be.
    """
    sizes: dict[str, int] = {}
    first = next(iter(flat), "")
    for spec in inputs:
        value = flat.get(spec.name)
        if value is None:
            continue
        if value.device != flat[first].device:
            raise CallError(
                f"{spec.name} is on {value.device}, {first} is on {flat[first].device}",
                where=f"input {spec.name}",
                cure=f"move it: .to('{flat[first].device}')",
            )
        _check_dtype(spec, value, dtype)
        if spec.shape is not None:
            _match(spec, spec.shape, tuple(value.shape), sizes)
    for guard in guards:
        if not satisfied(guard, sizes):
            values = ", ".join(f"{name}={sizes[name]}" for name in sorted(sizes_in(guard)))
            raise CallError(
                f"this graph is for calls where {guard.condition} is {guard.outcome}; here {values}",
                where=guard.where,
                cure="use sizes on that side, or the source UNet",
            )
    return sizes


def _check_dtype(spec: Input, value: torch.Tensor, dtype: torch.dtype) -> None:
    where, device = f"input {spec.name}", value.device.type
    casting = torch.is_autocast_enabled(device)
    if spec.kind == "index" and (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool):
        raise CallError(f"{spec.name} is {value.dtype}", where=where, cure="pass integers")
    if spec.kind == "float" and not (value.dtype == dtype or (casting and value.is_floating_point())):
        raise CallError(
            f"{spec.name} is {value.dtype}, the UNet is {dtype}", where=where, cure=f"cast it: .to({dtype})"
        )
    if casting and spec.place[0] == "down_intrablock_additional_residuals":
        cast = torch.get_autocast_dtype(device)  # diffusers adds these in place, so without promotion
        if value.dtype != cast:
            raise CallError(
                f"{spec.name} is {value.dtype}, autocast computes in {cast}", where=where, cure=f"cast it: .to({cast})"
            )


def _match(spec: Input, dims: tuple[int | str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Compare a shape with what it should be, learning the free sizes from their first use."""
    wanted: list[int | str] = []
    for i, dim in enumerate(dims):
        have = shape[i] if i < len(shape) else None
        if isinstance(dim, int):
            wanted.append(dim)
        elif dim == "?" or (i == 0 and spec.broadcast and have == 1):  # of no known expression; or for the whole batch
            wanted.append(dim if have is None else have)
        elif dim.isidentifier():
            wanted.append(dim if have is None else sizes.setdefault(dim, have))
        else:
            wanted.append(evaluate(dim, sizes))
    if list(shape) != wanted or 0 in shape:
        raise CallError(
            f"{spec.name} has shape {shape}, expected ({', '.join(map(str, wanted))})",
            where=f"input {spec.name}",
            cure="batch, height and width must agree over all inputs of a call",
        )
