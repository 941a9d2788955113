"""A GraphUNet is a UNet2DConditionModel: whatever diffusers has is answered, or refused with a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel

import sdgraph
from sdgraph import GraphUNet
from sdgraph.errors import ModeError
from sdgraph.runtime.adapters import LORA
from sdgraph.runtime.diffusers_api import REFUSED

from ..models import (
    INHERITING,
    KARRAS,
    answer,
    build,
    call_of,
)
from ..pipelines import PIPELINES, PROMPT, SIZE, image, make, noise, plain

# What is inherited as it is, each looked at: it reads or writes the configuration, the tensors or the hub, and does not
# need the modules of a UNet.
INHERITED = {
    *("config", "config_name", "has_compatibles", "ignore_for_config", "register_to_config", "register_for_auto_class"),
    *("save_config", "load_config", "get_config_dict", "extract_init_dict", "to_json_file", "to_json_string"),
    *("device", "dtype", "num_parameters", "get_memory_footprint", "cuda", "half", "float"),
    *("text_encoder_name", "unet_name"),  # prefixes of the keys of LoRA
    *("active_adapters", "save_lora_adapter"),  # read the LoRA layers, which are the same
    "is_gradient_checkpointing",  # asks the modules, and none does
    "dequantize",  # refuses what was not quantized, and nothing is here
}


def public(*classes: type) -> set[str]:
    return {name for cls in classes for name in vars(cls) if not name.startswith("_")}


@pytest.mark.law("Every method of diffusers' UNet is implemented, refused or reviewed.")
def test_nothing_of_diffusers_is_left_by_accident() -> None:
    """Whatever diffusers' class has is written anew here, or on the list above."""
    above = [cls for cls in UNet2DConditionModel.__mro__ if cls not in (torch.nn.Module, object)]
    ours = public(*(cls for cls in GraphUNet.__mro__ if cls.__module__.split(".")[0] == "sdgraph"))
    assert public(*above) - ours <= INHERITED
    assert ours.isdisjoint(INHERITED)


def test_two_classes_of_ours_make_a_graph_unet() -> None:
    assert sum(cls.__module__.split(".")[0] == "sdgraph" for cls in GraphUNet.__mro__) <= 2


def test_a_refusal_says_what_to_do_instead(traced: Any) -> None:
    _, graph = traced("sd15")
    for name in REFUSED.keys() & public(*UNet2DConditionModel.__mro__):
        with pytest.raises(ModeError, match=name) as caught:
            getattr(graph, name)()
        assert caught.value.hint
    with pytest.raises(ModeError, match="gradient checkpointing"):
        graph.enable_gradient_checkpointing()
    graph.disable_gradient_checkpointing()
    assert not graph.is_gradient_checkpointing
    with pytest.raises(ModeError, match=r"(?s)brought in.*leaf_level"):
        graph.enable_group_offload(torch.device("cpu"))


def test_it_is_a_unet_to_whoever_asks(traced: Any) -> None:
    unet, graph = traced("sd15")
    assert isinstance(graph, UNet2DConditionModel)
    assert graph.attn_processors.keys() == unet.attn_processors.keys()
    assert [type(p) for p in graph.attn_processors.values()] == [type(p) for p in unet.attn_processors.values()]
    for name in ("down_blocks", "up_blocks"):
        assert len(getattr(graph, name)) == len(getattr(unet, name))
        for mine, theirs in zip(getattr(graph, name), getattr(unet, name), strict=True):
            assert len(mine.resnets) == len(theirs.resnets)
    assert graph.encoder_hid_proj is None  # as in a UNet without image prompts
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = graph.nonsense


def test_every_verb_of_lora_is_covered() -> None:
    mixin = next(cls for cls in UNet2DConditionModel.__mro__ if cls.__name__ == "PeftAdapterMixin")
    assert public(mixin) <= {*LORA, *REFUSED, *INHERITED}


def test_a_pipeline_takes_it_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.save_pretrained(tmp_path)
    expected = make(pipe, call)
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    diffusers.utils.logging.enable_propagation()
    try:
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(
            tmp_path, unet=sdgraph.apply(pipe.unet), requires_safety_checker=False, **absent
        )
    finally:
        diffusers.utils.logging.disable_propagation()
    said = capfd.readouterr()
    assert "Expected types for unet" not in said.out + said.err
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(expected, make(loaded, call))


@pytest.mark.slow
def test_from_pipe(pipe: Any) -> None:
    """diffusers asks for the very class here, and says that another is to be passed by hand."""
    pipe = type(pipe)(**{**pipe.components, "unet": sdgraph.apply(pipe.unet)}, requires_safety_checker=False)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet)
    assert other.unet is pipe.unet
    assert diffusers.StableDiffusionImg2ImgPipeline(**pipe.components).unet is pipe.unet


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@pytest.mark.parametrize("passes", ["", INHERITING.replace("2", "1")])
@pytest.mark.parametrize("kind", ["light_adapter", "full_adapter"])
def test_t2i_adapters(kind: str, passes: str) -> None:
    """A light adapter has a residual more than there are down blocks, of another shape than the mid block's."""
    torch.manual_seed(3)
    made = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type=kind)
    pipe = plain("StableDiffusionAdapterPipeline", build(), adapter=made.eval())
    call = {**PROMPT, **SIZE, "image": image(1, 3, 32, 48)}
    expected = torch.as_tensor(make(pipe, call))
    pipe.unet = sdgraph.apply(pipe.unet, passes)
    assert torch.equal(expected, torch.as_tensor(make(pipe, call)))


def test_a_residual_beyond_the_down_blocks_that_fits_is_added(traced: Any) -> None:
    unet, graph = traced("sd15")
    call = call_of(unet, B=2, H=8, W=12)
    first, second = noise(2, 16, 8, 12), noise(2, 32, 4, 6)
    fitting, other = noise(2, 32, 4, 6, seed=1), noise(2, 32, 2, 3)
    answers = []
    for beyond in ([], [fitting], [other]):
        call["down_intrablock_additional_residuals"] = [first, second, *beyond]
        answers.append(answer(unet, call))
        assert torch.equal(answers[-1], answer(graph, call))
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["", "CleanUp, HoistInvariants"])
def test_the_latent_upscaler(passes: str) -> None:
    pipe = plain(
        "StableDiffusionPipeline", build(**KARRAS)
    )  # the upscaler's own pipeline needs a tokenizer; its UNet is called the same way
    call = {**PROMPT, "height": 64, "width": 32}
    expected = make(pipe, call)
    pipe.unet = sdgraph.apply(pipe.unet, passes)
    assert torch.equal(expected, make(pipe, call))
