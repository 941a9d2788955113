"""Graph: what it knows of its nodes, regions and costs."""

from __future__ import annotations

import gc
import weakref

import networkx as nx
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sdgraph
from sdgraph import Graph
from sdgraph.errors import EditError, PathError
from sdgraph.frontend.capture import capture

from .models import answer, build, call_of

UNIT = "down_blocks.0.attentions.0.transformer_blocks.0"


def test_published_costs_of_sd15() -> None:
    """GMACs at 64x64, in all and by stage, and parameters: the figures known for SD 1.x."""
    with torch.device("meta"):
        graph = capture(UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280)))
    assert sum(p.numel() for p in graph.parameters().values()) == 859_520_964
    assert graph.macs / 1e9 == pytest.approx(401.6, abs=0.05)
    regions = graph.regions()
    stages = [*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4))]
    found = [round(regions[s].macs / 1e9, 1) for s in stages]
    assert found == [54.8, 34.2, 31.9, 3.8, 6.0, 12.9, 75.8, 83.4, 98.8]
    resnets = [p for p, r in regions.items() if r.source_class == "ResnetBlock2D"]
    attentions = [p for p, r in regions.items() if r.source_class == "Transformer2DModel"]
    assert (len(resnets), len(attentions)) == (22, 16)


def test_costs_are_pytorch_s_own_count(unet: UNet2DConditionModel, graph: Graph) -> None:
    call = call_of(unet, B=1, H=unet.config.sample_size, W=unet.config.sample_size, L=77, timestep=torch.tensor([1]))
    bare = build("sd15").to("meta")  # where attention is counted product by product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare(**{name: value.to("meta") for name, value in call.items()})
    assert graph.macs == counter.get_total_flops() // 2


def test_regions_know_their_borders(unet: UNet2DConditionModel, graph: Graph) -> None:
    region = graph.region("up_blocks.1.resnets.0")
    assert region.source_class == "ResnetBlock2D"
    assert region.output.name in {n.name for n in region.nodes}
    assert region.main_input is not None
    assert region.main_input.target is torch.cat
    assert graph.shape(region.output) == "B×16×H×W"
    source = unet.up_blocks[1].resnets[0]
    assert region.parameters.keys() == {f"up_blocks.1.resnets.0.{n}" for n, _ in source.named_parameters()}
    assert region.bytes > sum(p.numel() * p.element_size() for p in source.parameters())
    assert [len(graph.region(f"down_blocks.{i}").outputs) for i in range(2)] == [2, 1]  # one per skip
    inside = graph.region(UNIT)
    assert [graph.region(f"{UNIT}.{unit}").source_class for unit in ("attn1", "attn2", "ff")] == [
        "Attention",
        "Attention",
        "FeedForward",
    ]
    assert set(graph.region(f"{UNIT}.attn1").nodes) < set(inside.nodes)


def test_every_node_knows_its_place_and_its_values(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "output":
            continue
        assert "nn_module_stack" in node.meta
        assert node.meta["val"] is not None
        assert node.meta["probe"] is not None


def test_networkx_view(graph: Graph) -> None:
    net = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(net)
    assert len(net) == len(graph.nodes)
    assert nx.has_path(net, "sample", "output")
    assert sum(data["macs"] for _, data in net.nodes(data=True)) == graph.macs
    cut = nx.immediate_dominators(net, "sample")
    assert "conv_in" in cut.values()


def test_copies_are_independent(graph: Graph) -> None:
    one, two = graph.copy(), graph.copy()
    one.bypass("mid_block")
    one.eliminate_dead_code()
    assert "mid_block" not in one.paths()
    assert "mid_block" in two.paths()
    assert not any(k.startswith("mid_block") for k in one.parameters())
    assert any(k.startswith("mid_block") for k in two.parameters())
    pointers = {p.data_ptr() for p in graph.parameters().values()}
    assert {p.data_ptr() for p in two.parameters().values()} == pointers  # no weight copied
    assert not {id(p) for p in graph.parameters().values()} & {id(p) for p in two.parameters().values()}


def test_hooks_on_the_result_are_not_on_the_source(unet: UNet2DConditionModel) -> None:
    result = sdgraph.apply(unet, [], verify=False)
    result.conv_in.register_forward_hook(lambda module, args, out: out * 0)
    call = call_of(unet)
    assert not unet.conv_in._forward_hooks
    assert not torch.equal(answer(result, call), answer(unet, call))


@pytest.mark.slow
def test_moving_the_result_lets_go_of_the_source_s_storage() -> None:
    unet = build("sd15")
    result = sdgraph.apply(unet, "CleanUp", verify=False).to(torch.bfloat16)
    gone = weakref.ref(unet.conv_in.weight)
    storage = weakref.ref(unet.conv_in.weight.untyped_storage())
    del unet
    gc.collect()
    assert gone() is None
    assert storage() is None
    assert result.dtype == torch.bfloat16


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    graph = sdgraph.trace_code(model, x=("B", 4)).copy()
    assert graph.tensor("0.weight") is graph.tensor("2.weight")


def test_errors_name_the_nearest(graph: Graph) -> None:
    with pytest.raises(PathError, match=r"did you mean 'mid_block"):
        graph.region("mid_blok")
    with pytest.raises(PathError, match="did you mean 'timestep'"):
        graph.input("timesteps")
    with pytest.raises(PathError, match="no leaf module"):
        graph.module("conv_inn")
    with pytest.raises(EditError, match="is used by"):
        graph.erase(graph.region("conv_in").output)
    with pytest.raises(EditError, match="has 2 outputs"):
        graph.replace("down_blocks.0", nn.Identity())
    with pytest.raises(EditError, match="without a path"):
        graph.insert(nn.SiLU(), graph.output)


def test_the_last_of_each_is_another_one_for_each_parent() -> None:
    """Down blocks have two layers, up blocks three."""
    graph = sdgraph.trace(build("sd15-levels"))
    assert graph.matching("down_blocks.*.resnets.-1") == [f"down_blocks.{i}.resnets.1" for i in range(4)]
    assert graph.matching("{down,up}_blocks.-1.resnets.-1") == ["down_blocks.3.resnets.1", "up_blocks.3.resnets.2"]
    assert graph.matching("up_blocks.*.attentions.-1") == [f"up_blocks.{i}.attentions.2" for i in (1, 2, 3)]
    assert graph.matching("*_blocks.0.resnets.-2") == ["down_blocks.0.resnets.0", "up_blocks.0.resnets.1"]
    assert graph.matching("**.resnets.-1")[-1] == "up_blocks.3.resnets.2"
    with pytest.raises(PathError):
        graph.matching("up_blocks.*.attentions.-7")
