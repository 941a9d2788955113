"""The untrained parts of a small Stable Diffusion 1.5 for the scenes, with other widths, depths and words."""

from __future__ import annotations

import json
import tempfile
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .caption import WORDS

TOKENS = 24  # of a padded caption; the longest caption has 21 words, a start and an end
TEXT_WIDTH = 96


def tokenizer() -> CLIPTokenizer:
    """Create CLIP's tokenizer with one token for each word of the captions.

    Byte-pair encoding needs rules that merge the letters of a word. The merged pieces are tokens as well, and so are
    all letters, as in CLIP's own vocabulary.
    """
    letters = [chr(code) for code in range(33, 127)]
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges: dict[str, None] = {}
    for word in _in_order_of_merging():
        whole, *rest = _letters(word)
        for piece in rest:
            merges[f"{whole} {piece}"] = None
            whole += piece
            tokens[whole] = None
    vocabulary = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _letters(word: str) -> list[str]:
    """Split a word into letters. CLIP marks the last letter of a word."""
    return [*word[:-1], f"{word[-1]}</w>"]


def _in_order_of_merging() -> list[str]:
    """Order the words: "above" comes before "over", whose first merge would else turn it into a-b-ov-e."""
    order: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(WORDS, ()))
    for word in WORDS:
        inner = set(pairwise(_letters(word)[1:]))
        for other in WORDS:
            if tuple(_letters(other)[:2]) in inner:
                order.add(other, word)
    return list(order.static_order())


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Create CLIP's text transformer with three layers, from tokens (B, 24) to embeddings (B, 24, 96)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def vae() -> AutoencoderKL:
    """Create the VAE, between images (3, 64, 64) and latents (4, 16, 16), with three levels instead of four."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    # At first the latents are small, and noise of unit variance would drown them.
    _, log_variance = vae.quant_conv.bias.data.chunk(2)
    log_variance.fill_(-6.0)
    return vae


def unet() -> UNet2DConditionModel:
    """Create the UNet, with Stable Diffusion 1.5's block types and layers per block, and a tenth of its width."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96, 96),
        norm_num_groups=8,
        attention_head_dim=2,  # the number of heads, as in Stable Diffusion 1.5's configuration
        cross_attention_dim=TEXT_WIDTH,
    )


def scheduler() -> DDIMScheduler:
    """Create the scheduler, with Stable Diffusion's noise schedule and the v-prediction of Stable Diffusion 2.

    A model this small cannot predict the noise well enough at the first steps, where the image is the small difference
    of two large values, so that errors of the prediction are amplified.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Combine the parts into one pipeline, on the CPU in float32."""
    parts: dict[str, torch.nn.Module] = {"text_encoder": text_encoder, "vae": vae, "unet": unet}
    return StableDiffusionPipeline(
        tokenizer=tokenizer,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{name: part.eval() for name, part in parts.items()},
    )
