"""Graph and regions: what they know, and the verbs that edit them."""

from __future__ import annotations

import gc
import weakref

import networkx as nx
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sdgraph
from sdgraph import Graph, GraphUNet
from sdgraph.errors import EditError, PathError, ShapeError, TraceError
from sdgraph.frontend.capture import capture

from .models import answer, build, call_of

UNIT = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return build("sd15")


@pytest.fixture(scope="module")
def traced(unet: UNet2DConditionModel) -> Graph:
    return sdgraph.trace(unet)


@pytest.fixture
def graph(traced: Graph) -> Graph:
    return traced.copy()


def settled(graph: Graph) -> GraphUNet:
    graph.eliminate_dead_code()
    graph.propagate()
    graph.fx.lint()
    return GraphUNet(graph.copy())


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


def test_costs_are_pytorch_s_own_count(unet: UNet2DConditionModel, traced: Graph) -> None:
    call = call_of(unet, B=1, H=unet.config.sample_size, W=unet.config.sample_size, L=77, timestep=torch.tensor([1]))
    bare = build("sd15").to("meta")  # where attention is counted product by product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare(**{name: value.to("meta") for name, value in call.items()})
    assert traced.macs == counter.get_total_flops() // 2


def test_regions_know_their_borders(unet: UNet2DConditionModel, traced: Graph) -> None:
    region = traced.region("up_blocks.1.resnets.0")
    assert region.source_class == "ResnetBlock2D"
    assert region.output.name in {n.name for n in region.nodes}
    assert region.main_input is not None
    assert region.main_input.target is torch.cat
    assert traced.shape(region.output) == "B×16×H×W"
    source = unet.up_blocks[1].resnets[0]
    assert region.parameters.keys() == {f"up_blocks.1.resnets.0.{n}" for n, _ in source.named_parameters()}
    assert region.bytes > sum(p.numel() * p.element_size() for p in source.parameters())
    assert [len(traced.region(f"down_blocks.{i}").outputs) for i in range(2)] == [2, 1]  # one per skip
    inside = traced.region(UNIT)
    assert [traced.region(f"{UNIT}.{unit}").source_class for unit in ("attn1", "attn2", "ff")] == [
        "Attention",
        "Attention",
        "FeedForward",
    ]
    assert set(traced.region(f"{UNIT}.attn1").nodes) < set(inside.nodes)


def test_every_node_knows_its_place_and_its_values(traced: Graph) -> None:
    for node in traced.nodes:
        if node.op == "output":
            continue
        assert "nn_module_stack" in node.meta
        assert node.meta["val"] is not None
        assert node.meta["probe"] is not None


def test_networkx_view(traced: Graph) -> None:
    net = traced.to_networkx()
    assert nx.is_directed_acyclic_graph(net)
    assert len(net) == len(traced.nodes)
    assert nx.has_path(net, "sample", "output")
    assert sum(data["macs"] for _, data in net.nodes(data=True)) == traced.macs
    cut = nx.immediate_dominators(net, "sample")
    assert "conv_in" in cut.values()


def test_insert_traces_code_and_scales_with_the_call(unet: UNet2DConditionModel, graph: Graph) -> None:
    out = graph.region("mid_block").outputs[-1]

    def centre(x: torch.Tensor) -> torch.Tensor:
        batch, channels = x.shape[:2]
        return x - x.reshape(batch, channels, -1).mean(-1).view(batch, channels, 1, 1)

    made = graph.insert_after(out, centre)
    assert made.meta["val"].shape == out.meta["val"].shape
    assert all("nn_module_stack" in n.meta for n in graph.nodes if n.op != "output")
    edited = settled(graph)
    for sizes in ({"B": 2}, {"B": 3, "H": 5, "W": 9}):
        call = call_of(unet, **sizes)
        handle = unet.mid_block.register_forward_hook(lambda m, i, o: centre(o))
        expected = answer(unet, call)
        handle.remove()
        assert torch.equal(answer(edited, call), expected)


def test_replace_with_a_module(unet: UNet2DConditionModel, graph: Graph) -> None:
    width = graph.region(f"{UNIT}.ff").output.meta["val"].shape[-1]
    module = nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, width))
    graph.replace(f"{UNIT}.ff", module)
    edited = settled(graph)
    names = {n for n in edited.state_dict() if n.startswith(f"{UNIT}.ff.")}
    assert names == {f"{UNIT}.ff.{n}" for n in module.state_dict()}
    twin = build("sd15")
    twin.get_submodule(UNIT).ff = module
    call = call_of(unet)
    assert torch.equal(answer(edited, call), answer(twin, call))


