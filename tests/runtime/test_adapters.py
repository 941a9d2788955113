"""Image prompts and LoRA are loaded, scaled, mixed and taken back as in diffusers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import ModeError, SourceError
from sdgraph.frontend.capture import capture
from sdgraph.runtime.diffusers_api import UNetCall

from ..models import INHERITING, answer, assert_same, build, call_of, load_ip_adapter
from ..pipelines import PIPELINES, PROMPT, SIZE, make, noise, plain


@pytest.mark.slow
def test_image_prompts_are_loaded_scaled_and_unloaded() -> None:
    pipes = [plain("StableDiffusionPipeline", build(), image_encoder=None) for _ in range(2)]
    pipes[1].unet = sdgraph.apply(pipes[1].unet, "CleanUp")
    call = {**PROMPT, **SIZE}
    before = make(pipes[0], call)
    for pipe in pipes:
        load_ip_adapter(pipe.unet, "base")
    prompted = {**call, "ip_adapter_image_embeds": [noise(2, 1, 14, seed=6)]}
    loaded = make(pipes[0], prompted)
    assert torch.equal(loaded, make(pipes[1], prompted))
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.3)
    twin = copy.deepcopy(pipes[1].unet)
    scaled = make(pipes[0], prompted)
    assert not torch.equal(loaded, scaled)
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].set_ip_adapter_scale(1.0)
    assert torch.equal(loaded, make(pipes[1], prompted))
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.0)  # which takes the adapter out of the computation, and not out of the UNet
    assert torch.equal(make(pipes[0], prompted), make(pipes[1], prompted))
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.3)
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].unet = twin  # which has a separate scale
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].unload_ip_adapter()
    assert torch.equal(before, make(pipes[1], call))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one with every trace that a change of settings needs."""
    seen: list[Any] = []
    monkeypatch.setattr("sdgraph.runtime.retrace.capture", lambda *args: seen.append(args) or capture(*args))
    return seen


def set_scales(unet: Any, scale: Any) -> None:
    """Do as `pipe.set_ip_adapter_scale`."""
    pipe: Any = IPAdapterMixin()
    pipe.unet = unet
    pipe.set_ip_adapter_scale(scale)


SCALES: list[Any] = [0.3, 0, 1.0, {"up": {"block_0": [0.0, 0.7]}}, -0.4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "dtype"),
    [
        ("", torch.bfloat16),
        ("CleanUp, HoistInvariants", torch.float32),
        ("HoistInvariants, " + INHERITING, torch.float32),
    ],
    ids=str,
)
def test_scales_of_image_prompts_are_read_at_every_call(passes: str, dtype: torch.dtype, traces: list[Any]) -> None:
    unet = load_ip_adapter(build(), "base", scale=0.0).to(dtype)
    graph = sdgraph.apply(unet, passes, verify=False)
    call = {**call_of(unet), "added_cond_kwargs": {"image_embeds": [noise(2, 1, 14, seed=6).to(dtype)]}}
    seen, kept = [], None
    with torch.no_grad(), graph.expecting(len(SCALES)):  # within one generation: nothing that is kept is reused
        for number, scale in enumerate(SCALES):
            for model in (unet, graph):
                set_scales(model, scale)
            call["timestep"] = 900 - 100 * number
            seen.append(answer(unet, call))
            assert torch.equal(seen[-1], answer(graph, call)), scale
            if passes.endswith("HoistInvariants"):  # the keys of the images do not depend on the scale
                keys = [id(value) for g in graph.tracker._known.values() for value in g.cache.kept()]
                assert number + 1 == len(SCALES) or (keys and kept in (None, keys))
                kept = keys
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert not traces
    assert len(graph.backend) <= (2 if passes else 1)


def test_scales_of_image_prompts_in_copies(traces: list[Any]) -> None:
    """A copy begins with the scale of the original, and each has its own from then on; the source keeps its own."""
    unet = load_ip_adapter(build(), "base", scale=0.5)
    graph = sdgraph.apply(unet, "CleanUp")
    call = {**call_of(unet), "added_cond_kwargs": {"image_embeds": [noise(2, 1, 14, seed=6)]}}
    at = {}
    for scale in (0.5, 0.2, 0.9):
        set_scales(unet, scale)
        at[scale] = answer(unet, call)
    set_scales(graph, 0.2)
    again, copied = sdgraph.apply(graph), copy.deepcopy(graph)
    set_scales(graph, 0.9)
    assert [answer(model, call).equal(at[scale]) for model, scale in ((graph, 0.9), (again, 0.2), (copied, 0.2))] == [
        True
    ] * 3
    set_scales(copied, 0.5)
    assert answer(copied, call).equal(at[0.5])
    assert answer(again, call).equal(at[0.2])
    assert not traces
    assert not any("scale" in name for name in graph.state_dict())
    assert all(processor.scale == [0.9] for processor in unet.attn_processors.values() if hasattr(processor, "scale"))


