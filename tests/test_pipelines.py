"""Drop-in: `pipe.unet = sdgraph.apply(pipe.unet)` changes no bit of what a diffusers pipeline makes.

Pipelines are tiny and built from configurations; prompts come as embeddings, so no tokenizer is needed. The reference
is always the same pipeline with the source UNet.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import nn

import sdgraph
from sdgraph.errors import ModeError

from .models import CROSS, answer, build, call_of, load_ip_adapter


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def plain(kind: str, unet: Any, **more: Any) -> Any:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    pipe = getattr(diffusers, kind)(
        unet=unet,
        vae=vae(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **parts,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def large(kind: str, unet: Any, **more: Any) -> Any:
    parts = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))
    pipe = getattr(diffusers, kind)(
        unet=unet,
        vae=vae(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
        **parts,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = {"prompt_embeds": noise(1, 7, CROSS, seed=1), "negative_prompt_embeds": noise(1, 7, CROSS, seed=2)}
POOLED = {"pooled_prompt_embeds": noise(1, 16, seed=3), "negative_pooled_prompt_embeds": noise(1, 16, seed=4)}
SIZE = {"height": 32, "width": 48}


def controlled() -> Any:
    unet = build()
    torch.manual_seed(2)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return plain("StableDiffusionControlNetPipeline", unet, controlnet=control)


def inpainting(name: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 8:24] = 1
    call = {**PROMPT, **SIZE, "image": image(1, 3, 32, 48), "mask_image": mask, "strength": 1.0}
    return lambda: plain("StableDiffusionInpaintPipeline", build(name)), call


PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "text": (lambda: plain("StableDiffusionPipeline", build()), {**PROMPT, **SIZE, "num_images_per_prompt": 2}),
    "no-guidance": (
        lambda: plain("StableDiffusionPipeline", build("sd21")),
        {"prompt_embeds": PROMPT["prompt_embeds"], **SIZE, "guidance_scale": 1.0},
    ),
    "image": (
        lambda: plain("StableDiffusionImg2ImgPipeline", build()),
        {**PROMPT, "image": image(1, 3, 32, 48), "strength": 0.7},
    ),
    "inpaint-9": inpainting("inpaint"),
    "inpaint-4": inpainting("sd15"),
    "pix2pix": (
        lambda: plain("StableDiffusionInstructPix2PixPipeline", build("pix2pix")),
        {**PROMPT, "image": image(1, 3, 32, 48)},
    ),
    "controlnet": (controlled, {**PROMPT, **SIZE, "image": image(1, 3, 32, 48), "guess_mode": False}),
    "guess-mode": (controlled, {**PROMPT, **SIZE, "image": image(1, 3, 32, 48), "guess_mode": True}),
    "xl-text": (lambda: large("StableDiffusionXLPipeline", build("sdxl")), {**PROMPT, **POOLED, **SIZE}),
    "xl-image": (
        lambda: large("StableDiffusionXLImg2ImgPipeline", build("sdxl")),
        {**PROMPT, **POOLED, "image": image(1, 3, 32, 48), "strength": 0.7},
    ),
    "refiner": (
        lambda: large("StableDiffusionXLImg2ImgPipeline", build("refiner"), requires_aesthetics_score=True),
        {**PROMPT, **POOLED, "image": image(1, 3, 32, 48), "strength": 0.7},
    ),
    "lcm": (
        lambda: plain("LatentConsistencyModelPipeline", build("lcm", time_cond_proj_dim=32)),
        {"prompt_embeds": PROMPT["prompt_embeds"], **SIZE, "original_inference_steps": 50},
    ),
    "ip-adapter": (
        lambda: plain("StableDiffusionPipeline", load_ip_adapter(build(), "base", scale=0.6), image_encoder=None),
        {**PROMPT, **SIZE, "ip_adapter_image_embeds": [noise(2, 1, 14, seed=6)]},
    ),
}


def make(pipe: Any, call: dict[str, Any], steps: int = 3, **changes: Any) -> torch.Tensor:
    if "original_inference_steps" in call and not isinstance(pipe.scheduler, diffusers.LCMScheduler):
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    call = {**call, "num_inference_steps": steps, "output_type": "pt", "generator": generator, **changes}
    return pipe(**call).images  # type: ignore[no-any-return]


FIRST = ("text", "image", "inpaint-9", "controlnet", "xl-text", "lcm", "ip-adapter")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES if name not in FIRST]


@pytest.mark.parametrize("name", [*FIRST, *REST])
def test_same_images(name: str) -> None:
    build_pipe, call = PIPELINES[name]
    pipe = build_pipe()
    expected = make(pipe, call)
    pipe.unet = sdgraph.apply(pipe.unet)
    assert isinstance(pipe.unet, sdgraph.GraphUNet)
    found = make(pipe, call)
    assert torch.equal(expected, found)
    assert expected.isfinite().all()
    assert torch.equal(found, make(pipe, call))  # nothing is left over from the run before


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler, diffusers.PNDMScheduler])
def test_schedulers_that_call_in_other_ways(scheduler: Any) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = make(pipe, call, steps=5)
    pipe.unet = sdgraph.apply(pipe.unet)
    assert torch.equal(expected, make(pipe, call, steps=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casting_the_pipeline(dtype: torch.dtype) -> None:
    build_pipe, call = PIPELINES["text"]
    source, pipe = build_pipe().to(dtype), build_pipe()
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.to(dtype)
    assert pipe.unet.dtype is dtype
    call = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    assert torch.equal(make(source, call), make(pipe, call))


def test_image_prompts_are_counted_and_told_apart() -> None:
    unet = sdgraph.apply(load_ip_adapter(build(), "base", "plus"))
    layers = unet.encoder_hid_proj.image_projection_layers
    assert [isinstance(layer, diffusers.models.embeddings.ImageProjection) for layer in layers] == [True, False]
    assert len(copy.deepcopy(unet).encoder_hid_proj.image_projection_layers) == 2


def test_saved_and_loaded_inside_a_pipeline(tmp_path: Any) -> None:
    build_pipe, call = PIPELINES["text"]
    pipe = build_pipe()
    expected = make(pipe, call)
    pipe.unet = sdgraph.apply(pipe.unet)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, sdgraph.GraphUNet)
    assert torch.equal(expected, make(loaded, call))


# -- offloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_offloading_hooks(name: str) -> None:
    unet = build(name)
    graph, call = sdgraph.apply(unet), call_of(unet)
    expected = answer(unet, call)
    cpu_offload(graph, execution_device=torch.device("cpu"))
    assert graph.conv_in.weight.is_meta
    assert torch.equal(expected, answer(graph, call))
    remove_hook_from_module(graph, recurse=True)
    assert torch.equal(expected, answer(graph, call))
    _, hook = cpu_offload_with_hook(graph, execution_device=torch.device("cpu"))
    assert torch.equal(expected, answer(graph, call))
    hook.remove()
    assert torch.equal(expected, answer(unet, call))


def test_a_weight_that_sequential_offloading_cannot_bring_is_refused() -> None:
    unet = build(time_embedding_type="fourier")
    graph, call = sdgraph.apply(unet), call_of(unet)
    cpu_offload(graph, execution_device=torch.device("cpu"))
    with pytest.raises(ModeError, match=r"(?s)time_proj.weight.*enable_model_cpu_offload"):
        answer(graph, call)
    remove_hook_from_module(graph, recurse=True)
    _, hook = cpu_offload_with_hook(graph, execution_device=torch.device("cpu"))
    assert torch.equal(answer(unet, call), answer(graph, call))
    hook.remove()


# -- the source stays as it is ----------------------------------------------------------------------------------------


class State:
    """All that must not change in a source UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.values = unet, copy.deepcopy(unet.state_dict())
        self.outside = self._outside()

    def _outside(self) -> Any:
        tensors = {n: (id(t), t.data_ptr(), t.dtype, t.device, t.requires_grad, t.grad) for n, t in self._named()}
        return tensors, {n: m.training for n, m in self.unet.named_modules()}, dict(self.unet.config)

    def _named(self) -> Any:
        return [*self.unet.named_parameters(), *self.unet.named_buffers()]

    def check(self) -> None:
        assert self.outside == self._outside()
        assert all(torch.equal(self.values[n], t) for n, t in self.unet.state_dict().items())


