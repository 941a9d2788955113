"""The trace is the UNet: bit for bit equal to the source model, one trace for calls of all sizes and dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from sdgraph.errors import CallError

from ..models import (
    ARCHITECTURES,
    CALLS,
    FEW,
    answer,
    build,
    call_of,
    same,
    trace,
)


@pytest.mark.law("One trace equals its source bit for bit at every batch, size and length of text.")
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_trace_serves_all_calls(name: str, traced: Any) -> None:
    unet, graph = traced(name)
    assert [same(unet, graph, **sizes) for sizes in CALLS] == [True] * len(CALLS)


@pytest.mark.law("A trace shares the weights of its source, by name and storage.")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_the_sources_by_name_and_storage(name: str, traced: Any) -> None:
    unet, graph = traced(name)
    expected, found = unet.state_dict(), graph.state_dict()
    assert expected.keys() == found.keys()
    assert all(found[key].data_ptr() == value.data_ptr() for key, value in expected.items())
    assert {n for n, p in unet.named_parameters() if p.requires_grad} == {
        n for n, p in graph.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_node_knows_its_module_and_its_value(name: str, traced: Any) -> None:
    unet, graph = traced(name)
    modules = dict(unet.named_modules())
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        assert {"nn_module_stack", "val", "probe"} <= node.meta.keys(), node
        for path, (name_, kind) in node.meta["nn_module_stack"].items():
            assert path == name_
            assert kind is type(modules[path])
        if node.op == "call_module":
            assert node.target in node.meta["nn_module_stack"]


CASTS = [("sd15", torch.bfloat16), ("sd21", torch.float64), ("sdxl", torch.bfloat16)]

MORE_CASTS = [
    (name, dtype)
    for name in ("sd15", "sd21", "sdxl", "lcm", "class-timestep", "class-concat", "upscaler")
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
    if (name, dtype) not in CASTS
]


@pytest.mark.parametrize(
    ("name", "dtype"), [*CASTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASTS)], ids=str
)
def test_a_cast_trace_equals_the_cast_source(name: str, dtype: torch.dtype) -> None:
    unet = build(name)
    graph = trace(unet).to(dtype)
    assert unet.dtype is torch.float32
    unet.to(dtype)
    assert [same(unet, graph, **sizes) for sizes in FEW] == [True] * len(FEW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_traced_in_another_dtype(dtype: torch.dtype) -> None:
    unet = build().to(dtype)
    graph = trace(unet)
    assert graph.dtype is dtype
    assert [same(unet, graph, **sizes) for sizes in FEW] == [True] * len(FEW)
    assert same(unet.float(), graph.float())


def test_channels_last_weights() -> None:
    unet = build().to(memory_format=torch.channels_last)
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_last_bits_follow_requires_grad(trainable: bool) -> None:
    """PyTorch multiplies a 3-d tensor with a weight in another order when the weight requires gradients."""
    unet = build("refiner").requires_grad_(trainable)
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


MORE_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 102, 149, (101, 149), (16, 8))]


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 101, 104, *MORE_SIZES], ids=str)
def test_no_sample_size_is_frozen(size: Any) -> None:
    """101 and 149 are the sizes the trace tries by default: a model of such a size must not pass for a fixed one."""
    unet = build("sd15-levels", sample_size=size, layers_per_block=1)
    graph = trace(unet)
    assert all(same(unet, graph, **sizes) for sizes in FEW)


def test_autocast() -> None:
    unet = build()
    graph, call = trace(unet), call_of(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(unet, call), answer(graph, call))
        half = {**call, "encoder_hidden_states": call["encoder_hidden_states"].bfloat16()}
        assert torch.equal(answer(unet, half), answer(graph, half))
    with pytest.raises(CallError, match=r"encoder_hidden_states is torch\.bfloat16"):
        graph(**half)  # what autocast allowed is no longer allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", "upscaler"])
def test_attention_without_the_fused_function(name: str) -> None:
    unet = build(name)
    unet.set_attn_processor(AttnProcessor())
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


def test_fused_projections() -> None:
    unet = build()
    unet.fuse_qkv_projections()
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


@pytest.mark.law("Tracing does not change the source.")
def test_tracing_leaves_the_source_alone() -> None:
    unet = build()
    before = {n: (id(p), p.data_ptr(), p.dtype, p.requires_grad, p._version) for n, p in unet.named_parameters()}
    kept, keys = copy.deepcopy(unet.state_dict()), {p: set(vars(m)) for p, m in unet.named_modules()}
    trace(unet)
    after = {n: (id(p), p.data_ptr(), p.dtype, p.requires_grad, p._version) for n, p in unet.named_parameters()}
    assert before == after
    assert all(torch.equal(kept[n], t) for n, t in unet.state_dict().items())
    assert keys == {p: set(vars(m)) for p, m in unet.named_modules()}
