"""The trace is the UNet: bit for bit equal to the source model, one trace for all calls, or a clear error.

Every comparison is against the source UNet itself, with `torch.equal`.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import strategies as st
from torch import nn

import sdgraph
from sdgraph.compiler.numerics import run
from sdgraph.errors import CallError, SdgraphError, SourceError, TraceError
from sdgraph.ir.guards import check_call

from .models import ARCHITECTURES, ATTEND, CROSS, LEVELS, PLAIN, answer, build, call_of, load_ip_adapter

CALLS: list[dict[str, Any]] = [
    {"B": 1, "H": 8, "W": 8, "L": 1, "timestep": 3},
    {"B": 2, "H": 16, "W": 24, "timestep": 981.5},
    {"B": 3, "H": 7, "W": 13, "L": 77, "timestep": torch.tensor(501)},
    {"B": 5, "H": 9, "W": 8, "timestep": torch.tensor([0, 1, 20, 500, 999])},
    {"B": 2, "H": 8, "W": 8, "timestep": torch.tensor([7.25])},
    {"B": 64, "H": 8, "W": 8, "timestep": torch.tensor(3.5, dtype=torch.float64)},
    {"B": 65, "H": 8, "W": 11, "timestep": 0},
]
FEW = [CALLS[1], CALLS[2], CALLS[5]]


def same(unet: Any, graph: Any, **sizes: Any) -> bool:
    call = call_of(unet, **sizes)
    return torch.equal(answer(unet, call), answer(graph, call))


def trace(unet: UNet2DConditionModel, **options: Any) -> sdgraph.GraphUNet:
    return sdgraph.GraphUNet(sdgraph.trace(unet, **options))


# -- architectures, sizes, dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_trace_serves_all_calls(name: str, traced: Any) -> None:
    unet, graph = traced(name)
    assert [same(unet, graph, **sizes) for sizes in CALLS] == [True] * len(CALLS)


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


@pytest.mark.parametrize("trainable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_last_bits_follow_requires_grad(trainable: bool) -> None:
    """PyTorch multiplies a 3-d tensor with a weight in another order when the weight requires gradients."""
    unet = build("refiner").requires_grad_(trainable)
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


MORE_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 102, 149, (101, 149), (16, 8))]


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


def test_autocast_with_adapter_residuals(traced: Any) -> None:
    """diffusers adds them in place, so they take on the dtype of what they are added to."""
    unet, graph = traced("sd15")
    residuals = [torch.randn(2, 16, 8, 12), torch.randn(2, 32, 4, 6)]
    call = {**call_of(unet), "down_intrablock_additional_residuals": residuals}
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(CallError, match=r"residual_0 is torch\.float32, autocast computes in torch\.bfloat16"):
            answer(graph, call)
        call["down_intrablock_additional_residuals"] = [residual.bfloat16() for residual in residuals]
        assert torch.equal(answer(unet, call), answer(graph, call))


# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd21", "upscaler"])
def test_attention_without_the_fused_function(name: str) -> None:
    unet = build(name)
    unet.set_attn_processor(AttnProcessor())
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


def test_fused_projections() -> None:
    unet = build()
    unet.fuse_qkv_projections()
    assert all(same(unet, trace(unet), **sizes) for sizes in FEW)


@pytest.mark.parametrize("vanilla", [False, True])
def test_encoder_attention_mask(vanilla: bool) -> None:
    unet = build()
    if vanilla:
        unet.set_attn_processor(AttnProcessor())
    graph = trace(unet, inputs=("encoder_attention_mask",))
    for sizes in FEW:
        call = call_of(unet, **sizes)
        plain = answer(unet, call)
        assert torch.equal(plain, answer(graph, call))  # the mask stays optional
        mask = torch.rand(call["encoder_hidden_states"].shape[:2]) > 0.5
        for given in (mask, mask.long(), mask.float()):
            call["encoder_attention_mask"] = given
            expected = answer(unet, call)
            assert torch.equal(expected, answer(graph, call))
            assert not torch.equal(expected, plain)


# -- residuals and image prompts -------------------------------------------------------------------------------------


def perturbed(model: nn.Module) -> Any:
    """ControlNets start with zero convolutions; give them something to say."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("name", ["sd15", "sd15-levels", "sdxl"])
