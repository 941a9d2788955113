"""What a UNet must be to be traced: anything else is refused with module path and hint, or honoured exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import attention_processor as processors
from torch import nn

import sdgraph
from sdgraph.errors import SourceError

from ..models import answer, build, call_of


def exact(unet: Any, **options: Any) -> bool:
    graph = sdgraph.GraphUNet(sdgraph.trace(unet, **options))
    return all(
        torch.equal(answer(unet, call_of(unet, **sizes)), answer(graph, call_of(unet, **sizes)))
        for sizes in ({}, {"B": 3, "H": 9, "L": 2})
    )


class Pipeline:
    unet = build()


class Doubling(processors.AttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().__call__(attn, hidden_states, *args, **kwargs)


class Remembering(nn.Module):
    """Keeps the first keys it sees, as feature-sharing and video-to-video processors do."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.kept = processors.AttnProcessor2_0(), None

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.kept = hidden_states
        return self.plain(attn, hidden_states, *args, **kwargs)


def lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    return unet.eval()


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Pipeline(), "(?s)got Pipeline.*pass pipe.unet"),
        (nn.Linear(2, 2), "got Linear"),
        ("CompVis/stable-diffusion-v1-4", "got str"),
        (None, "got NoneType"),
        (UNet2DConditionModel, "got"),
        (
            UNet2DModel(
                sample_size=8,
                block_out_channels=(8,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
                norm_num_groups=4,
            ),
            "got UNet2DModel",
        ),
    ],
    ids=["pipeline", "linear", "string", "none", "class", "unconditional"],
)
def test_not_a_unet(thing: Any, words: str) -> None:
    for verb in (sdgraph.trace, sdgraph.apply):
        with pytest.raises(SourceError, match=words) as caught:
            verb(thing)
        assert caught.value.hint


def on_meta() -> UNet2DConditionModel:
    return build().to("meta")


def offloaded() -> UNet2DConditionModel:
    unet = build()
    cpu_offload(unet, execution_device=torch.device("cpu"))
    return unet


def hooked() -> UNet2DConditionModel:
    unet = build()
    unet.down_blocks[0].register_forward_hook(lambda module, args, output: output)
    return unet


def pre_hooked() -> UNet2DConditionModel:
    unet = build()
    unet.conv_in.register_forward_pre_hook(lambda module, args: args)
    return unet


def replaced() -> UNet2DConditionModel:
    """DeepCache and ToMe put functions in the place of `forward`."""
    unet = build()
    block = unet.up_blocks[0]
    block.forward = lambda *args, _forward=block.forward, **kwargs: _forward(*args, **kwargs)
    return unet


def checkpointing() -> UNet2DConditionModel:
    unet = build()
    unet.enable_gradient_checkpointing()
    return unet


def chunking() -> UNet2DConditionModel:
    unet = build()
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(2, dim=1)
    return unet


def mixed() -> UNet2DConditionModel:
    unet = build()
    unet.conv_in.half()
    return unet


def sliced() -> UNet2DConditionModel:
    unet = build()
    unet.set_attention_slice("max")
    return unet


def with_processor(processor: Any) -> UNet2DConditionModel:
    unet = build()
    unet.set_attn_processor(processor)
    return unet


