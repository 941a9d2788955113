"""The verbs that edit a graph."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from sdgraph import Graph, GraphUNet
from sdgraph.errors import EditError, ShapeError, TraceError

from .models import answer, build, call_of

UNIT = "down_blocks.0.attentions.0.transformer_blocks.0"


def settled(graph: Graph) -> GraphUNet:
    graph.eliminate_dead_code()
    graph.propagate()
    graph.fx.lint()
    return GraphUNet(graph.copy())


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


def test_edits_update_only_what_they_reach(graph: Graph) -> None:
    """Values are computed anew after the edit, not before it, and costs stay known."""
    before = {n.name: id(n.meta["val"]) for n in graph.nodes if n.op != "output"}
    graph.insert_after(graph.region("mid_block").outputs[-1], lambda x: x * 2)
    graph.propagate()
    changed = [n.name for n in graph.nodes if n.op != "output" and before.get(n.name) != id(n.meta["val"])]
    assert changed
    assert not any(name.startswith("down_blocks") for name in changed)
