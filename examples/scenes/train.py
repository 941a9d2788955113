"""Train the small Stable Diffusion of the scenes, and the judge. Training is resumable, and downloads nothing.

    make train                                            # or, from examples/: python -m scenes.train
    cd examples && accelerate launch -m scenes.train      # several GPUs

The stages train the VAE (first on crops, then on whole images); the judge; the text encoder, which learns the meaning
of captions; and the UNet together with the text encoder. A stage resumes from its checkpoint under --work.
`scenes.save` writes the finished model.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it recommends torchvision, which is not needed here

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from . import data, models
from .caption import caption
from .fit import ON_CPU, Draw, OutOfTimeError, fit
from .judge import Judge, heads, labels, reading_loss, readings
from .pipeline import RECORD, load
from .scene import Scene

SCENES, SEED = 40_000, 1
STEPS = {"vae-crops": 3200, "vae": 2500, "judge": 3000, "text": 1500, "unet": 20_000}
KL = 1e-8  # weight of the Kullback-Leibler term, a sum over latents, relative to a mean over pixels
UNCONDITIONAL = 0.1  # share of empty captions, for classifier-free guidance
SNR_LIMIT = 5.0  # signal-to-noise ratio above which all timesteps have the same weight


Stage = TypeVar("Stage", bound=nn.Module)


class VAEStage(nn.Module):
    """The loss of the VAE: the squared error, a tenth of the absolute error, and a small Kullback-Leibler term."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(memory_format=torch.channels_last)
        latent = self.vae.encode(images).latent_dist
        image = self.vae.decode(latent.sample()).sample
        return F.mse_loss(image, images) + 0.1 * F.l1_loss(image, images) + KL * latent.kl().mean()


class JudgeStage(nn.Module):
    """The loss of the judge on noisy images, some of which are blurred, because images of a VAE are not crisp."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
        images = torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.3, blurred, images)
        noise = 0.15 * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(images)
        return self.judge.loss(images + noise, truth)


class TextStage(nn.Module):
    """The loss of the text encoder: the cross-entropy of predicting the labels of the scene from the pooled caption."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = heads(models.TEXT_WIDTH)

    def forward(self, tokens: Tensor, truth: Tensor) -> Tensor:
        pooled = self.text_encoder(tokens).pooler_output
        return reading_loss(readings(self.heads, pooled), truth)


