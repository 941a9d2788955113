"""The trained model: a Stable Diffusion pipeline that refuses what it cannot read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from .caption import check_words

MODEL = Path(__file__).parent / "model"
JUDGE = "judge.safetensors"
RECORD, QUALITY = "training.json", "quality.json"  # how the weights came about, and how good they are
SUMS = "SHA256SUMS"  # of the files beside it, as sha256sum writes and checks them
GUIDANCE = 3.0  # classifier-free guidance; what the model card measures it with


class AssetError(OSError):
    """A file of the model is missing or damaged."""


class ScenePipeline(StableDiffusionPipeline):
    """Stable Diffusion for scenes: words that no caption has are an error, not noise, and guidance is as tuned.
    Else it is its base class."""

    def __call__(self, *args: Any, guidance_scale: float = GUIDANCE, **kwargs: Any) -> Any:
        return super().__call__(*args, guidance_scale=guidance_scale, **kwargs)

    def check_inputs(self, prompt: str | list[str] | None, *args: Any, **kwargs: Any) -> None:
        for text in [prompt] if isinstance(prompt, str) else prompt or ():
            check_words(text)
        super().check_inputs(prompt, *args, **kwargs)


def load(folder: Path = MODEL) -> ScenePipeline:
    """The pipeline in `folder`, float32, on the CPU.

    Raises:
        AssetError: a file is missing, or is not the one that was saved.
    """
    check_files(folder)
    return ScenePipeline.from_pretrained(folder, local_files_only=True)


def write_sums(folder: Path) -> None:
    """Of what is loaded: the parts, each in its folder, the index and the judge; not of what tells about them."""
    files = [folder / "model_index.json", *sorted(folder.glob("*/*")), *folder.glob(JUDGE)]
    lines = [f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def check_files(folder: Path) -> None:
    hint = "restore it with `git checkout examples/scenes`, or train anew: examples/scenes/README.md"
    if not (folder / SUMS).exists():
        raise AssetError(f"there is no model in {folder}: {SUMS} is missing; {hint}")
    for line in (folder / SUMS).read_text().splitlines():
        wanted, name = line.split("  ", 1)
        if not (folder / name).exists():
            raise AssetError(f"{folder / name} is missing; {hint}")
        if _sum(folder / name) != wanted:
            raise AssetError(f"{folder / name} is damaged: its SHA-256 is not that of {SUMS}; {hint}")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
