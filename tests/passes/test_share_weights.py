"""ShareWeights: one set of weights for regions of the same shape, everywhere; norms stay their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Graph, GraphUNet, parse
from sdgraph.errors import EditError, PathError, ShapeError, SpecError
from sdgraph.passes import Bypass, InheritFeatures, MECondConv, PruneBlocks, ShareWeights
from sdgraph.schedules import Uniform
from sdgraph.tuning import Output, Tensors

from ..models import CROSS, ONE_LEVEL, answer, build, call_of, edits

PAIR = ("up_blocks.0.resnets.0", "up_blocks.0.resnets.1")


def tied(source: UNet2DConditionModel, groups: tuple[tuple[str, ...], ...]) -> UNet2DConditionModel:
    """A source whose regions have equal weights, except for their norms."""
    copy = UNet2DConditionModel.from_config(source.config).eval()
    copy.load_state_dict(source.state_dict())
    for first, *others in groups:
        for path in others:
            for name, module in copy.get_submodule(path).named_modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.load_state_dict(copy.get_submodule(f"{first}.{name}").state_dict())
    return copy


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if "safetensors" in file.name or ".onnx" in file.name)


def test_a_region_uses_the_weights_of_another(small: Graph) -> None:
    after = sdgraph.apply(small, ShareWeights((PAIR,))).graph
    assert edits(small, after, within=PAIR[0]) == []
    assert edits(small, after, within=PAIR[1]) == [
        "-% = conv1(%)",
        "+% = up_blocks.0.resnets.0.conv1(%)",
        "-% = time_emb_proj(%)",
        "+% = up_blocks.0.resnets.0.time_emb_proj(%)",
        "-% = conv2(%)",
        "-% = conv_shortcut(%)",
        "+% = up_blocks.0.resnets.0.conv2(%)",
        "+% = up_blocks.0.resnets.0.conv_shortcut(%)",
    ]


def test_it_computes_what_equal_weights_compute(tmp_path: Path) -> None:
    source = build("sd15", layers_per_block=2)
    groups = (("up_blocks.1.resnets.1", "up_blocks.1.resnets.2"), ("mid_block.resnets.0", "mid_block.resnets.1"))
    unet, expected = sdgraph.apply(source, ShareWeights(groups)), tied(source, groups)
    call = call_of(source)
    assert torch.equal(answer(unet, call), answer(expected, call))
    plain = unet.to_diffusers()  # in which every region has its own copy
    assert torch.equal(answer(plain, call), answer(expected, call))

    gone = {n for n in source.state_dict() if n.startswith((groups[0][1], groups[1][1])) and ".norm" not in n}
    assert source.state_dict().keys() - unet.state_dict().keys() == gone
    spared = sum(source.get_parameter(name).numel() for name in gone)
    assert len({id(p) for p in unet.parameters()}) == len(list(unet.parameters()))
    assert source.num_parameters() - unet.num_parameters() == spared
    unet.save_pretrained(tmp_path / "shared")
    sdgraph.apply(source).save_pretrained(tmp_path / "whole")
    assert size(tmp_path / "whole") - size(tmp_path / "shared") > 0.99 * 4 * spared
    assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / "shared"), call), answer(unet, call))


@pytest.mark.slow
def test_an_export_has_shared_weights_once(tmp_path: Path) -> None:
    source = build(**ONE_LEVEL)
    unet = sdgraph.apply(source, ShareWeights((PAIR,)))
    for name, each in (("shared", unet), ("whole", sdgraph.apply(source))):
        sdgraph.exporters.onnx.export(each, tmp_path / name)
    spared = source.num_parameters() - unet.num_parameters()
    assert size(tmp_path / "whole") - size(tmp_path / "shared") > 0.95 * 4 * spared
    running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "shared", provider="CPUExecutionProvider")
    call = call_of(source)
    torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-3, atol=1e-4)


@pytest.mark.law("Shared weights are trained once.")
def test_shared_weights_are_trained_once(tmp_path: Path) -> None:
    """Their gradient is the sum of those of both regions, and one step of the optimizer changes them."""
    source = build(**ONE_LEVEL)
    unet = sdgraph.apply(source, ShareWeights((PAIR,))).train()
    both = tied(source, (PAIR,)).train()
    call = call_of(source)
    for each in (unet, both):
        each(**call).sample.square().sum().backward()
    for name in ("conv1.weight", "conv2.bias"):
        first, second = (both.get_parameter(f"{path}.{name}").grad for path in PAIR)
        torch.testing.assert_close(unet.get_parameter(f"{PAIR[0]}.{name}").grad, first + second, rtol=1e-3, atol=1e-4)

    draw = torch.Generator().manual_seed(0)
    data = Tensors(torch.randn(4, 4, 8, 8, generator=draw), {"encoder_hidden_states": torch.randn(4, 5, CROSS)})
    tuned, _ = sdgraph.tune(
        unet, source, data, scheduler=DDPMScheduler(), max_train_steps=2, output_dir=tmp_path / "run",
        losses=(Output(),),
        train_batch_size=2, learning_rate=1e-3, report_to="none",
    )  # fmt: skip
    assert tuned.num_parameters() == unet.num_parameters() < source.num_parameters()
    again = GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    assert torch.equal(answer(again, call), answer(tuned, call))


@pytest.mark.slow
def test_similar_regions_are_found_and_recorded(tmp_path: Path) -> None:
    source = build("sd15-levels")
    pairs = [("down_blocks.3.resnets.0", "mid_block.resnets.1"), ("up_blocks.3.resnets.1", "up_blocks.3.resnets.2")]
    near = tied(source, tuple(pairs))
    with torch.no_grad():
        for parameter in near.get_submodule(pairs[0][1]).parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    (one,) = parse(str(ShareWeights.similar("**.resnets.*", count=2)))
    unet = sdgraph.apply(near, [one])
    assert unet.report.passes[-1].decisions[0].value == [list(pair) for pair in pairs]
    edits = {(edit.path, *edit.by) for edit in unet.report.passes[-1].edits if edit.kind == "replaced"}
    assert edits >= {(f"{b}.conv1", f"{a}.conv1") for a, b in pairs}
    unet.save_pretrained(tmp_path / "saved")  # loading knows the shapes of weights only
    call = call_of(source)
    assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / "saved"), call), answer(unet, call))
    (only,) = [p.value for p in sdgraph.apply(near, ShareWeights.similar(count=1)).report.passes[-1].decisions]
    assert only == [list(pairs[1])]
    with pytest.raises(EditError, match="of 2 regions only 1 can use the weights of others"):
        sdgraph.apply(source, ShareWeights.similar("mid_block.resnets.*", count=2))


@pytest.mark.long
def test_shared_regions_are_pruned_inherited_and_rewritten_one_by_one() -> None:
    source = build("sd15", layers_per_block=2)
    pair = ("up_blocks.1.resnets.1", "up_blocks.1.resnets.2")
    shared, call = ShareWeights((pair,)), call_of(source)
    for path in pair:
        for other in (PruneBlocks(path), Bypass(path, Uniform(2)), InheritFeatures(path, Uniform(2))):
            one, two = (sdgraph.apply(source, [shared, other]), sdgraph.apply(tied(source, (pair,)), [other]))
            for _ in range(2):
                assert torch.equal(answer(one, call), answer(two, call))
        with pytest.raises(sdgraph.SdgraphError, match="conv2"):
            sdgraph.apply(source, [shared, MECondConv(f"{path}.conv2", donors="copies")])
    one = sdgraph.apply(source, [MECondConv("up_blocks.1.**.conv2", donors="copies"), shared])
    assert one.num_parameters() < sdgraph.apply(source, one.graph.passes[0].one).num_parameters()
    assert torch.equal(answer(one, call), answer(sdgraph.apply(source, shared), call))


@pytest.mark.parametrize(
    ("groups", "error", "complaint"),
    [
        ((), SpecError, "names no groups"),
        ("mid_block.resnets.*", SpecError, "groups is 'mid_block"),
        ((("mid_block.resnets.9", "mid_block.resnets.0"),), PathError, "no module 'mid_block.resnets.9'"),
        (("mid_block.attentions.*",), EditError, "mid_block.attentions.0 is alone in its group"),
        (
            (("down_blocks.0.resnets.0", "mid_block.resnets.0"),),
            EditError,
            r"resnets.0.conv1 is Conv2d\(16, 16.*mid_block.resnets.0.conv1 is Conv2d\(32, 32",
        ),
        (
            (("down_blocks.1.resnets.0", "mid_block.resnets.0"),),
            EditError,
            r"conv1 is Conv2d\(16, 32.*mid_block.resnets.0.conv1 is Conv2d\(32, 32",
        ),
        (
            (("mid_block.resnets.0", "mid_block.attentions.0"),),
            EditError,
            r"(resnets.0|attentions.0).* is nothing, and|is .*, and .* is nothing",
        ),
        (("mid_block.resnets.*", "{down_blocks.1,mid_block}.resnets.*"), EditError, "mid_block.resnets.0 overlap"),
        ((("mid_block", "mid_block.resnets.0"),), EditError, "mid_block and mid_block.resnets.0 overlap"),
        (("mid_block.resnets.*.norm1",), EditError, "have no weights to share"),
    ],
)
def test_what_is_refused(groups: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        sdgraph.apply(build(), ShareWeights(groups))


def test_what_is_shared_already_is_refused() -> None:
    shared = sdgraph.apply(build(), ShareWeights(("mid_block.resnets.*",)))
    with pytest.raises(EditError, match=r"mid_block.resnets.0 and mid_block.resnets.1.* share weights already"):
        sdgraph.apply(shared, ShareWeights(("mid_block.resnets.*",)))
    with pytest.raises(EditError, match=r"conv1 and mid_block.resnets.1.conv1 share weights already"):
        sdgraph.apply(shared, ShareWeights((("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"),)))


def test_a_node_uses_the_weights_at_another_path(graph: Graph) -> None:
    nodes = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    conv = nodes["mid_block.resnets.1.conv1"]
    with pytest.raises(PathError, match=r"no weights 'mid_block.resnets.9.conv1'"):
        graph.share(conv, "mid_block.resnets.9.conv1")
    with pytest.raises(ShapeError, match=r"resnets.1.conv1 is Conv2d\(32.*conv_in is Conv2d\(4"):
        graph.share(conv, "conv_in")
    graph.share(conv, "mid_block.resnets.0.conv1")
    graph.eliminate_dead_code()
    assert "mid_block.resnets.1.conv1.weight" not in graph.parameters()
    assert "mid_block.resnets.0.conv1.weight" in graph.region("mid_block.resnets.1.conv1").parameters
