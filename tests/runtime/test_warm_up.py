"""`warm_up` leaves nothing to prepare for the first request, and nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdgraph
from sdgraph.errors import CallError
from sdgraph.passes import Bypass, InheritFeatures
from sdgraph.schedules import Uniform

from ..models import build

PLANS: dict[str, Any] = {
    "no sites": [],
    "inherited": InheritFeatures.damped(2),
    "bypassed": [Bypass("down_blocks.0.resnets.0", Uniform(2)), InheritFeatures.deep_cache(3)],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_generation_builds_nothing_afterwards(plan: Any) -> None:
    unet = sdgraph.apply(build(), plan, verify=False)
    unet.warm_up(8, 12, batch=2, tokens=7, calls=6)
    ready = len(unet.backend)
    assert unet.cache_bytes() == 0
    prompt = torch.randn(2, 7, unet.config.cross_attention_dim)
    with torch.no_grad(), unet.expecting(6):
        for timestep in range(600, 0, -100):
            unet(torch.randn(2, 4, 8, 12), timestep, prompt)
    assert len(unet.backend) == ready


def test_a_generation_under_way_goes_on() -> None:
    source = build()
    disturbed, other = (sdgraph.apply(source, InheritFeatures.deep_cache(3), verify=False) for _ in range(2))
    prompt = torch.randn(2, 7, source.config.cross_attention_dim)
    outputs = []
    for model in (disturbed, other):
        with torch.no_grad(), model.expecting(2):
            model(torch.ones(2, 4, 8, 12), 600, prompt)
            if model is disturbed:
                model.warm_up(8, 8, calls=6)
            outputs.append(model(torch.ones(2, 4, 8, 12), 500, prompt).sample)
    assert torch.equal(*outputs)
    assert len(disturbed.backend) == len(other.backend) == 2  # the second call inherited


@pytest.mark.parametrize("wrong", [{"height": 0}, {"width": -8}, {"batch": 1.5}, {"tokens": "77"}, {"height": True}])
def test_wrong_sizes_are_refused(unet: Any, wrong: dict[str, Any]) -> None:
    made = sdgraph.GraphUNet(sdgraph.trace(unet))
    name = next(iter(wrong))
    with pytest.raises(CallError, match=f"{name} is"):
        made.warm_up(**{"height": 8, "width": 8, **wrong})


def test_a_size_that_the_graph_does_not_cover_is_refused(unet: Any) -> None:
    graph = sdgraph.trace(unet)
    graph.require("H % 4 == 0", "four rows at a time")
    with pytest.raises(CallError, match=r"latents of 6x8 is not covered(.*\n)*.*2 of 8x8"):
        sdgraph.GraphUNet(graph).warm_up(6, 8)
