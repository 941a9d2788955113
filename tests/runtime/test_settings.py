"""Settings of a UNet do to a GraphUNet what they do in diffusers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as processors

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import ModeError, SourceError
from sdgraph.schedules import Uniform

from ..models import answer, assert_same, build, call_of
from ..pipelines import PIPELINES, POOLED, PROMPT, SIZE, large, make

FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


@functools.cache
def applied(passes: str) -> GraphUNet:
    """A graph to be copied: `apply` takes longer than the settings."""
    return sdgraph.apply(build(), passes)


def both(change: Callable[[Any], Any], passes: str = "") -> tuple[Any, GraphUNet]:
    """A UNet and the graph of another such, each after the same change."""
    unet, graph = build(), copy.deepcopy(applied(passes))
    change(unet)
    change(graph)
    return unet, graph


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "default": lambda u: u.set_default_attn_processor(),
    "processor": lambda u: u.set_attn_processor(processors.AttnProcessor()),
    "fused": lambda u: u.fuse_qkv_projections(),
    "freeu": lambda u: u.enable_freeu(**FREEU),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("passes", ["", pytest.param("CleanUp, HoistInvariants", marks=pytest.mark.slow)])
def test_settings(setting: str, passes: str, tmp_path: Path) -> None:
    unet, graph = both(SETTINGS[setting], passes)
    changed = assert_same(unet, graph)
    if setting == "fused":
        assert any(name.endswith("to_qkv.weight") for name in graph.state_dict())
    else:
        assert not torch.equal(changed, answer(build(), call_of(unet)))
    graph.save_pretrained(tmp_path / "unet")
    assert_same(unet, GraphUNet.from_pretrained(tmp_path / "unet"))
    assert [str(p) for p in graph.graph.passes] == [str(p) for p in sdgraph.parse(passes)]


@pytest.mark.slow
def test_settings_are_taken_back() -> None:
    def there_and_back(unet: Any) -> None:
        unet.fuse_qkv_projections()
        unet.unfuse_qkv_projections()
        unet.enable_freeu(**FREEU)
        unet.disable_freeu()

    unet, graph = both(there_and_back)
    assert_same(unet, graph)
    assert graph.state_dict().keys() == build().state_dict().keys()
    assert [block.s1 for block in graph.up_blocks] == [None, None]


def test_settings_that_change_nothing_trace_nothing() -> None:
    graph = sdgraph.apply(build())
    before = graph.graph
    graph.set_attn_processor(processors.AttnProcessor2_0())
    graph.set_attn_processor({path: processors.AttnProcessor2_0() for path in graph.attn_processors})
    graph.disable_freeu()
    graph.unfuse_qkv_projections()
    assert graph.graph is before


@pytest.mark.slow
def test_settings_leave_the_weights_and_the_source_alone() -> None:
    unet = build()
    state = copy.deepcopy(unet.state_dict())
    graph = sdgraph.apply(unet)
    parameters = dict(graph.named_parameters())
    graph.set_default_attn_processor()
    graph.fuse_qkv_projections()
    now = dict(graph.named_parameters())
    kept = [name for name in parameters if name in now]
    assert len(kept) > 100
    assert all(now[name] is parameters[name] for name in kept)  # an optimizer goes on with them
    assert type(next(iter(unet.attn_processors.values()))) is processors.AttnProcessor2_0
    assert all(torch.equal(state[name], value) for name, value in unet.state_dict().items())


@pytest.mark.slow
def test_settings_that_cannot_be_traced_change_nothing() -> None:
    unet = build()
    graph = sdgraph.apply(unet)
    before = graph.graph
    with pytest.raises(SourceError, match=r"(?s)SlicedAttnProcessor.*set_default_attn_processor"):
        graph.set_attn_processor(processors.SlicedAttnProcessor(2))
    assert graph.graph is before
    assert_same(unet, graph)
    pruned = sdgraph.apply(unet, "PruneBlocks('mid_block')")
    with_edits = pruned.graph.copy()
    with_edits.bypass("down_blocks.0.attentions.0")
    with pytest.raises(ModeError, match=r"(?s)edits outside of passes.*source UNet"):
        GraphUNet(with_edits).enable_freeu(**FREEU)


def test_settings_do_not_bring_earlier_schedules_back() -> None:
    graph = sdgraph.apply(build(), "InheritFeatures('mid_block', Uniform(2))", verify=False)
    graph.reschedule({"mid_block": dataclasses.replace(graph.graph.sites["mid_block"], schedule=Uniform(5))})
    with pytest.raises(ModeError, match=r"(?s)edits outside of passes.*source UNet"):
        graph.enable_freeu(**FREEU)


@pytest.mark.slow
def test_settings_of_a_pruned_unet() -> None:
    unet = build()
    graph = sdgraph.apply(unet, "PruneBlocks('mid_block')")
    graph.enable_freeu(**FREEU)
    unet.enable_freeu(**FREEU)
    assert_same(sdgraph.apply(unet, "PruneBlocks('mid_block')"), graph)


def test_attention_slicing_says_that_it_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = PIPELINES["text"][0]()
    expected = make(pipe, PIPELINES["text"][1])
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.enable_attention_slicing()
    assert "slicing changes nothing" in caplog.text
    assert torch.equal(expected, make(pipe, PIPELINES["text"][1]))


@pytest.mark.slow
def test_large_pipelines_with_settings() -> None:
    pipe = large("StableDiffusionXLPipeline", build("sdxl"))
    call = {**PROMPT, **POOLED, **SIZE}
    unet = pipe.unet
    pipe.unet = sdgraph.apply(unet)
    for change in (lambda u: u.enable_freeu(**FREEU), lambda u: u.set_default_attn_processor()):
        change(unet)
        change(pipe.unet)
    found = make(pipe, call)
    pipe.unet = unet
    assert torch.equal(make(pipe, call), found)
