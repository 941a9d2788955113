"""Conditions on a UNet for tracing: anything else is refused with module path and hint, or honoured exactly."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models import attention_processor as processors
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, parametrize, prune

import sdgraph
from sdgraph.errors import SourceError

from ..models import ONE_LEVEL, answer, build, call_of


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


class Masked(nn.Parameter):
    """Such as those of quantising libraries, whose operations are others."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def changed(change: Any) -> UNet2DConditionModel:
    unet = build(**ONE_LEVEL)
    change(unet, unet.down_blocks[0].resnets[0].conv1)
    return unet


def replaced_method(conv: Any) -> None:
    conv._conv_forward = types.MethodType(lambda self, *args: nn.Conv2d._conv_forward(self, *args), conv)


def quantised(unet: Any, conv: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, inplace=True)


def integers(unet: Any, conv: Any) -> None:
    conv.weight = nn.Parameter(torch.ones(conv.weight.shape, dtype=torch.int8), requires_grad=False)


def old_weight_norm(unet: Any, conv: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(conv)


def statistics(unet: Any, conv: Any) -> None:
    unet.down_blocks[0].resnets[0].norm1 = nn.BatchNorm2d(16).train()


PARAMETRIZED = r"(?s)parametrization.*conv1.*remove_parametrizations"
REPLACED = r"(?s)replaced _?\w+.*where: \S+.*class of modules"
HOOKED = r"(?s)hooks.*where: .*conv1.*result takes hooks of its leaves"
WAYS: dict[str, tuple[Any, str]] = {
    "prune": (lambda u, c: prune.l1_unstructured(c, "weight", 0.3), r"(?s)weight is pruned.*conv1.*prune.remove"),
    "prune channels": (lambda u, c: prune.ln_structured(c, "weight", 0.3, n=2, dim=0), "(?s)pruned.*conv1"),
    "prune twice": (
        lambda u, c: [prune.random_unstructured(c, "bias", 2) for _ in range(2)],
        r"(?s)bias is pruned.*prune.remove\(module, 'bias'\)",
    ),
    "weight norm": (lambda u, c: parametrizations.weight_norm(c), PARAMETRIZED),
    "spectral norm": (lambda u, c: parametrizations.spectral_norm(c), PARAMETRIZED),
    "orthogonal": (lambda u, c: parametrizations.orthogonal(u.time_embedding.linear_1), "(?s)Orthogonal.*linear_1"),
    "old weight norm": (old_weight_norm, r"(?s)by WeightNorm.*conv1.*remove_weight_norm"),
    "old spectral norm": (lambda u, c: nn.utils.spectral_norm(c), r"(?s)by SpectralNorm.*conv1.*remove_spectral_norm"),
    "quantised": (quantised, r"(?s)quantised.*where: \S+.*floating dtype"),
    "integers": (integers, r"(?s)quantised.*int8.*conv1.weight"),
    "a subclass of Tensor": (lambda u, c: setattr(c, "weight", Masked(c.weight.detach())), "(?s)Masked.*conv1.weight"),
    "forward of a leaf": (lambda u, c: setattr(c, "forward", lambda x: x), REPLACED),
    "part of a leaf": (lambda u, c: replaced_method(c), REPLACED),
    "a bound forward of another": (lambda u, c: setattr(c, "forward", u.conv_in.forward), REPLACED),
    "method of a block": (lambda u, c: setattr(u.mid_block or u.up_blocks[0], "forward", print), REPLACED),
    "method of the UNet": (lambda u, c: setattr(u, "get_time_embed", u.get_aug_embed), REPLACED),
    "hook": (lambda u, c: c.register_forward_hook(print), HOOKED),
    "hook before": (lambda u, c: c.register_forward_pre_hook(print), HOOKED),
    "hook with arguments": (lambda u, c: c.register_forward_hook(print, with_kwargs=True), HOOKED),
    "hook of gradients": (lambda u, c: c.register_full_backward_hook(print), HOOKED),
    "hook before gradients": (lambda u, c: c.register_full_backward_pre_hook(print), HOOKED),
    "hook of a weight": (lambda u, c: c.weight.register_hook(print), "(?s)hooks of its gradient.*conv1.weight"),
    "hook after a gradient": (
        lambda u, c: c.weight.register_post_accumulate_grad_hook(print),
        "(?s)hooks of its gradient.*conv1.weight",
    ),
    "statistics": (statistics, r"(?s)BatchNorm2d is in training mode.*norm1.*eval"),
    "compiled": (lambda u, c: c.compile(), "(?s)is compiled.*conv1.*compile.. of the result"),
}


@pytest.mark.parametrize("way", WAYS)
def test_changed_sources_are_refused_as_what_they_are(way: str) -> None:
    change, words = WAYS[way]
    unet = changed(change)
    with pytest.raises(SourceError, match=words) as caught:
        sdgraph.apply(unet)
    assert caught.value.where
    assert "report" not in str(caught.value)


@pytest.mark.parametrize(
    "cure",
    [
        lambda u, c: (prune.l1_unstructured(c, "weight", 0.3), prune.remove(c, "weight")),
        lambda u, c: (parametrizations.weight_norm(c), parametrize.remove_parametrizations(c, "weight")),
        lambda u, c: (old_weight_norm(u, c), nn.utils.remove_weight_norm(c)),
        lambda u, c: (replaced_method(c), delattr(c, "_conv_forward")),
        lambda u, c: c.register_forward_hook(print).remove(),
    ],
)
def test_they_are_traced_once_they_are_cured_as_told(cure: Any) -> None:
    assert exact(changed(cure))


def test_hooks_for_all_modules_are_refused() -> None:
    for register in (everywhere.register_module_forward_hook, everywhere.register_module_forward_pre_hook):
        handle = register(lambda module, *args: None)
        try:
            with pytest.raises(SourceError, match="hooks for all modules"):
                sdgraph.trace(build(**ONE_LEVEL))
        finally:
            handle.remove()


class Tiled(nn.Conv2d):
    """A user's own class of leaf."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(input, (1, 1, 0, 0), mode="circular")
        return nn.functional.conv2d(nn.functional.pad(padded, (0, 0, 1, 1)), self.weight, self.bias)


class Adapted(nn.Module):
    """Such as LoRA of one's own around a layer."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.up, self.scale = base, nn.Conv2d(base.in_channels, base.out_channels, 1), 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.up(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda u, c: setattr(c, "__class__", Tiled),
        lambda u, c: setattr(u.down_blocks[0].resnets[0], "conv1", Adapted(c)),
        lambda u, c: setattr(c, "padding_mode", "circular"),
    ],
    ids=["class", "wrapper", "option"],
)
def test_exchanged_leaves_are_traced_and_never_lost(change: Any, tmp_path: Path) -> None:
    unet = changed(change)
    assert exact(unet)
    assert not torch.equal(answer(unet, call_of(unet)), answer(build(**ONE_LEVEL), call_of(unet)))
    graph = sdgraph.apply(unet)
    for verb in (lambda: graph.save_pretrained(tmp_path / "unet"), graph.to_diffusers):
        with pytest.raises(sdgraph.errors.ModeError):
            verb()


def test_a_known_processor_whose_code_was_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = processors.AttnProcessor2_0
    monkeypatch.setattr(kind, "__call__", lambda self, attn, hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(SourceError, match=r"(?s)AttnProcessor2_0 may keep state.*attn1"):
        sdgraph.trace(build(**ONE_LEVEL))
    sdgraph.trace(build(**ONE_LEVEL), processors=(kind,))


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
