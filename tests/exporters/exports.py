"""UNets that are exported once for all tests, and what is read of an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph.exporters.onnx import parity
from sdgraph.exporters.ort.providers import CPU
from sdgraph.exporters.ort.unet import ORTUNet
from sdgraph.forecasts import Polynomial
from sdgraph.passes import Bypass, GRIAttention, HoistInvariants, InheritFeatures, MECondConv, PruneBlocks
from sdgraph.schedules import Drift, Uniform

from ..models import ATTEND, ONE_LEVEL, PLAIN, build

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
LONG = (pytest.mark.long,)  # an export takes seconds for each graph

PRESETS: dict[str, Any] = {
    "deep cache": [HoistInvariants(), replace(InheritFeatures.deep_cache(3), forecast=1)],
    "faster diffusion": InheritFeatures.faster_diffusion((0, 1, 3)),
    "t-gate": InheritFeatures.t_gate(3, interval=2, warm_up=1),
    "attention broadcast": InheritFeatures.attention_broadcast(),
    "layers": InheritFeatures.at_level("layer", within="{down_blocks.1,mid_block,up_blocks.0}"),
    "plan": [
        Bypass("down_blocks.0.attentions.0", Uniform(2)),
        replace(InheritFeatures.damped(3), forecast=Polynomial(1, 0.5, "lambda")),
    ],
    "drift": InheritFeatures("{mid_block,up_blocks.0}", Drift(9.0, most=3), part="value"),
    "all passes": [
        PruneBlocks("bk-sdm-base"),
        MECondConv(experts=2),
        GRIAttention(4, pool=2),
        InheritFeatures.deep_cache(2),
    ],
}


TWO_LEVELS: dict[str, Any] = {
    "down_block_types": (PLAIN, ATTEND),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
}


class Exported(NamedTuple):
    """A UNet, what it was exported as, and the report."""

    unet: Any
    directory: Path
    report: parity.ExportReport

    def load(self, **options: Any) -> ORTUNet:
        return opened(self.directory, **options)


def opened(directory: Path, provider: str = CPU, **options: Any) -> ORTUNet:
    return ORTUNet.from_pretrained(directory, provider=provider, **options)


# By name, a UNet and the options of its export.
EXPORTS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd15": lambda: (sdgraph.apply(build("sd15")), {}),
    "pruned": lambda: (sdgraph.apply(build("sd15-levels"), "PruneBlocks('bk-sdm-base')"), {}),
    "sdxl": lambda: (build("sdxl"), {}),
    "controlled": lambda: (build("lcm", num_class_embeds=7), {"inputs": RESIDUALS}),
    "half": lambda: (sdgraph.apply(build("sdxl", **TWO_LEVELS).half()), {}),  # joins its time ids in float32
    **{name: lambda name=name: (inheriting(name), {"calls": 6}) for name in PRESETS},
}


def source(name: str) -> UNet2DConditionModel:
    """The UNet that a preset is applied to: the smallest that has its sites."""
    if name == "attention broadcast":  # four graphs
        return build(**ONE_LEVEL)
    return build(layers_per_block=2 if name == "all passes" else 1)


def inheriting(name: str) -> sdgraph.GraphUNet:
    """A UNet with a preset."""
    return sdgraph.apply(source(name), PRESETS[name], verify=False)
