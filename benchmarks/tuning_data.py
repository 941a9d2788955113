"""What the small trained Stable Diffusion is tuned on: drawn scenes with captions, or captions alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import data
from scenes.caption import caption

from sdgraph.tuning import Prompts, Source, Tensors

SEED = 1
CALLS = 20  # of a generation from a caption, all of which are kept


def captions(count: int) -> list[str]:
    """Return a caption for each of the training scenes."""
    return [caption(scene, np.random.default_rng((SEED, i))) for i, scene in enumerate(data.scenes(count, SEED))]


@torch.no_grad()
def drawn(pipe: Any, count: int, folder: Path) -> Source:
    """Return the latents of drawn scenes, and the embeddings of one caption for each of them."""
    images = data.drawn(data.scenes(count, SEED), folder / "images.npy")
    latents = torch.from_numpy(data.encoded(images, pipe.vae, folder / "latents.npy")[:, :4].astype(np.float32))
    texts = captions(count)
    embedded = torch.cat([_embedded(pipe, texts[i : i + 500]) for i in range(0, count, 500)])
    return Tensors(
        latents * pipe.vae.config.scaling_factor,
        {"encoder_hidden_states": embedded},
        {"encoder_hidden_states": _embedded(pipe, [""])[0]},
    )


def generated(pipe: Any, count: int, folder: Path) -> Source:
    """Return as many rows without any drawing: what the teacher saw while it generated from captions."""
    calls = min(CALLS, count)
    return Prompts(
        captions(count // calls),
        pipe,
        cache=folder / "trajectories",
        num_inference_steps=calls,
        calls_per_prompt=calls,
        batch=32,
    )


def _embedded(pipe: Any, texts: list[str]) -> torch.Tensor:
    tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    embeddings: torch.Tensor = pipe.text_encoder(tokens).last_hidden_state
    return embeddings
