"""Example calls of the graphs of a bundle, on random inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdgraph import GraphUNet
from sdgraph.errors import ExportError
from sdgraph.ir.dims import evaluate
from sdgraph.ir.inputs import random_value

from .manifest import ExportedVariant, Manifest


def example_call(unet: GraphUNet, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return the call to trace with. No two sizes are equal and none is 1, so that torch.export ties and fixes none.

    Args:
        unet: the traced UNet.
        manifest: its manifest.
    Raises:
        ExportError: a number that the graph computes from its sizes is 1 at all sizes that were tried.
    """
    unit = unit_of(unet)
    symbols = unet.graph.dims.symbols
    column = {s.name: s.generic for s in symbols}
    if min(column.values()) < 2:
        column = {s.name: s.nominal for s in symbols}
    computed = {str(node.meta["size"]) for node in unet.graph.nodes if node.meta.get("size") is not None}
    for scale in (1, 2, 3, 5, 8):
        sizes = column | unet.graph.allowed(B=2, H=4 * unit * scale, W=5 * unit * scale, L=7)
        ones = sorted(size for size in computed if evaluate(size, sizes) == 1)
        if not ones:
            return random_call(unet, manifest, sizes)
    raise ExportError(
        f"the graph computes {ones[0]} from its sizes, which is 1 for maps as large as {sizes['H']}x{sizes['W']}",
        where="example call",
        hint="use smaller windows, which a map of this size holds more than one of",
    )


def uneven_calls(unet: GraphUNet, manifest: Manifest) -> list[dict[str, torch.Tensor]]:
    """Return two random calls that share no size: one that the down-sampling divides, one that it does not, if the
    graph takes such. The second gives one timestep for the whole batch.

    Args:
        unet: the traced UNet.
        manifest: its manifest.
    """
    unit = unit_of(unet)
    even = unet.graph.allowed(B=3, H=2 * unit, W=3 * unit, L=11)
    odd = unet.graph.allowed(B=2, H=2 * unit + 1, W=unit + 3, L=4)
    symbols = [s for s in unet.graph.dims.symbols if s.name not in even]
    first = random_call(unet, manifest, {s.name: s.nominal for s in symbols} | even)
    second = random_call(unet, manifest, {s.name: s.generic for s in symbols} | odd, seed=1)
    second["timestep"] = second["timestep"][:1]
    return [first, second]


def random_call(unet: Any, manifest: Manifest, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs of the model by name, on the UNet's device.

    Args:
        unet: the UNet, for its configuration and its device.
        manifest: its manifest.
        sizes: the sizes of the call by symbol, such as `{"B": 2, "H": 64}`.
        seed: the seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    call = {}
    for spec in manifest.model_inputs:
        shape = [d if isinstance(d, int) else evaluate(d, sizes) for d in spec.shape or ()]
        value = random_value(spec, shape, generator, unet.config)
        call[spec.name] = value.to(unet.device, manifest.dtype_of(spec))
    return call


def with_values(
    unet: GraphUNet, manifest: Manifest, variant: ExportedVariant, call: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a call with the values that a variant reads: PyTorch computes them at the same call."""
    if not variant.reads:
        return dict(call)
    with torch.no_grad():
        _, *values = unet.variant(frozenset(manifest.given))(*call.values())
    known = dict(zip(manifest.variants[0].writes, values, strict=True))
    return {**call, **{f"reused.{site}": known[site] for site in variant.reads}}


def unit_of(unet: GraphUNet) -> int:
    """Return the factor between the sides of the latents and those of the smallest feature maps."""
    return int(2 ** max(len(unet.config.get("down_block_types", ())) - 1, 0))
