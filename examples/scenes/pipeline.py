"""The trained model: a Stable Diffusion pipeline that refuses words that it does not know."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from sdgraph import GraphUNet

from .caption import check_words

MODEL = Path(__file__).parent / "model"
STUDENT = Path(__file__).parent / "student"  # a tuned UNet for the pipeline of the model
UNET = "unet"
JUDGE = "judge.safetensors"
RECORD, QUALITY = "training.json", "quality.json"  # the training of the weights, and their quality
CURVE = "loss.svg"
SUMS = "SHA256SUMS"  # of the files beside it, as sha256sum writes and checks them
GUIDANCE = 3.0  # classifier-free guidance scale, which the model card uses


class AssetError(OSError):
    """A file of the trained model is missing or damaged."""


class ScenePipeline(StableDiffusionPipeline):
    """Stable Diffusion for scenes. Words that no caption has are an error.

    The guidance scale is 3 by default, and 1 for a student that guidance is folded into.
    """

    def __call__(self, *args: Any, guidance_scale: float | None = None, **kwargs: Any) -> Any:
        if guidance_scale is None:
            guidance_scale = 1.0 if self.unet.config.get("guidance_folded") else GUIDANCE
        return super().__call__(*args, guidance_scale=guidance_scale, **kwargs)

    def check_inputs(self, prompt: str | list[str] | None, *args: Any, **kwargs: Any) -> None:
        for text in [prompt] if isinstance(prompt, str) else prompt or ():
            check_words(text)
        super().check_inputs(prompt, *args, **kwargs)


def load(folder: Path = MODEL) -> ScenePipeline:
    """Load the pipeline in `folder`, in float32 on the CPU.

    Raises:
        AssetError: a file is missing or damaged.
    """
    check_files(folder)
    return ScenePipeline.from_pretrained(folder, local_files_only=True)


def load_student(folder: Path = STUDENT) -> GraphUNet:
    """Load the tuned UNet in `folder`, in float32 on the CPU.

    Raises:
        AssetError: a file is missing or damaged.
    """
    check_files(folder)
    return GraphUNet.from_pretrained(folder / UNET, torch_dtype=torch.float32)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of all files that are loaded: the index, the parts in their folders, and the judge."""
    files = [*folder.glob("model_index.json"), *sorted(folder.glob("*/*")), *folder.glob(JUDGE)]
    lines = [f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def check_files(folder: Path) -> None:
    """Compare the files of the model with their SHA-256.

    Raises:
        AssetError: a file is missing or damaged.
    """
    hint = "restore it with `git checkout examples/scenes`, or train again: see examples/scenes/README.md"
    if not (folder / SUMS).exists():
        raise AssetError(f"there is no model in {folder}: {SUMS} is missing; {hint}")
    for line in (folder / SUMS).read_text().splitlines():
        expected, name = line.split("  ", 1)
        if not (folder / name).exists():
            raise AssetError(f"{folder / name} is missing; {hint}")
        if _sum(folder / name) != expected:
            raise AssetError(f"{folder / name} is damaged: its SHA-256 differs from {SUMS}; {hint}")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