def test_controlnet(name: str, traced: Any) -> None:
    unet, graph = traced(name)
    control = perturbed(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)))
    for sizes in ({}, {"B": 65, "H": 8, "W": 8}, {"B": 1, "H": 10, "W": 14, "timestep": 0.5}):
        call = call_of(unet, **sizes)
        B, _, H, W = call["sample"].shape
        with torch.no_grad():
            down, mid = control(**call, controlnet_cond=torch.rand(B, 3, 2 * H, 2 * W), return_dict=False)
        plain = answer(unet, call)
        call |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        expected = answer(unet, call)
        assert torch.equal(expected, answer(graph, call))
        assert not torch.equal(expected, plain)


@pytest.mark.parametrize(
    ("name", "kind", "channels"),
    [("sd15-levels", "full_adapter", [16, 16, 32, 32]), ("sdxl", "full_adapter_xl", [16, 32, 32, 32])],
)
def test_t2i_adapter(name: str, kind: str, channels: list[int], traced: Any) -> None:
    """The XL adapter has one residual more than there are down blocks; it is added after the mid block."""
    unet, graph = traced(name)
    factor = 16 if kind.endswith("xl") else 8
    adapter = T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind).eval()
    for sizes in ({}, {"B": 1, "H": 16, "W": 24}):
        call = call_of(unet, **sizes)
        B, _, H, W = call["sample"].shape
        with torch.no_grad():
            residuals = adapter(torch.rand(B, 3, 8 * H, 8 * W))
        plain = answer(unet, call)
        call["down_intrablock_additional_residuals"] = residuals
        expected = answer(unet, call)
        assert not torch.equal(expected, plain)
        assert torch.equal(expected, answer(graph, call))
        for count in (1, 2, 3):  # fewer residuals than blocks
            call["down_intrablock_additional_residuals"] = residuals[:count]
            assert torch.equal(answer(unet, call), answer(graph, call))
        del call["down_intrablock_additional_residuals"]
        call["down_block_additional_residuals"] = residuals
        with pytest.warns(FutureWarning, match="T2I"):
            assert torch.equal(expected, answer(graph, call))