def a_second_adapter() -> UNet2DConditionModel:
    from peft import LoraConfig

    unet = lora(build())
    unet.fuse_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft announces that it un-fuses the first
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="second")
    return unet.eval()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (on_meta, r"(?s)meta.*where: conv_in.weight"),
        (offloaded, r"(?s)meta.*remove_all_hooks"),
        (lambda: lora(build()), r"(?s)not fused.*where: .*attn1.to_q.*fuse_lora"),
        (a_second_adapter, r"(?s)not fused.*attn1"),
        (lambda: with_processor(Doubling()), r"(?s)Doubling.*attn1.*processors=\(Doubling,\)"),
        (lambda: with_processor(processors.SlicedAttnProcessor(2)), "SlicedAttnProcessor"),
        (sliced, "SlicedAttnProcessor"),
        (checkpointing, r"(?s)gradient checkpointing.*disable_gradient_checkpointing"),
        (hooked, r"(?s)hooks.*where: down_blocks.0"),
        (pre_hooked, r"(?s)hooks.*where: conv_in"),
        (replaced, r"(?s)replaced forward.*where: up_blocks.0"),
        (chunking, r"(?s)chunking.*transformer_blocks.0"),
        (lambda: build(dropout=0.1).train(), r"(?s)dropout.*where: .*dropout.*unet.eval\(\)"),
        (mixed, r"(?s)mixes dtypes.*float16.*unet.to"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused_with_the_cure(make: Any, words: str) -> None:
    unet = make()
    for verb in (sdgraph.trace, sdgraph.apply):
        with pytest.raises(SourceError, match=words) as caught:
            verb(unet)
        assert caught.value.hint


@pytest.mark.parametrize("processor", [Doubling, processors.AttnProcessor, processors.AttnProcessor2_0])
def test_pure_processors_are_honoured(processor: Any) -> None:
    trusted = (Doubling,) if processor is Doubling else ()
    unet = with_processor(processor())
    plain = build()
    assert exact(unet, processors=trusted)
    if processor is Doubling:
        assert not torch.equal(answer(unet, call_of(unet)), answer(plain, call_of(plain)))


def test_trust_in_one_class_is_not_trust_in_another() -> None:
    unet = with_processor(Doubling())
    next(m for m in unet.modules() if isinstance(m, processors.Attention)).set_processor(Remembering())
    with pytest.raises(SourceError, match="Remembering"):
        sdgraph.trace(unet, processors=(Doubling,))


def test_processors_with_weights_of_their_own() -> None:
    unet = build()
    custom = {
        name: processors.CustomDiffusionAttnProcessor2_0(
            train_kv=True,
            train_q_out=False,
            hidden_size=unet.get_submodule(name.removesuffix(".processor")).to_q.in_features,
            cross_attention_dim=None if "attn1" in name else unet.config.cross_attention_dim,
        )
        for name in unet.attn_processors
    }
    unet.set_attn_processor(custom)
    with pytest.raises(SourceError, match="CustomDiffusionAttnProcessor2_0"):
        sdgraph.trace(unet)
    assert exact(unet, processors=(processors.CustomDiffusionAttnProcessor2_0,))


@pytest.mark.slow
def test_fused_lora_is_honoured(tmp_path: Path) -> None:
    plain, unet = build(), lora(build())
    unet.fuse_lora(lora_scale=0.7)
    assert exact(unet)
    assert not torch.equal(answer(plain, call_of(plain)), answer(unet, call_of(unet)))
    graph = sdgraph.GraphUNet(sdgraph.trace(unet))
    assert graph.state_dict().keys() == plain.state_dict().keys()
    graph.save_pretrained(tmp_path / "fused")
    again = sdgraph.GraphUNet.from_pretrained(tmp_path / "fused")
    assert torch.equal(answer(again, call_of(unet)), answer(unet, call_of(unet)))


def test_unloaded_lora_is_gone() -> None:
    unet = lora(build())
    unet.delete_adapters("default")
    unet.unload_lora()
    assert exact(unet)


def test_training_mode_without_dropout() -> None:
    unet = build().train()
    assert exact(unet)
    assert unet.training


def test_dropout_comes_back_in_the_results_training_mode() -> None:
    unet = build(dropout=0.5)
    graph = sdgraph.apply(unet)
    call = call_of(unet)
    assert torch.equal(answer(unet, call), answer(graph, call))
    unet.train()
    graph.train()
    torch.manual_seed(1)
    expected = answer(unet, call)
    torch.manual_seed(1)
    assert torch.equal(expected, answer(graph, call))
    assert not torch.equal(expected, answer(unet.eval(), call))


def test_unknown_inputs() -> None:
    with pytest.raises(SourceError, match="'attention_mask'"):
        sdgraph.trace(build(), inputs=("attention_mask",))


def test_faults_cured_as_told_are_accepted() -> None:
    unet = checkpointing()
    unet.disable_gradient_checkpointing()
    assert exact(unet)
    assert exact(mixed().float())


@pytest.mark.slow
@pytest.mark.parametrize("s1", [0.9, pytest.param(0.0, id="off to diffusers")])
def test_freeu_is_honoured(s1: float, tmp_path: Path) -> None:
    unet = build()
    unet.enable_freeu(s1=s1, s2=0.2, b1=1.2, b2=1.4)
    assert exact(unet)
    assert torch.equal(answer(unet, call_of(unet)), answer(build(), call_of(unet))) == (s1 == 0.0)
    graph = sdgraph.apply(unet)
    graph.save_pretrained(tmp_path / "unet")
    again = sdgraph.GraphUNet.from_pretrained(tmp_path / "unet")
    assert torch.equal(answer(again, call_of(unet)), answer(unet, call_of(unet)))


def test_a_traced_unet_is_not_traced() -> None:
    with pytest.raises(SourceError, match=r"(?s)traced already.*sdgraph.apply"):
        sdgraph.trace(sdgraph.apply(build()))