@pytest.mark.parametrize("scale", [[[0.1, 0.2]], [0.1, 0.2], [torch.ones(2, 1, 1)], [None], 0.5], ids=str)
def test_scales_that_are_no_numbers_are_refused(scale: Any) -> None:
    graph = sdgraph.apply(load_ip_adapter(build(), "base"))
    call = {**call_of(graph), "added_cond_kwargs": {"image_embeds": [noise(2, 1, 14, seed=6)]}}
    scaled = [processor for processor in graph.attn_processors.values() if hasattr(processor, "scale")]
    for processor in scaled:
        processor.scale = scale
    for _ in range(2):
        with pytest.raises(SourceError, match=r"(?s)scales of 1 IP-Adapters.*attn2.processor"):
            answer(graph, call)
    for processor in scaled:
        processor.scale = [0.5]
    answer(graph, call)


@pytest.mark.slow
def test_scales_of_image_prompts_act_in_compiled_calls() -> None:
    unet = load_ip_adapter(build(), "base")
    graph = sdgraph.apply(unet, "HoistInvariants")
    graphs = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    graph.compile(backend=backend, fullgraph=True)
    call = {**call_of(unet), "added_cond_kwargs": {"image_embeds": [noise(2, 1, 14, seed=6)]}}
    for scale in (0.1 * number for number in range(10)):
        for model in (unet, graph):
            set_scales(model, scale)
        assert torch.equal(answer(unet, call), answer(graph, call)), scale
    assert len(graphs) <= 4


class Strong:
    """An attention processor with a setting that only it has."""

    strength = 1.0

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.strength * AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)


@pytest.mark.slow
def test_other_settings_of_attention_processors_act_too(traces: list[Any]) -> None:
    unet = build()
    unet.set_attn_processor(Strong(0.5))
    graph = sdgraph.apply(unet, "CleanUp", processors=(Strong,))
    for strength in (0.5, 0.8, 0.5):
        for model in (unet, graph):
            for processor in model.attn_processors.values():
                processor.strength = strength
        assert_same(unet, graph)
    assert len(traces) == 4  # two for each change


@pytest.mark.slow
def test_reading_the_graph_changes_nothing(traces: list[Any]) -> None:
    """A setting acts at the next call, which makes another graph; until then the one before is read."""
    unet = build()
    unet.set_attn_processor(Strong(0.5))
    graph = sdgraph.apply(unet, processors=(Strong,))
    before = graph.graph
    for processor in graph.attn_processors.values():
        processor.strength = 0.8
    assert graph.graph is before
    assert not traces
    answer(graph, call_of(unet))
    assert graph.graph is not before
    assert traces


def test_other_image_prompts_take_the_place_of_those_that_were_loaded() -> None:
    unets = build(), sdgraph.apply(build(), "CleanUp")
    call = call_of(unets[0])
    answers = []
    for unet in unets:
        load_ip_adapter(unet, "base")
        load_ip_adapter(unet, "base", "base", seed=4)
        answers.append(answer(unet, {**call, "added_cond_kwargs": {"image_embeds": [noise(2, 1, 14, seed=6)] * 2}}))
    assert torch.equal(*answers)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}], ids=str)
