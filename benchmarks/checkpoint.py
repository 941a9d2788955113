"""Write a pipeline of Stable Diffusion 1.5's sizes with random weights, for measurements of speed and memory.

    python -m benchmarks.checkpoint out/sd15
    sdgraph bench out/sd15 "InheritFeatures.damped(2)" --height 256 --width 256 --steps 10

Its UNet, VAE and text encoder have the configurations of the released checkpoint; the images show nothing. The
vocabulary is that of examples/scenes, so prompts are made of its words and letters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from examples.scenes.models import tokenizer

from .measuring import random_unets

WIDTH, TOKENS = 768, 77


def build() -> StableDiffusionPipeline:
    """Create the pipeline, in float32 on the CPU."""
    words = tokenizer()
    words.model_max_length = TOKENS
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=max(len(words), 49408), hidden_size=WIDTH, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=random_unets.build("sd15", "cpu", torch.float32),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    build().save_pretrained(parser.parse_args().folder)


if __name__ == "__main__":
    main()