def test_controlnet_and_adapter_together(traced: Any) -> None:
    unet, graph = traced("sd15")
    call = call_of(unet)
    call |= {
        "down_intrablock_additional_residuals": [torch.randn(2, 16, 8, 12), torch.randn(2, 32, 4, 6)],
        "down_block_additional_residuals": tuple(
            torch.randn(2, c, h, w) for c, h, w in ((16, 8, 12), (16, 8, 12), (16, 4, 6), (32, 4, 6))
        ),
        "mid_block_additional_residual": torch.randn(2, 32, 4, 6),
    }
    assert torch.equal(answer(unet, call), answer(graph, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kinds", "scale"), [(("base",), 1.0), (("plus",), 1.0), (("base", "plus"), 0.4), (("base",), 0.0)], ids=str
)
def test_ip_adapter(kinds: tuple[str, ...], scale: float, dtype: torch.dtype) -> None:
    unet = load_ip_adapter(build(), *kinds, scale=scale)
    graph = trace(unet).to(dtype)
    unet.to(dtype)
    for sizes, images, tokens in ((CALLS[0], 1, 5), (CALLS[2], 3, 1), (CALLS[5], 2, 9)):
        call = call_of(unet, **sizes)
        B = len(call["sample"])
        shapes = [(B, images, 14) if kind == "base" else (B, images, tokens, 14) for kind in kinds]
        call["added_cond_kwargs"] = {"image_embeds": [torch.randn(shape).to(dtype) for shape in shapes]}
        assert torch.equal(answer(unet, call), answer(graph, call))


# -- other blocks: exact, or refused ---------------------------------------------------------------------------------

RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "mid_block_type": None,
}
KARRAS: dict[str, Any] = {
    "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    "block_out_channels": (32, 32, 64, 64),
    "mid_block_type": None,
    "norm_num_groups": None,
    "layers_per_block": 2,
    "time_embedding_type": "fourier",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
}
OTHERS: dict[str, dict[str, Any]] = {
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet-sampling": RESNETS,
    "resnet-sampling-shift": {**RESNETS, "resnet_time_scale_shift": "scale_shift"},
    "simple-attention": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
    "self-attention": {
        "down_block_types": ("AttnDownBlock2D", PLAIN),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "fourier": {"time_embedding_type": "fourier"},
    "text-embedding": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "layer-norm": {"cross_attention_norm": "layer_norm"},
    "group-norm": {"cross_attention_norm": "group_norm"},
    "activations": {"act_fn": "mish", "time_embedding_act_fn": "silu", "timestep_post_act": "silu"},
    "skip-time": {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4},
    "uneven": {**LEVELS, "layers_per_block": (2, 1, 1, 2), "cross_attention_dim": (CROSS,) * 4},
    "reversed": {
        **LEVELS,
        "transformer_layers_per_block": [2, 1, 2, 1],
        "reverse_transformer_layers_per_block": [1, 2, 1, 1],
    },
    "no-padding": {"downsample_padding": 0},
}


FIRST = ("scale-shift", "resnet-sampling", "simple-attention", "self-attention", "fourier", "text-embedding")
REST = [pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS if kind not in FIRST]


@pytest.mark.parametrize("kind", [*FIRST, *REST])
def test_other_blocks_are_exact_where_the_source_runs(kind: str) -> None:
    unet = build(**OTHERS[kind])
    graph = trace(unet)
    assert unet.state_dict().keys() == graph.state_dict().keys()
    exact = 0
    for sizes in CALLS:
        call = call_of(unet, **sizes)
        try:
            found = answer(graph, call)
        except CallError:
            continue
        assert torch.equal(answer(unet, call), found)
        exact += 1
    assert exact >= 3
    if "resnet-sampling" not in kind and kind != "simple-attention":
        assert exact == len(CALLS)


@pytest.mark.parametrize("kind", ["resnet-sampling", "simple-attention"])
def test_sizes_that_the_blocks_cannot_serve_are_refused(kind: str) -> None:
    """These blocks up-sample by two, whatever the skip: the source fails on odd sizes."""
    unet = build(**OTHERS[kind])
    graph = trace(unet)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        answer(unet, call_of(unet, H=9))
    with pytest.raises(CallError, match=r"H % 2 == 0.*H=9"):
        answer(graph, call_of(unet, H=9))
    with pytest.raises(CallError, match=r"B >= 64.*\n.*resnet"):  # another memory layout, so other last bits
        answer(graph, call_of(unet, B=64, H=8, W=8))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"attention_type": "gated"}, SourceError, "GLIGEN"),
        ({"addition_embed_type": "text_image"}, SourceError, "addition_embed_type 'text_image'"),
        (
            {"addition_embed_type": "image", "encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj"},
            SourceError,
            "addition_embed_type 'image'",
        ),
        ({"encoder_hid_dim": 20, "encoder_hid_dim_type": "image_proj"}, SourceError, "encoder_hid_dim_type"),
        ({"dual_cross_attention": True}, SourceError, r"(?s)DualTransformer2DModel.*where: down_blocks.0.attentions.0"),
        ({"down_block_types": ("SkipDownBlock2D", PLAIN)}, SourceError, r"(?s)SkipDownBlock2D.*where: down_blocks.0"),
        (
            {"down_block_types": ("DownEncoderBlock2D", PLAIN)},
            SourceError,
            r"(?s)DownEncoderBlock2D.*where: down_blocks.0",
        ),
    ],
    ids=["gligen", "text-image", "image", "image-projection", "dual", "skip", "encoder"],
)
def test_what_is_not_covered_is_refused(changes: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        sdgraph.trace(build(**changes))


def test_the_added_widths_must_add_up(traced: Any) -> None:
    unet, graph = traced("sdxl")
    call = call_of(unet)
    call["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 5)}
    assert torch.equal(answer(unet, call), answer(graph, call))  # 24 + 5 * 8 is what the model takes as well
    call["added_cond_kwargs"]["time_ids"] = torch.ones(2, 4)
    with pytest.raises(CallError, match=r"T \+ N\*8 == 64.*N=4, T=24"):
        answer(graph, call)


# -- tracing does not disturb ----------------------------------------------------------------------------------------


def test_other_threads_go_on_while_one_traces() -> None:
    unet, other = build(), build(seed=1)
    call = call_of(other)
    expected = answer(other, call)
    stop, failures = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                assert torch.equal(answer(other, call), expected)
                assert isinstance(torch.arange(3), torch.Tensor)
            except BaseException as error:  # reported by the main thread
                failures.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        graphs = [sdgraph.trace(unet) for _ in range(2)]
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert all(same(unet, sdgraph.GraphUNet(graph)) for graph in graphs)


def test_two_threads_trace_at_once() -> None:
    untouched = nn.Module.__call__, nn.Module.__getattr__, torch.arange
    unets, graphs = [build(seed=seed) for seed in range(2)], {}

    def work(i: int) -> None:
        graphs[i] = trace(unets[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(unets[i], graphs[i]) for i in range(2))
    assert untouched == (nn.Module.__call__, nn.Module.__getattr__, torch.arange)


def test_a_failed_trace_leaves_nothing_behind() -> None:
    untouched = nn.Module.__call__, nn.Module.__getattr__, torch.arange
    with pytest.raises(TraceError):
        sdgraph.trace_code(lambda x: 1 / 0, x=("B", 3))
    assert untouched == (nn.Module.__call__, nn.Module.__getattr__, torch.arange)


# -- decisions of the traced code ------------------------------------------------------------------------------------


def checked(graph: sdgraph.Graph, **values: torch.Tensor) -> torch.Tensor:
    check_call(graph.resolved_inputs(), graph.guards, values, torch.float32)
    return run(graph, values)


def test_a_decision_on_a_size_becomes_a_guard() -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] > 1000 else x + 1

    graph = sdgraph.trace_code(code, x=("B", "L"))
    (guard,) = graph.guards
    assert (guard.condition, guard.outcome) == ("L > 1000", False)
    assert "test_trace.py" in guard.where
    x = torch.randn(2, 1000)
    assert torch.equal(checked(graph, x=x), code(x))
    with pytest.raises(CallError, match=r"L > 1000 is False; here L=1001\n.*test_trace.py"):
        checked(graph, x=torch.randn(2, 1001))


def test_guards_on_what_is_computed_from_sizes() -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        side = x.shape[2] * x.shape[3]
        return x * 2 if side + 1 >= 100000 else x

    graph = sdgraph.trace_code(code, x=("B", 3, "H", "W"))
    assert torch.equal(checked(graph, x=torch.ones(1, 3, 9, 9)), torch.ones(1, 3, 9, 9))
    with pytest.raises(CallError, match="H=400, W=250"):
        checked(graph, x=torch.ones(1, 3, 400, 250))


def test_karras_blocks_are_exact_where_the_source_runs() -> None:
    """The latent upscaler's: they edit weights of their own in place, and pad by reflection."""
    unet = build(**KARRAS)
    graph = trace(unet)
    assert unet.state_dict().keys() == graph.state_dict().keys()
    for sizes in ({"H": 16, "W": 16}, {"B": 3, "H": 24, "W": 16, "L": 2}):
        assert same(unet, graph, **sizes)
    for sizes in ({"H": 20, "W": 16}, {"H": 8, "W": 16}):
        with pytest.raises(RuntimeError):
            answer(unet, call_of(unet, **sizes))
        with pytest.raises(CallError, match=r"H (% 8 == 0|>= 16) is True; here H="):
            answer(graph, call_of(unet, **sizes))


def test_karras_blocks_are_saved_and_go_back(tmp_path: Path) -> None:
    unet = build(**KARRAS)
    graph = trace(unet)
    graph.save_pretrained(tmp_path / "unet")
    assert same(unet, sdgraph.GraphUNet.from_pretrained(tmp_path / "unet"), H=16, W=16)
    assert same(unet, graph.to_diffusers(), H=16, W=16)


def _edited(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    made[:, 0] = 0
    made[..., 1:3, -1] = made[..., :2, 0] + 1
    made[made.shape[0] // 2 :, 1] = made[made.shape[0] // 2 :, 1] * 3
    return made


def test_edits_in_place_of_what_the_code_made_itself() -> None:
    graph = sdgraph.trace_code(_edited, x=("B", 3, "H", "W"))
    for shape in ((1, 3, 8, 9), (4, 3, 5, 5)):
        x = torch.randn(shape)
        assert torch.equal(checked(graph, x=x), _edited(x))


def _view_used_later(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    view = made[:, 1:]
    made[:, 1] = 0
    return view + 1


def _edited_through_a_view(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    made.view(-1)[0] = 0
    return made


def _added_through_a_view(x: torch.Tensor) -> torch.Tensor:
    made = x * 2
    view = made[:, 1:]
    view += 1
    return made


def _in_place(x: torch.Tensor) -> torch.Tensor:
    x[:, 0] = 0
    return x


def _iterated(x: torch.Tensor) -> torch.Tensor:
    return sum(x)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (lambda x: x * 2 if x.shape[2] > 70 else x, "takes another branch at other sizes"),
        (lambda x: x * int(x.shape[2]), "a size of the call is used as a plain number"),
        (lambda x: x * float(x.shape[2]), "a size of the call is used as a plain number"),
        (lambda x: torch.cat([x for _ in range(x.shape[2])]), "a size of the call is used as a plain number"),
        (lambda x: x.mul_(2), "edits a tensor in place"),
        (_in_place, "edited in place"),
        (_view_used_later, "shares memory with one edited in place"),
        (_edited_through_a_view, "shares memory with one edited in place"),
        (_added_through_a_view, "shares memory with one edited in place"),
        (lambda x: nn.functional.relu_(x), "in place"),
        (lambda x: nn.functional.silu(x, inplace=True), "in place"),
        (lambda x: torch.add(x, 1, out=x), "in place"),
        (lambda x: x * 2 if x.sum() > 0 else x, "branches on the values"),
        (lambda x: x * x.sum().item(), "values of a tensor"),
        (lambda x: x[x > 0], "depends on the values"),
        (_iterated, "iterated over"),
        (lambda x: x * 2 if x.dtype == torch.float32 else x, "in another dtype"),
        (lambda x: x * 2 if x.dtype == torch.bfloat16 else x, "in another dtype"),
        (lambda x: x + 1 / 0, "ZeroDivisionError"),
    ],
)
def test_code_that_no_graph_can_hold_is_refused(code: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        sdgraph.trace_code(code, x=("B", 3, "H", "W"))


class Branching(nn.Module):
    def __init__(self, code: Any) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("code", [lambda x: x * int(x.shape[2]), lambda x: x + 1 / 0])
def test_a_refusal_names_the_module_path(code: Any) -> None:
    with pytest.raises(TraceError, match=r"where: inner"):
        sdgraph.trace_code(Branching(code), x=("B", 3, "H", "W"))


def test_tracing_works_in_inference_mode() -> None:
    with torch.inference_mode():
        unet = build()
        graph = trace(unet)
        assert same(unet, graph)
        with pytest.raises(TraceError, match="in place"):
            sdgraph.trace_code(lambda x: nn.functional.relu_(x), x=("B", 3))


class Sizing(AttnProcessor):
    """A processor that does something else for long sequences."""

    limit = 10**6

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        scale = 2 if hidden_states.shape[1] > self.limit else 1
        return super().__call__(attn, hidden_states * scale, *args, **kwargs)


def test_a_processor_that_branches_on_size_is_guarded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build()
    unet.set_attn_processor(Sizing())
    graph = trace(unet, processors=(Sizing,))
    assert same(unet, graph, H=9)
    with pytest.raises(CallError, match=r"H\*W > 1000000 is False; here H=1001, W=1000"):
        answer(graph, call_of(unet, B=1, H=1001, W=1000))
    monkeypatch.setattr(Sizing, "limit", 100)
    with pytest.raises(TraceError, match=r"takes another branch.*\n.*attn1"):
        sdgraph.trace(unet, processors=(Sizing,))


# -- generated configurations ----------------------------------------------------------------------------------------


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 2, 4]))
    kinds = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    heads = draw(st.sampled_from([1, 2, 4]))
    config: dict[str, Any] = {
        "sample_size": draw(st.one_of(st.none(), st.integers(1, 160))),
        "in_channels": draw(st.integers(1, 9)),
        "out_channels": draw(st.integers(1, 9)),
        "block_out_channels": tuple(4 * groups * heads * draw(st.integers(1, 2)) for _ in range(levels)),
        "down_block_types": tuple(ATTEND if attend else PLAIN for attend in kinds),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(kinds)),
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", None])),
        "layers_per_block": draw(st.integers(1, 2)),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": groups,
        "attention_head_dim": heads,
        "use_linear_projection": draw(st.booleans()),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "time_cond_proj_dim": draw(st.sampled_from([None, 6])),
    }
    config |= draw(
        st.sampled_from([{}, {"num_class_embeds": 70}, *(v for k, v in ARCHITECTURES.items() if "class" in k)])
    )
    return config


@pytest.mark.slow
@hypothesis.given(
    config=configurations(),
    seed=st.integers(0, 3),
    calls=st.lists(
        st.fixed_dictionaries(
            {
                "B": st.sampled_from([1, 2, 3, 66]),
                "H": st.integers(1, 18),
                "W": st.integers(1, 18),
                "L": st.integers(1, 9),
                "timestep": st.one_of(st.integers(0, 999), st.floats(0, 999), st.just(torch.tensor(5))),
            }
        ),
        min_size=2,
        max_size=3,
    ),
)
def test_any_configuration_is_exact_or_refused(config: dict[str, Any], seed: int, calls: list[dict[str, Any]]) -> None:
    unet = build(seed=seed, **config)
    try:
        graph = trace(unet)
    except SdgraphError as error:
        raise AssertionError(f"{config} was refused") from error  # all of these are within what is covered
    assert graph.state_dict().keys() == unet.state_dict().keys()
    for sizes in calls:
        call = call_of(unet, **sizes)
        assert torch.equal(answer(unet, call), answer(graph, call))


def test_tracing_leaves_the_source_alone() -> None:
    unet = build()
    before = {n: (id(p), p.data_ptr(), p.dtype, p.requires_grad, p._version) for n, p in unet.named_parameters()}
    kept, keys = copy.deepcopy(unet.state_dict()), {p: set(vars(m)) for p, m in unet.named_modules()}
    trace(unet)
    after = {n: (id(p), p.data_ptr(), p.dtype, p.requires_grad, p._version) for n, p in unet.named_parameters()}
    assert before == after
    assert all(torch.equal(kept[n], t) for n, t in unet.state_dict().items())
    assert keys == {p: set(vars(m)) for p, m in unet.named_modules()}