class UNetStage(nn.Module):
    """The loss of the UNet and the text encoder: the squared error of the predicted v, weighted by timestep.

    Relative to the squared error of the predicted image, the weight of a timestep is 1 + min(SNR, 5). Min-SNR-γ (Hang
    et al., 2023) has no 1, and so gives little weight to the noisy timesteps, which decide where the objects are.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        scheduler = models.scheduler()
        self.register_buffer("alphas", scheduler.alphas_cumprod, persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        B = len(latents)
        # one timestep from each of B equal parts of the schedule, for less noise in the loss
        timestep = ((torch.randperm(B) + torch.rand(B)) / B * len(self.alphas)).long().to(latents.device)
        alpha = self.alphas[timestep][:, None, None, None]
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        noisy = noisy.to(memory_format=torch.channels_last)
        predicted = self.unet(noisy, timestep, self.text_encoder(tokens).last_hidden_state).sample
        snr = (alpha / (1 - alpha)).flatten()
        error = (predicted - v).square().mean((1, 2, 3))
        return (error * (1 + snr.clamp(max=SNR_LIMIT)) / (1 + snr)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("../out/scenes"), help="checkpoints and drawn scenes")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this many minutes; the same command resumes"
    )
    parser.add_argument("--begin", type=Path, help="saved model to begin with, instead of random weights")
    parser.add_argument(
        "--steps",
        type=changed_steps,
        default=STEPS,
        help=f"changed numbers of steps, such as unet=5000,vae=0 ({STEPS})",
    )
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"scenes in the training set ({SCENES})")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    process = PartialState(cpu=ON_CPU)
    try:
        train(options.work, options.begin, options.scenes, options.steps, until, process)
    except OutOfTimeError as reason:
        process.print(reason)


def changed_steps(text: str) -> dict[str, int]:
    """Return `STEPS` with the changes of `text`, such as "unet=5000,vae=0". A stage of 0 steps is left out."""
    changed = dict(STEPS)
    for change in text.split(","):
        name, _, count = change.partition("=")
        if name not in STEPS or not count.isdigit():
            message = f"{change!r} is no number of steps: write STAGE=NUMBER for a stage of {', '.join(STEPS)}"
            raise argparse.ArgumentTypeError(message)
        changed[name] = int(count)
    return changed


def train(
    work: Path,
    begin: Path | None,
    count: int,
    steps: Mapping[str, int],
    until: float,
    process: PartialState,
) -> None:
    if process.is_main_process and not (work / "begun").exists():
        work.mkdir(parents=True, exist_ok=True)
        if begin is not None:
            shutil.copy(begin / RECORD, work)
        (work / "begun").write_text(f"{datetime.now():%Y-%m-%d %H:%M}{f', from {begin.name}' if begin else ''}\n")
    scenes = data.scenes(count, SEED)
    with process.main_process_first():
        images = data.drawn(scenes, work / "images.npy")
    truth = torch.stack([labels(scene) for scene in scenes])
    tokenizer = models.tokenizer()
    torch.manual_seed(SEED)  # all processes must begin with the same weights
    vae, text_encoder, unet = models.vae(), models.text_encoder(tokenizer), models.unet()
    if begin is not None:
        pipe = load(begin)
        for part, name in ((vae, "vae"), (text_encoder, "text_encoder"), (unet, "unet")):
            part.load_state_dict(getattr(pipe, name).state_dict())
    vae, unet = (part.to(memory_format=torch.channels_last) for part in (vae, unet))  # faster by a fifth on a CPU

    def indices(rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.integers(len(scenes), size=count)

    def draw_crops(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        return (data.crops(images, scenes, indices(rng, count), rng),)

    def draw_images(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        return (data.pixels(images[indices(rng, count)]),)

    def draw_captions(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
        chosen = indices(rng, count)
        return captions(tokenizer, [scenes[i] for i in chosen], rng), truth[chosen]

    def fitted(name: str, module: Stage, draw: Draw, **settings: Any) -> Stage:
        return fit(name, module, draw, work, steps=steps[name], until=until, **settings) if steps[name] else module

    # Objects cover a tenth of a scene, so crops around them teach colours several times as fast.
    stage = fitted("vae-crops", VAEStage(vae), draw_crops, batch=16, rate=1.5e-3, decay=0.99)
    vae = fitted("vae", stage, draw_images, batch=8, rate=1e-3, decay=0.995).vae

    if steps["judge"]:
        # The judge must see the held-out pairs, or it would mistake some of them for pairs that it knows.
        others = data.scenes(count // 4, SEED + 1, held_out=True)
        with process.main_process_first():
            other_images = data.drawn(others, work / "held-out-images.npy")
        other_truth = torch.stack([labels(scene) for scene in others])

        def draw_labelled(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
            chosen, other = indices(rng, count - count // 4), rng.integers(len(others), size=count // 4)
            drawn = np.concatenate([images[chosen], other_images[other]])
            return data.pixels(drawn), torch.cat([truth[chosen], other_truth[other]])

        fitted("judge", JudgeStage(Judge()), draw_labelled, batch=64, rate=2e-3, decay=0.99)

    stage = fitted("text", TextStage(text_encoder), draw_captions, batch=128, rate=1e-3, decay=0.99)
    text_encoder = stage.text_encoder

    if steps["unet"]:
        with process.main_process_first():
            latents = data.encoded(images, vae, work / "latents.npy")
        factor = data.scaling_factor(latents)

        def draw_latents(rng: np.random.Generator, count: int) -> tuple[Tensor, ...]:
            chosen = indices(rng, count)
            mean, deviation = torch.from_numpy(latents[chosen]).float().chunk(2, 1)
            latent = factor * (mean + deviation * torch.randn_like(mean))
            return latent, captions(tokenizer, [scenes[i] for i in chosen], rng, UNCONDITIONAL)

        fitted("unet", UNetStage(unet, text_encoder), draw_latents, batch=32, rate=8e-4, decay=0.999)


def captions(tokenizer: CLIPTokenizer, scenes: list[Scene], rng: np.random.Generator, empty: float = 0.0) -> Tensor:
    """Write a caption for each scene, a share of them `empty`, as tokens (B, 24)."""
    texts = ["" if rng.random() < empty else caption(scene, rng) for scene in scenes]
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


if __name__ == "__main__":
    main()
