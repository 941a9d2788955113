"""Tensors and graphs that callers hold may be edited, or say why not; no output changes by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import CallError, EditError
from sdgraph.passes import InheritFeatures
from sdgraph.schedules import Explicit

from ..models import build, call_of


@pytest.mark.slow
@pytest.mark.parametrize("site", ["conv_out", "conv_in"])
def test_callers_may_edit_what_they_gave_and_got(site: str, unet: Any) -> None:
    unet = sdgraph.apply(unet, f"InheritFeatures('{site}', Uniform(9))")
    untouched = copy.deepcopy(unet)
    call = call_of(unet, B=1)
    latents, values = call["sample"].clone(), dict[str, Tensor]()
    for timestep in (900, 800, 700):
        given = {**call, "sample": latents.clone(), "timestep": timestep}
        with torch.no_grad():
            output = unet(**given).sample
            expected, fresh = untouched.compute(values, **{**call, "sample": latents, "timestep": timestep})
        assert torch.equal(output, expected)
        values |= {name: value.clone() for name, value in fresh.items()}
        output.mul_(3)
        given["sample"].mul_(5)


def test_the_functional_form_hands_out_no_tensor_twice(unet: Any) -> None:
    unet = sdgraph.apply(unet, "InheritFeatures('conv_out', Uniform(9))")
    call = call_of(unet)
    with torch.no_grad():
        output, values = unet.compute({}, **call)
        kept = values["conv_out"].clone()
        output.zero_()
        again, _ = unet.compute(values, **call)
        again.zero_()
    assert torch.equal(values["conv_out"], kept)


def test_the_graph_of_a_unet_is_not_edited(unet: Any) -> None:
    """Its calls are compiled once; an edit would reach some of them."""
    graph = sdgraph.apply(unet, "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')").graph
    (site,) = graph.sites
    for edit in (
        lambda: graph.reschedule(site, Explicit((0,))),
        lambda: graph.bypass("mid_block"),
        lambda: graph.replace("mid_block", lambda x, *_: x),
        lambda: graph.add_parameter("extra", torch.zeros(1)),
        lambda: graph.rewire(graph.output, graph.output),
        lambda: graph.erase(graph.output),
        lambda: graph.inherit(graph.output, "output", Explicit((0,))),
        lambda: graph.eliminate_dead_code(),
    ):
        with pytest.raises(EditError, match="belongs to a GraphUNet") as caught:
            edit()
        assert "copy" in caught.value.hint
    twin = graph.copy()
    twin.reschedule(site, Explicit((0,)))
    assert GraphUNet(twin).graph.sites[site].schedule == Explicit((0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value[:1], r"has shape \(1, "),
        (lambda value: value[..., :2], "has shape"),
        (lambda value: value.flatten(), "has shape"),
        (lambda value: value.to("meta"), "is on meta"),
    ],
    ids=["batch", "width", "rank", "device"],
)
def test_a_value_of_another_call_is_refused(change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    unet = sdgraph.apply(build(), InheritFeatures.deep_cache(2), verify=False)
    call = call_of(unet)
    with torch.no_grad():
        _, values = unet.compute({}, **call)
        with pytest.raises(CallError, match=message):
            unet.compute({site: change(value) for site, value in values.items()}, **call)