def test_loading_image_prompts_draws_as_many_random_numbers_as_diffusers(options: dict[str, bool]) -> None:
    states = []
    for unet in (build(), sdgraph.apply(build())):
        torch.manual_seed(0)
        load_ip_adapter(unet, "base", **options)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def adapter(*targets: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state dict as LoRA is distributed."""
    unet = build()
    unet.add_adapter(LoraConfig(r=2, target_modules=list(targets)))
    torch.manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("passes", ["", "CleanUp, HoistInvariants", INHERITING])
def test_lora(passes: str) -> None:
    """Loaded, scaled by call, mixed, switched off, fused, unloaded: at each step the same as in diffusers."""
    # diffusers before 0.37 does not apply the scale of a call to conv_in, so that one is not in the first
    weights = adapter("to_q", "to_v", "conv1", "proj"), adapter("to_k", "conv2", "conv_in", seed=2)
    unet, graph = build(), sdgraph.apply(build(), passes)
    plain = assert_same(unet, graph)
    seen = [plain]

    def step(change: Callable[[Any], Any], **call: Any) -> None:
        change(unet)
        change(graph)
        seen.append(assert_same(unet, graph, **call))

    first = {"pretrained_model_name_or_path_or_dict": weights[0]}
    step(lambda u: u.load_lora_adapter(**copy.deepcopy(first), prefix="unet", adapter_name="one"))
    step(lambda u: None, cross_attention_kwargs={"scale": 0.5})
    step(lambda u: u.load_lora_adapter(dict(weights[1]), prefix="unet", adapter_name="two"))
    step(lambda u: u.set_adapters(["one", "two"], [0.7, 0.4]))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    step(lambda u: u.disable_lora())
    assert torch.equal(seen[-1], plain)
    step(lambda u: u.enable_lora())
    step(lambda u: u.delete_adapters("two"))
    step(lambda u: u.set_adapters("one", 0.8))
    step(lambda u: u.fuse_lora())
    step(lambda u: u.unload_lora())
    assert graph.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(answer(sdgraph.apply(graph), call_of(unet)), seen[-1])


def test_lora_through_the_pipeline() -> None:
    pipes = [PIPELINES["text"][0]() for _ in range(2)]
    pipes[1].unet = sdgraph.apply(pipes[1].unet)
    call = PIPELINES["text"][1]
    images = []
    for pipe in pipes:
        pipe.load_lora_weights(adapter("to_q", "to_v"), adapter_name="one")
        pipe.set_adapters("one", 0.6)
        images.append([make(pipe, call)])
        pipe.set_adapters("one", {"unet": {"down": 0.4, "up": {"block_1": 0.9}}})
        images[-1].append(make(pipe, call))
        pipe.unload_lora_weights()
        images[-1].append(make(pipe, call))
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert not torch.equal(images[0][0], images[0][2])


def test_lora_leaves_the_source_alone_and_is_not_forgotten(tmp_path: Path) -> None:
    unet = build()
    state = copy.deepcopy(unet.state_dict())
    graph = sdgraph.apply(unet)
    graph.load_lora_adapter(adapter("to_q"), prefix="unet")
    for verb in (sdgraph.apply, copy.deepcopy, GraphUNet.to_diffusers, lambda g: g.save_pretrained(tmp_path / "no")):
        with pytest.raises(ModeError, match=r"(?s)LoRA is loaded.*fuse_lora"):
            verb(graph)
    graph.fuse_lora()
    assert all(torch.equal(state[name], value) for name, value in unet.state_dict().items())


@pytest.mark.slow
def test_lora_and_passes() -> None:
    """Removed modules take their LoRA with them, as fusing before would; LoRA of rewritten modules is refused."""
    pruned = sdgraph.apply(build(), "PruneBlocks('mid_block')")
    pruned.load_lora_adapter(adapter("to_q", "conv1"), prefix="unet")
    fused = build()
    fused.load_lora_adapter(adapter("to_q", "conv1"), prefix="unet")
    fused.fuse_lora()
    expected = sdgraph.apply(fused, "PruneBlocks('mid_block')")
    call = call_of(fused)
    assert torch.allclose(answer(expected, call), answer(pruned, call), atol=1e-5)
    rewritten = sdgraph.apply(build(), "MECondConv(where='up_blocks.*.resnets.*.conv1', experts=2, donors='copies')")
    before = answer(rewritten, call)
    with pytest.raises(ModeError, match=r"(?s)rewritten.*conv1.*fuse"):
        rewritten.load_lora_adapter(adapter("conv1"), prefix="unet")
    assert torch.equal(before, answer(rewritten, call))
    assert not any("lora" in name for name, _ in rewritten.named_parameters())


def test_scales_by_block_of_a_pruned_unet_are_those_of_the_source() -> None:
    unet = load_ip_adapter(build(), "base")
    pruned = sdgraph.apply(unet, "PruneBlocks('up_blocks.1.attentions.1')", verify=False)
    found = []
    for model in (unet, pruned):
        set_scales(model, {"up": {"block_1": [0.2, 0.7]}, "down": 0.5})
        scales = {path: value.scale for path, value in model.attn_processors.items() if hasattr(value, "scale")}
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="one")
        model.set_adapters(["one"], [{"up": {"block_1": [0.2, 0.7]}, "down": 0.5}])
        layers = {path: layer.scaling for path, layer in model.named_modules() if hasattr(layer, "scaling")}
        found.append((scales, layers))
    assert found[0][0] == found[1][0]
    assert found[1][1] == {
        path: value for path, value in found[0][1].items() if "up_blocks.1.attentions.1." not in path
    }
    with pytest.raises(ValueError, match="Expected"):
        set_scales(pruned, {"up": {"block_1": [0.2, 0.7, 0.4]}})


def test_scales_of_an_exported_unet_are_refused() -> None:
    with pytest.raises(ModeError, match=r"(?s)exported with.*export it again"):
        set_scales(UNetCall(), 0.5)
