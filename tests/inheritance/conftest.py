"""UNets that inherit: a tiny one, and that of a pipeline."""

from __future__ import annotations

import copy

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.passes import HoistInvariants, InheritFeatures


@pytest.fixture(scope="session")
def applied(unet: UNet2DConditionModel) -> dict[str, GraphUNet]:
    inherit = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"
    return {"inherit": sdgraph.apply(unet, inherit), "hoist": sdgraph.apply(unet, HoistInvariants())}


@pytest.fixture
def inheriting(applied: dict[str, GraphUNet]) -> GraphUNet:
    """A tiny UNet with DeepCache's site, which has seen no calls."""
    return copy.deepcopy(applied["inherit"])


@pytest.fixture
def hoisting(applied: dict[str, GraphUNet]) -> GraphUNet:
    return copy.deepcopy(applied["hoist"])


@pytest.fixture(scope="module")
def caching(pipe: StableDiffusionPipeline, whole: Graph) -> GraphUNet:
    """The pipeline's UNet with DeepCache's site, at every third call."""
    return sdgraph.apply(whole, InheritFeatures.deep_cache(3, branch=1))