def step(graph: Any) -> None:
    graph.train()
    optimise(graph)


def optimise(graph: Any) -> None:
    optimizer = torch.optim.AdamW(graph.parameters(), lr=0.1)
    graph(**call_of(graph)).sample.square().mean().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda g: None,
    "cast": lambda g: g.to(torch.bfloat16),
    "half": lambda g: g.half(),
    "double": lambda g: g.double(),
    "channels-last": lambda g: g.to(memory_format=torch.channels_last),
    "meta": lambda g: g.to("meta"),
    "load": lambda g: g.load_state_dict({n: t + 1 for n, t in g.state_dict().items()}),
    "load-assign": lambda g: g.load_state_dict({n: t + 1 for n, t in g.state_dict().items()}, assign=True),
    "train": step,
    "train-without-a-word": optimise,
    "requires-grad": lambda g: g.requires_grad_(True).conv_in.weight.data.zero_(),
    "freeze": lambda g: g.requires_grad_(False),
    "copy": lambda g: copy.deepcopy(g).conv_in.weight.data.zero_(),
    "again": lambda g: step(sdgraph.apply(g)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "flags", ["trainable", *(pytest.param(flags, marks=pytest.mark.slow) for flags in ("frozen", "training"))]
)
def test_the_source_never_changes(change: str, flags: str) -> None:
    if change == "train-without-a-word" and flags == "frozen":
        pytest.skip("frozen weights have no gradients")
    unet = build().requires_grad_(flags != "frozen").train(flags == "training")
    state = State(unet)
    graph = sdgraph.apply(unet)
    state.check()
    if change in ("train", "again") and flags == "frozen":
        graph.requires_grad_(True)
    CHANGES[change](graph)
    state.check()


