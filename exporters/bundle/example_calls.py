"""Calls of the graphs of a bundle on random inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdgraph import GraphUNet
from sdgraph.ir.dims import evaluate
from sdgraph.ir.inputs import random_value

from .manifest import Manifest, Model


def example_call(unet: GraphUNet, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The call to trace with. No two sizes agree and none is 1 at any level, so that torch ties and fixes none."""
    unit = unit_of(unet)
    symbols = unet.graph.dims.symbols
    column = {s.name: s.generic for s in symbols}
    if min(column.values()) < 2:
        column = {s.name: s.nominal for s in symbols}
    return random_call(unet, manifest, column | unet.graph.allowed(B=2, H=4 * unit, W=5 * unit, L=7))


def random_call(unet: Any, manifest: Manifest, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the model, on the UNet's device, for sizes by symbol."""
    generator = torch.Generator().manual_seed(seed)
    call = {}
    for spec in manifest.model_inputs:
        shape = [d if isinstance(d, int) else evaluate(d, sizes) for d in spec.shape or ()]
        value = random_value(spec, shape, generator, unet.config)
        call[spec.name] = value.to(unet.device, manifest.dtype_of(spec))
    return call


def with_values(
    unet: GraphUNet, manifest: Manifest, model: Model, call: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A call with the values that a model takes: those that the same call refreshes, computed by eager."""
    if not model.takes:
        return dict(call)
    with torch.no_grad():
        _, *values = unet.variant(frozenset(manifest.given))(*call.values())
    known = dict(zip(manifest.models[0].gives, values, strict=True))
    return {**call, **{f"inherited.{site}": known[site] for site in model.takes}}


def unit_of(unet: GraphUNet) -> int:
    """What the down-sampling divides by."""
    return int(2 ** max(len(unet.config.get("down_block_types", ())) - 1, 0))
