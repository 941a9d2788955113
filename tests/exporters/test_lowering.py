"""Graphs with ONNX Runtime's own operators: what is lowered, what is left, and that the numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

import sdgraph
from sdgraph import Contract
from sdgraph.errors import EditError, SpecError
from sdgraph.exporters.onnx import contrib_ops as contrib
from sdgraph.exporters.onnx import export
from sdgraph.exporters.onnx.lowering import ALL, LowerAttention, LowerBiasAdd, LowerGEGLU, LowerGroupNorm
from sdgraph.exporters.ort.unet import ORTUNet
from sdgraph.passes import HoistInvariants, InheritFeatures

from ..models import answer, build, call_of

WIDE = {"block_out_channels": (320, 320), "norm_num_groups": 32, "attention_head_dim": 8}  # GEGLU kernels have widths


def counts(unet: sdgraph.GraphUNet) -> dict[str, int]:
    return {
        each.spec: sum(edit.kind == "replaced" for edit in each.edits)
        for each in unet.report.passes
        if each.spec.startswith("Lower")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "upscaler", "inpaint", "lcm"])
def test_every_place_is_lowered_and_numbers_stay(name: str) -> None:
    source = build(name)
    kinds = Counter(type(module).__name__ for module in source.modules())
    unet = sdgraph.apply(source, ("CleanUp", *ALL))  # each pass is checked against its contract
    found = counts(unet)
    assert found["LowerGroupNorm()"] == kinds["GroupNorm"] > 0
    assert found["LowerAttention()"] == kinds["Attention"] > 0
    assert found["LowerBiasAdd()"] == kinds["Attention"] + kinds["FeedForward"]
    for sizes in ({}, {"B": 3, "H": 12, "W": 20}):
        call = call_of(source, **sizes)
        torch.testing.assert_close(answer(unet, call), answer(source, call), rtol=1e-3, atol=1e-4)
    # the first of each chain follows no sum
    assert found["LowerLayerNorm()"] == kinds["LayerNorm"] - kinds["Transformer2DModel"] > 0
    assert unet.graph.macs == sdgraph.apply(source).graph.macs
    names = set(source.state_dict())
    assert set(unet.state_dict()) == names  # weights keep theirs
    assert not any(node.target is torch.nn.functional.group_norm for node in unet.graph.nodes)


@pytest.mark.slow
def test_a_width_without_a_kernel_is_left() -> None:
    narrow = sdgraph.apply(build(), (LowerGEGLU(),), verify=False).report.passes[-1]
    assert not narrow.edits
    assert {miss.reason.partition(" is none")[0] for miss in narrow.near_misses} == {"the width 128", "the width 256"}
    wide = sdgraph.apply(build(**WIDE), ("CleanUp", *ALL), verify=False)
    assert counts(wide)["LowerGEGLU()"] == 4


def test_none_where_there_should_be_some_is_an_error() -> None:
    """Casts lie between an attention and what joins its heads before cleaning up; here something stays there."""
    graph = sdgraph.apply(build(), "CleanUp").graph.copy()
    for node in list(graph.nodes):
        if node.target is torch.nn.functional.scaled_dot_product_attention:
            graph.insert_after(node, lambda x: x * 2.0)
    with pytest.raises(EditError, match="none of 8 places has the form that the operator takes; its heads are not"):
        LowerAttention().run(graph)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("sd15", torch.float16), ("sd21", torch.float32)])
def test_attention_is_upcast_where_the_configuration_says_so(name: str, dtype: torch.dtype) -> None:
    unet = sdgraph.apply(build(name).half(), ("CleanUp", LowerAttention()), verify=False)
    attentions = [node for node in unet.graph.nodes if node.target is contrib.attention]
    assert len(attentions) == 8
    for node in attentions:
        assert {each.meta["val"].dtype for each in (node, *node.args[:3])} == {dtype}
    assert answer(unet, call_of(unet)).dtype == torch.float16


def test_what_is_left_alone_is_told() -> None:
    unet = sdgraph.apply(build(), ("CleanUp", "GRIAttention(4, pool=2)", LowerAttention()), verify=False)
    report = unet.report.passes[-1]
    replaced = [edit for edit in report.edits if edit.kind == "replaced"]
    assert len(replaced) == 5  # cross-attention, and self-attention of the middle
    assert {miss.reason for miss in report.near_misses} == {"it has a mask, or options"}


@pytest.mark.slow
def test_hoisted_keys_are_joined_again() -> None:
    source = build()
    unet = sdgraph.apply(source, (HoistInvariants(), "CleanUp", LowerAttention()))
    call = call_of(source)
    for step in range(3):
        now = {**call, "timestep": 900 - step}
        torch.testing.assert_close(answer(unet, now), answer(source, now), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_passes_that_find_nothing_to_lower_change_nothing() -> None:
    unet = sdgraph.apply(build(), ("CleanUp", LowerAttention(), LowerBiasAdd()), verify=False)
    again = sdgraph.apply(unet, (LowerAttention(), LowerBiasAdd()), verify=False)
    assert len(again.graph.nodes) == len(unet.graph.nodes)
    assert not any(each.edits for each in again.report.passes[-2:])
    assert all(isinstance(each.contract, Contract) for each in ALL)


def test_operators_are_what_they_are_documented_to_be() -> None:
    x, skip = torch.randn(2, 5, 6, 8), torch.randn(2, 8)
    gamma, beta = torch.randn(2, 8)
    expected = torch.nn.functional.group_norm((x + skip[:, None, None]).permute(0, 3, 1, 2), 4, gamma, beta, 1e-5)
    normed, total = contrib.skip_group_norm(x, skip, gamma, beta, 4, 1e-5, True)
    torch.testing.assert_close(normed, torch.nn.functional.silu(expected).permute(0, 2, 3, 1))
    torch.testing.assert_close(total, x + skip[:, None, None])
    a, b = torch.randn(2, 3, 7, 4)
    bias = torch.randn(8)
    gated = contrib.bias_split_gelu(torch.cat([a, b], -1), bias)
    torch.testing.assert_close(gated, (a + bias[:4]) * torch.nn.functional.gelu(b + bias[4:]))


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_exported_operators_by_their_definitions(half: bool, tmp_path: Path) -> None:
    """The counts of what was fused are in the report; ONNX Runtime's CPU provider computes what eager computes."""
    dtype = torch.float16 if half else torch.float32
    source = sdgraph.apply(build(**WIDE), InheritFeatures.deep_cache(3), verify=False)
    report = export(source, tmp_path / "cuda", target="cuda", dtype=dtype, calls=4, progress=False)
    assert source.dtype == torch.float32
    unet = sdgraph.apply(source, (), verify=False).to(dtype)
    fused = {"GroupNorm": 21, "Attention": 8, "GEGLU": 4, "BiasAdd": 12, "LayerNorm": 8}
    assert report.fused == {f"Lower{name}": count for name, count in fused.items()}
    assert "LowerAttention 8" in str(report)
    model = onnx.load(tmp_path / "cuda" / "model.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node if node.domain == "com.microsoft")
    assert kinds["GroupNorm"] + kinds["SkipGroupNorm"] == 21
    assert (kinds["MultiHeadAttention"], kinds["BiasSplitGelu"]) == (8, 4)
    assert (kinds["BiasAdd"], kinds["SkipLayerNormalization"]) == (4, 8)  # a norm takes in the bias and sum before it
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if "GroupNorm" in node.op_type:  # as the kernels want them
            assert all(stored[name] == onnx.TensorProto.FLOAT for name in node.input[1:3])
            assert {a.name: a.i for a in node.attribute}["channels_last"] == 1
    running = ORTUNet.from_pretrained(tmp_path / "cuda", provider="CPUExecutionProvider")
    call = call_of(unet, H=9, W=14, L=77)
    bounds = {"rtol": 5e-2, "atol": 2e-2} if half else {"rtol": 1e-3, "atol": 1e-4}
    for step in range(4):
        now = {**call, "timestep": 900 - step}
        torch.testing.assert_close(answer(running, now), answer(unet, now), **bounds)


def test_there_are_two_artefacts(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="target is 'gpu'"):
        export(build(), tmp_path / "out", target="gpu")


def test_lowering_passes_print_and_parse() -> None:
    for one in (*ALL, LowerGroupNorm()):
        assert sdgraph.parse(str(one)) == (one,)
