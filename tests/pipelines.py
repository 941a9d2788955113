"""Tiny pipelines of every kind, built from configurations; prompts come as embeddings, so no tokenizer is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler
from scenes import models
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from .models import CROSS, build, load_ip_adapter, perturbed


def vae(levels: int = 2) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def plain(kind: str, unet: Any, **parts: Any) -> Any:
    """A pipeline of Stable Diffusion."""
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    return _pipeline(kind, unet, requires_safety_checker=False, **absent, **parts)


def large(kind: str, unet: Any, **parts: Any) -> Any:
    """A pipeline of SDXL."""
    absent = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))
    return _pipeline(kind, unet, add_watermarker=False, **absent, **parts)


def large_with_text() -> Any:
    """A pipeline of SDXL with both text encoders, for prompts of the scenes' words."""
    words = models.tokenizer()
    torch.manual_seed(4)
    first = models.text_encoder(words).eval()
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**first.config.to_dict(), "projection_dim": 16})).eval()
    unet = build("sdxl", cross_attention_dim=2 * models.TEXT_WIDTH)
    parts = {"tokenizer": words, "tokenizer_2": words, "text_encoder": first, "text_encoder_2": second}
    return _pipeline("StableDiffusionXLPipeline", unet, add_watermarker=False, **parts)


def _pipeline(kind: str, unet: Any, **parts: Any) -> Any:
    parts = {"vae": vae(), "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False), **parts}
    pipe = getattr(diffusers, kind)(unet=unet, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = {"prompt_embeds": noise(1, 7, CROSS, seed=1), "negative_prompt_embeds": noise(1, 7, CROSS, seed=2)}

POOLED = {"pooled_prompt_embeds": noise(1, 16, seed=3), "negative_pooled_prompt_embeds": noise(1, 16, seed=4)}

SIZE = {"height": 32, "width": 48}


def controlled() -> Any:
    unet = build()
    torch.manual_seed(2)
    control = perturbed(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)))
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
    """The images of a call."""
    if "original_inference_steps" in call and not isinstance(pipe.scheduler, diffusers.LCMScheduler):
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    call = {**call, "num_inference_steps": steps, "output_type": "pt", "generator": generator, **changes}
    return pipe(**call).images  # type: ignore[no-any-return]