def test_a_step_of_training_is_the_sources() -> None:
    """The result trains: same loss, same gradients, same weights after a step."""
    unet, graph = build(), sdgraph.apply(build())
    for model in (unet, graph):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**call_of(model)).sample.square().mean().backward()
        optimizer.step()
    gradients = {n: p.grad for n, p in unet.named_parameters()}
    assert all(torch.allclose(p.grad, gradients[n], rtol=1e-4, atol=1e-6) for n, p in graph.named_parameters())
    call = call_of(unet)
    assert torch.allclose(answer(unet.eval(), call), answer(graph.eval(), call), rtol=1e-4, atol=1e-5)


def test_loaded_weights_are_used() -> None:
    unet, other = build(), build(seed=9)
    for assign in (False, True):
        graph = sdgraph.apply(unet)
        answer(graph, call_of(unet))  # with a variant already made
        graph.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(answer(other, call_of(other)), answer(graph, call_of(other)))


def test_copies_are_independent() -> None:
    unet = build()
    graph = sdgraph.apply(unet)
    twin, call = copy.deepcopy(graph), call_of(unet)
    expected = answer(unet, call)
    assert torch.equal(expected, answer(twin, call))
    assert str(twin.report) == str(graph.report)
    with torch.no_grad():
        twin.conv_in.weight.zero_()
    assert torch.equal(expected, answer(graph, call))
    assert not torch.equal(expected, answer(twin, call))
    assert copy.deepcopy(graph.to(torch.bfloat16)).dtype is torch.bfloat16


def test_pickling_is_refused() -> None:
    graph = sdgraph.apply(build())
    for verb in (pickle.dumps, lambda g: torch.save(g, "/dev/null")):
        with pytest.raises(ModeError, match="save_pretrained"):
            verb(graph)


def test_the_result_of_apply_can_be_applied_again() -> None:
    unet = build()
    call = call_of(unet)
    again = sdgraph.apply(sdgraph.apply(unet).to(torch.bfloat16))
    assert again.dtype is torch.bfloat16
    unet.to(torch.bfloat16)
    call = call_of(unet)
    assert torch.equal(answer(unet, call), answer(again, call))
