"""Image prompts and LoRA are loaded, scaled, mixed and taken back as in diffusers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import ModeError

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
    pipes[1].unet = twin  # which has a scale of its own
    assert torch.equal(scaled, make(pipes[1], prompted))
    pipes[1].unload_ip_adapter()
    assert torch.equal(before, make(pipes[1], call))


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
    """What a pass removed takes its LoRA with it, as fusing before would; of what it rewrote, LoRA is refused."""
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


def test_scales_by_block_of_a_pruned_unet_are_refused() -> None:
    from peft import LoraConfig

    pruned = sdgraph.apply(build(), "PruneBlocks('up_blocks.1.attentions.1')", verify=False)
    pruned.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="one")
    with pytest.raises(sdgraph.errors.ModeError, match=r"(?s)blocks were removed.*one number"):
        pruned.set_adapters(["one"], [{"up": 0.5}])
    pruned.set_adapters(["one"], [0.5])
