"""PruneChannels against the source UNet with zeros in place of what is cut, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph.errors import EditError, PathError, SpecError
from sdgraph.passes import PruneChannels

from ..models import ARCHITECTURES, BASE, KARRAS, answer, build, call_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def unet_of(name: str) -> UNet2DConditionModel:
    if name != "karras":
        return build(name)
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**BASE, **KARRAS}).eval()


def inner(unet: UNet2DConditionModel) -> dict[str, tuple[nn.Module, int, int]]:
    """The layers inside resnets, attentions and feed-forwards that sum over their width, with slices and channels."""
    found: dict[str, tuple[nn.Module, int, int]] = {}
    for path, module in unet.named_modules():
        kind = type(module).__name__
        if "ResnetBlock" in kind:
            groups = module.norm2.num_groups
            found[path] = module.conv2, groups, module.conv2.in_channels // groups
        elif kind == "Attention":
            found[path] = module.to_out[0], module.heads, module.to_out[0].in_features // module.heads
        elif kind == "FeedForward":
            found[path] = module.net[2], module.net[2].in_features, 1
    return {path: one for path, one in found.items() if one[1] > 1}


def zeroed(unet: UNet2DConditionModel, keep: Mapping[str, tuple[int, ...]]) -> UNet2DConditionModel:
    """The same UNet whose layers do not see the slices that are cut."""
    changed = copy.deepcopy(unet)
    layers = inner(changed)
    with torch.no_grad():
        for path, slices in keep.items():
            layer, count, channels = layers[path]
            for cut in set(range(count)) - set(slices):
                layer.weight[:, cut * channels : (cut + 1) * channels] = 0
    return changed


def some(count: int) -> tuple[int, ...]:
    """Some of the numbers below a count, neither the first ones nor the last ones alone."""
    return tuple(number for number in range(count) if number % 3 != 1)


@pytest.mark.law("A UNet without some channels equals the UNet with zeros in their place, within rounding.")
@pytest.mark.parametrize(
    "name",
    [n if n in ("sd15", "sd21") else pytest.param(n, marks=pytest.mark.slow) for n in (*ARCHITECTURES, "karras")],
)
def test_the_result_equals_zeros_in_place_of_the_channels(name: str) -> None:
    unet = unet_of(name)
    keep = {path: some(count) for path, (_, count, _) in inner(unet).items()}
    pruned = sdgraph.apply(unet, PruneChannels(keep=keep), verify=False)
    expected = zeroed(unet, keep)
    assert keep
    odd = {"H": 16, "W": 8} if name == "karras" else {"H": 9, "W": 11}  # its blocks up-sample by factors only
    for sizes in ({"W": 8}, {"B": 1, "L": 3, **odd}):
        call = call_of(unet, **sizes)
        torch.testing.assert_close(answer(pruned, call), answer(expected, call), **CLOSE)
    assert not torch.equal(answer(pruned, call), answer(unet, call))


@pytest.mark.law(
    "Any width of the graph can be cut, also one between blocks, as if its readers had zeros for the rest."
)
@pytest.mark.parametrize("name", ["sd15", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdxl", "upscaler"))])
def test_every_width_that_is_listed_can_be_cut(name: str) -> None:
    unet = build(name)
    whole = sdgraph.trace(unet)
    widths = whole.widths()
    assert {"time_embedding", "up_blocks.0"} <= widths.keys()
    call = call_of(unet)
    for path in widths if name == "sd15" else widths.keys() - inner(unet).keys():
        width, blind = widths[path], whole.copy()
        cut = [number for number in range(width.slices) if number not in some(width.slices)]
        for end in width.ends:
            if end.side == "in":
                layer = copy.deepcopy(blind.module(end.path))
                parts: Any = layer.weight.detach().movedim(1, 0).clone()
                parts.reshape(end.copies, width.slices, -1)[:, cut] = 0
                layer.weight = nn.Parameter(parts.movedim(0, 1).contiguous())
                blind.add_module(end.path, layer)
        narrow = whole.copy()
        narrow.narrow({path: some(width.slices)})
        found, expected = (answer(sdgraph.GraphUNet(graph), call) for graph in (narrow, blind))
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, path=path: f"{path}: {text}")


def test_the_sizes_of_a_cut_are_those_that_were_computed_before(graph: sdgraph.Graph) -> None:
    widths = graph.widths()
    counts = {path: (width.slices + 1) // 2 for path, width in widths.items()}
    expected = widths.size(counts)
    graph.narrow({path: range(count) for path, count in counts.items()})
    assert expected == (sum(p.numel() for p in graph.parameters().values()), graph.macs)


def test_the_widths_of_a_graph_are_shown(small: sdgraph.Graph) -> None:
    widths = small.widths()
    resnet = widths["down_blocks.0.resnets.0"]
    assert (resnet.slices, resnet.kind, resnet.channels) == (4, "groups", 4)
    assert [str(end).removeprefix(f"{resnet.path}.") for end in resnet.ends] == [
        "conv1 out",
        "time_emb_proj out",
        "norm2 norm",
        "conv2 in",
    ]
    lines = {line.split("  ")[0]: line for line in str(widths).splitlines()}
    assert "4 groups of 4" in lines[resnet.path]
    assert "2 heads of 8" in lines["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert "net.0.proj out (128), net.2 in (64)" in lines["down_blocks.0.attentions.0.transformer_blocks.0.ff"]
    (skips,) = [line for line in lines if "concatenated" in line and "up_blocks.0.resnets.0.conv1" in line]
    assert "into other groups" in skips


def test_a_budget_is_met_and_the_choice_comes_back_bit_for_bit(tmp_path: Path) -> None:
    unet = build("sd15")
    pruned = sdgraph.apply(unet, "PruneChannels(parameters=0.8, macs=0.85, multiple=4)")
    row = pruned.report.passes[0]
    assert 0.75 < row.after.parameters / row.before.parameters <= 0.8
    assert row.after.macs / row.before.macs <= 0.85
    assert "groups" in str(pruned.report.notes) + str(row.notes)
    pruned.save_pretrained(tmp_path / "unet")
    loaded = sdgraph.GraphUNet.from_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(loaded, call), answer(pruned, call))
    assert loaded.graph.passes == pruned.graph.passes


def test_small_magnitudes_go_first() -> None:
    unet = build("sd15")
    with torch.no_grad():
        for group in (1, 2):
            for layer, dim in (("conv1", 0), ("conv2", 1)):
                weight = getattr(unet.mid_block.resnets[0], layer).weight
                weight.movedim(dim, 0)[8 * group : 8 * group + 8] *= 0.1
    pruned = sdgraph.apply(unet, "PruneChannels(parameters=0.95, where='mid_block.resnets.0')", verify=False)
    (decision,) = pruned.graph.passes[0].decisions
    assert decision.value == {"mid_block.resnets.0": "9"}


def test_what_is_left_is_a_multiple() -> None:
    pruned = sdgraph.apply(build("sd15"), "PruneChannels(parameters=0.5, multiple=16)", verify=False)
    for path, module in pruned.graph.weights.leaves():
        if path.endswith(("conv1", "to_q", "net.0.proj")):
            assert len(module.weight) % 16 == 0, path  # type: ignore[arg-type, operator]


def test_a_budget_below_the_least_possible_names_that() -> None:
    unet = build("sd15")
    with pytest.raises(SpecError, match=r"parameters=0\.1 is less than (0\.\d+), the least") as caught:
        sdgraph.apply(unet, "PruneChannels(parameters=0.1)", verify=False)
    least = float(str(caught.value).split("less than ")[1].split(",")[0])
    pruned = sdgraph.apply(unet, PruneChannels(parameters=least), verify=False)
    row = pruned.report.passes[0]
    assert row.after.parameters / row.before.parameters == pytest.approx(least, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget and no slices"),
        ({"macs": 0.5, "keep": {"mid_block.resnets.0": (0,)}}, "both a budget and slices"),
        ({"macs": 1.2}, "macs is 1.2"),
        ({"parameters": 0}, "parameters is 0"),
        ({"macs": 0.5, "importance": "magnitud"}, "importance is 'magnitud'"),
        ({"macs": 0.5, "multiple": 0}, "multiple is 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PruneChannels(**options)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"mid_block.resnet.0": (0,)}, PathError, r"did you mean 'mid_block\.resnets\.0'"),
        ({"up_blocks.1.resnets.0.conv1": (0,)}, PathError, "cannot be cut: concatenated"),
        ({"conv_in": (0,)}, PathError, "cannot be cut: the width is that of the input sample"),
        ({"mid_block.attentions.0.proj_out": (0,)}, PathError, "cannot be cut: a norm over all"),
        ({"mid_block.resnets.0": (0, 4)}, EditError, "no slices of mid_block.resnets.0: 4 groups of 8"),
        ({"mid_block.resnets.0": (1, 0)}, EditError, "no slices"),
    ],
)
def test_wrong_slices_are_refused(
    graph: sdgraph.Graph, keep: dict[str, tuple[int, ...]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sdgraph.apply(graph, PruneChannels(keep=keep), verify=False)


def test_a_pruned_unet_is_no_plain_model() -> None:
    pruned = sdgraph.apply(build("sd15"), PruneChannels(keep={"mid_block.resnets.0": (0, 2)}), verify=False)
    with pytest.raises(sdgraph.errors.ModeError, match=r"no plain diffusers UNet.*mid_block\.resnets\.0"):
        pruned.to_diffusers()
