"""Train a student of the model: a pruned UNet that learns to predict what the UNet of the model predicts.

    cd examples
    python -m scenes.student            # from ../out/student to scenes/student; the same command goes on
    python -m scenes.card               # its model card

The UNet learns in two rounds: what the teacher predicts, and then what it predicts with guidance as well. The folder
gets the UNet in float16, `training.json` (the recipes of the rounds), `loss.svg` of the last round, and the figures of
1,000 held-out captions, measured as those of the model are.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

import sdgraph
from sdgraph.tuning import DEFAULT, Guidance, Tensors

from . import data, quality
from .caption import caption
from .models import scheduler
from .pipeline import CURVE, GUIDANCE, RECORD, STUDENT, UNET, load, load_student, write_sums

PASSES = "PruneBlocks('bk-sdm-base')"
SEED, SCENES, RATE = 1, 20_000, 2e-3
TRAINING = {
    "train_batch_size": 32,
    "lr_scheduler": "cosine",
    "proportion_empty_prompts": 0.3,
    "use_ema": True,
    "ema_decay": 0.995,
    "checkpointing_steps": 250,
    "validation_steps": 10**9,
    "report_to": "none",
}
LOSSES = (*DEFAULT, Guidance(GUIDANCE))
GUIDED = {"guidance_pairs": True, "proportion_empty_prompts": 0.0}
ROUNDS: tuple[dict[str, Any], ...] = (
    {"max_train_steps": 4_000, "learning_rate": RATE},
    {"max_train_steps": 3_000, "learning_rate": RATE / 2, "losses": LOSSES, "seed": 1, **GUIDED},
)


@torch.no_grad()
def drawn(pipe: StableDiffusionPipeline, count: int, folder: Path) -> Tensors:
    """Return the latents of drawn training scenes, with the embeddings of a caption for each, to tune on.

    Args:
        pipe: the pipeline that encodes them.
        count: the number of scenes.
        folder: where images and latents are kept.
    """
    images = data.drawn(data.scenes(count, SEED), folder / "images.npy")
    latents = torch.from_numpy(data.encoded(images, pipe.vae, folder / "latents.npy")[:, :4].astype(np.float32))
    texts = captions(count)
    embedded = torch.cat([_embedded(pipe, texts[i : i + 500]) for i in range(0, count, 500)])
    return Tensors(
        latents * pipe.vae.config.scaling_factor,
        {"encoder_hidden_states": embedded},
        {"encoder_hidden_states": _embedded(pipe, [""])[0]},
    )


def captions(count: int, seed: int = SEED, held_out: bool = False) -> list[str]:
    """Return a caption for each of the training scenes, or of other ones; see `data.scenes`."""
    scenes = data.scenes(count, seed, held_out)
    return [caption(scene, np.random.default_rng((seed, i))) for i, scene in enumerate(scenes)]


def unseen_captions(count: int) -> list[str]:
    """Return the captions of so many scenes with a pair of shape and colour that no training scene shows.

    Captions that quality is measured on are left out.
    """
    measured = frozenset(quality.held_out_captions(2000)[1])
    return [text for text in captions(count, SEED + 2, held_out=True) if text not in measured]


def _embedded(pipe: Any, texts: list[str]) -> torch.Tensor:
    tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    embeddings: torch.Tensor = pipe.text_encoder(tokens).last_hidden_state
    return embeddings


def train(run: Path, share: float, scenes: int) -> tuple[sdgraph.GraphUNet, list[sdgraph.tuning.TuningReport]]:
    """Tune the student in rounds, and return it with their reports. The rounds are kept in a folder."""
    pipe, reports = load(), []
    data = drawn(pipe, scenes, run / "data")
    teacher = sdgraph.GraphUNet(sdgraph.trace(pipe.unet.to(memory_format=torch.channels_last)))  # a tenth faster
    student = sdgraph.apply(teacher, PASSES)
    for number, planned in enumerate(ROUNDS, 1):
        steps = math.ceil(share * planned["max_train_steps"])
        student, report = sdgraph.tune(
            student, teacher, data, scheduler=scheduler(), output_dir=run / f"round-{number}",
            lr_warmup_steps=math.ceil(steps / 50), **{**TRAINING, **planned, "max_train_steps": steps},
        )  # fmt: skip
        reports.append(report)
    return student, reports


def save(student: sdgraph.GraphUNet, reports: Sequence[sdgraph.tuning.TuningReport], folder: Path) -> None:
    """Write the student in float16, with the recipes of its rounds, and the losses of the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(student).half().save_pretrained(folder / UNET)
    recipes = [json.loads((report.output_dir / "tuning.json").read_text()) for report in reports]
    (folder / RECORD).write_text(json.dumps(recipes, indent=1) + "\n")
    reports[-1].picture(folder / CURVE)
    write_sums(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("../out/student"), help="folder of the training run")
    parser.add_argument("--out", type=Path, default=STUDENT)
    parser.add_argument("--share", type=float, default=1.0, help="the share of the optimizer steps to take")
    parser.add_argument("--scenes", type=int, default=SCENES, help="drawn scenes to learn from")
    parser.add_argument("--count", type=int, default=1000, help="held-out captions")
    options = parser.parse_args()
    save(*train(options.run, options.share, options.scenes), options.out)
    pipe = load()
    pipe.unet = load_student(options.out)
    quality.write(pipe, options.out, options.count)


if __name__ == "__main__":
    main()