def test_replace_with_code_that_uses_the_old_weights(unet: UNet2DConditionModel, graph: Graph) -> None:
    to_v = graph.module(f"{UNIT}.attn1.to_v")
    to_out = graph.module(f"{UNIT}.attn1.to_out.0")
    graph.replace(f"{UNIT}.attn1", lambda x: to_out(to_v(x).mean(1, keepdim=True)).expand_as(x))
    edited = settled(graph)
    assert f"{UNIT}.attn1.to_v.weight" in edited.state_dict()
    assert f"{UNIT}.attn1.to_q.weight" not in edited.state_dict()
    assert answer(edited, call_of(unet, B=3, H=6, W=4)).isfinite().all()


def test_replace_with_itself_changes_nothing(unet: UNet2DConditionModel, graph: Graph) -> None:
    graph.replace("conv_in", unet.conv_in)
    graph.replace("mid_block.resnets.0", lambda x, emb: unet_part(graph, x, emb))
    call = call_of(unet)
    assert torch.equal(answer(settled(graph), call), answer(unet, call))


def test_new_weights_take_the_names_of_the_old(unet: UNet2DConditionModel, graph: Graph) -> None:
    conv = nn.Conv2d(4, 16, 3, padding=1)
    graph.replace("conv_in", conv)
    twin = build("sd15")
    twin.conv_in = conv
    call = call_of(unet)
    edited = settled(graph)
    assert torch.equal(answer(edited, call), answer(twin, call))
    assert edited.conv_in.weight.data_ptr() == conv.weight.data_ptr()


def test_weights_in_use_are_not_displaced(unet: UNet2DConditionModel, graph: Graph) -> None:
    with pytest.raises(TraceError, match="conv_in still uses the weights at 'conv_in'"):
        graph.insert(nn.Conv2d(16, 16, 1), graph.region("conv_in").output, path="conv_in")

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(16, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.to_q(x) + x[:, :, :1].repeat(1, 1, 99)

    with pytest.raises(ShapeError):
        graph.replace(f"{UNIT}.attn1", Fails())
    call = call_of(unet)
    assert torch.equal(answer(settled(graph), call), answer(unet, call))


def unet_part(graph: Graph, temb: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The first resnet of the mid block, written out."""
    path = "mid_block.resnets.0"
    part = {n: graph.module(f"{path}.{n}") for n in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2")}
    hidden = part["conv1"](F.silu(part["norm1"](x)))
    hidden = hidden + part["time_emb_proj"](F.silu(temb))[:, :, None, None]
    return x + part["conv2"](F.silu(part["norm2"](hidden)))


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (lambda x: x[:, :1], ShapeError, "the new value is"),
        (lambda x: x.double(), ShapeError, "float64"),
        (lambda x: x.reshape(1, 16, 8, 8), ShapeError, "reshape cannot take"),
        (lambda x: x if x.mean() > 0 else -x, TraceError, "branches on the values"),
        (lambda x: x.add_(1), TraceError, "in place"),
        (lambda x: x * int(x.shape[2]), TraceError, "would freeze it"),
        (lambda x: nn.Conv2d(16, 16, 1)(x), TraceError, "no submodule of what is traced"),
        (lambda x: (x, x), EditError, "one tensor"),
    ],
)
def test_bad_code_is_refused_and_leaves_no_trace(graph: Graph, code: object, error: type, words: str) -> None:
    before = [n.name for n in graph.nodes]
    node = graph.region("conv_in").output
    with pytest.raises(error, match=words):
        graph.insert_after(node, code)  # type: ignore[arg-type]
    graph.eliminate_dead_code()
    assert [n.name for n in graph.nodes] == before


def test_copies_are_independent(traced: Graph) -> None:
    one, two = traced.copy(), traced.copy()
    one.bypass("mid_block")
    one.eliminate_dead_code()
    assert "mid_block" not in one.paths()
    assert "mid_block" in two.paths()
    assert not any(k.startswith("mid_block") for k in one.parameters())
    assert any(k.startswith("mid_block") for k in two.parameters())
    pointers = {p.data_ptr() for p in traced.parameters().values()}
    assert {p.data_ptr() for p in two.parameters().values()} == pointers  # no weight copied
    assert not {id(p) for p in traced.parameters().values()} & {id(p) for p in two.parameters().values()}


def test_hooks_on_the_result_are_not_on_the_source(unet: UNet2DConditionModel) -> None:
    result = sdgraph.apply(unet, [], verify=False)
    result.conv_in.register_forward_hook(lambda module, args, out: out * 0)
    call = call_of(unet)
    assert not unet.conv_in._forward_hooks
    assert not torch.equal(answer(result, call), answer(unet, call))


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


def test_edits_update_only_what_they_reach(graph: Graph) -> None:
    """Values are computed anew after the edit, not before it, and costs stay known."""
    before = {n.name: id(n.meta["val"]) for n in graph.nodes if n.op != "output"}
    graph.insert_after(graph.region("mid_block").outputs[-1], lambda x: x * 2)
    graph.propagate()
    changed = [n.name for n in graph.nodes if n.op != "output" and before.get(n.name) != id(n.meta["val"])]
    assert changed
    assert not any(name.startswith("down_blocks") for name in changed)


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
