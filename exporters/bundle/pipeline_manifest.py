"""The files of an exported pipeline: where each part lies, and `pipeline.json`, which has their hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from sdgraph import __version__
from sdgraph.atomic import sha256
from sdgraph.errors import SavedError
from sdgraph.untrusted import Digest, Format, as_kind, check_format, read_json, require_inside

from .manifest import CONFIG, DATA, MODEL, Dtype
from .manifest_file import digest

FORMAT = 1
PIPELINE, INDEX = "pipeline.json", "model_index.json"
AGAIN = "export the pipeline again"
UNET, ENCODER, DECODER, SCHEDULER = "unet", "vae_encoder", "vae_decoder", "scheduler"
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
Tokenizer = Literal["CLIPTokenizer", "CLIPTokenizerFast"]
Kind = Literal["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
Setting = Literal["force_zeros_for_empty_prompt", "requires_aesthetics_score"]
SETTINGS: tuple[Setting, ...] = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
Task = Literal["text-to-image", "image-to-image", "inpainting"]
# The class of diffusers for each kind and task.
CLASSES: dict[str, dict[str, str]] = {
    "StableDiffusionPipeline": {
        "text-to-image": "StableDiffusionPipeline",
        "image-to-image": "StableDiffusionImg2ImgPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
    },
    "StableDiffusionXLPipeline": {
        "text-to-image": "StableDiffusionXLPipeline",
        "image-to-image": "StableDiffusionXLImg2ImgPipeline",
        "inpainting": "StableDiffusionXLInpaintPipeline",
    },
}
FilePath = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.-]{0,99}(/[A-Za-z0-9_][\w.-]{0,99})?\Z")]
ClassName = Annotated[str, Meta(pattern=r"^[A-Za-z]\w{0,99}\Z")]


@dataclass(frozen=True)
class PipelineManifest:
    """The parts of an exported pipeline besides its UNet, which has a separate manifest.

    Args:
        kind: the class of diffusers that makes images from text.
        dtype: the dtype of the text encoders; the VAE is in float32.
        scheduler: the class of diffusers of the scheduler.
        tokenizers: the class of transformers of each tokenizer, by its folder.
        settings: the settings of the pipeline itself, such as `force_zeros_for_empty_prompt`.
        files: SHA-256 of each file outside of `unet`, by its path from the folder.
        version: version of the sdgraph that wrote it.
        format: version of this description.
    """

    kind: Kind
    dtype: Dtype
    scheduler: ClassName
    tokenizers: Mapping[Literal["tokenizer", "tokenizer_2"], Tokenizer]
    settings: Mapping[Setting, bool] = field(default_factory=dict)
    files: Mapping[FilePath, Digest] = field(default_factory=dict)
    version: str = __version__
    format: Format = FORMAT

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The folders of the text encoders."""
        return TEXT_ENCODERS[: 2 if self.kind == "StableDiffusionXLPipeline" else 1]


def write_pipeline_manifest(manifest: PipelineManifest, folder: Path) -> None:
    """Write `pipeline.json`, with the hashes of the files in the folder.

    Args:
        manifest: the manifest, whose `files` are ignored.
        folder: the folder of the pipeline.
    """
    files = {name: sha256(folder / name) for name in _names(folder)}
    plain = {**asdict(manifest), "files": files}
    (folder / PIPELINE).write_text(json.dumps({**plain, "sha256": digest(plain)}, indent=1) + "\n")


def _names(folder: Path) -> Iterable[str]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in (UNET, PIPELINE):
            yield relative.as_posix()


def read_pipeline_manifest(folder: Path, verify: bool = True) -> PipelineManifest:
    """Read the manifest of an exported pipeline, and compare its files with their hashes.

    Args:
        folder: the folder of the pipeline.
        verify: whether the files of weights are compared as well.
    Returns:
        The manifest.
    Raises:
        SavedError: the folder holds no exported pipeline; or a file is missing, damaged, changed or unsafe.
    """
    if not (folder / PIPELINE).is_file():
        holds = "a pipeline of diffusers" if (folder / INDEX).is_file() else "no pipeline.json"
        holds = "an exported UNet alone" if (folder / MODEL).is_file() else holds
        hint = f"write one with `sdgraph export {folder} --out DIRECTORY`"
        if not folder.is_dir():
            holds = "nothing, because there is no such folder"
        raise SavedError(f"{folder} holds {holds}, and no exported pipeline", where=str(folder), hint=hint)
    path = folder / PIPELINE
    plain = read_json(path, AGAIN)
    check_format(plain, FORMAT, path, AGAIN)
    if plain.pop("sha256", None) != digest(plain):
        raise SavedError(f"{PIPELINE} was edited", where=str(path), hint=AGAIN)
    manifest = as_kind(plain, PipelineManifest, path, AGAIN)
    parts = (*manifest.text_encoders, ENCODER, DECODER)
    for name in (INDEX, f"{SCHEDULER}/scheduler_config.json", *(f"{p}/{f}" for p in parts for f in (MODEL, CONFIG))):
        if name not in manifest.files:
            raise SavedError(f"{PIPELINE} is damaged: there is no hash of {name}", where=str(path), hint=AGAIN)
    if len(manifest.tokenizers) != len(manifest.text_encoders):
        raise SavedError(f"{PIPELINE} is damaged: a tokenizer is missing", where=str(path), hint=AGAIN)
    for name, expected in manifest.files.items():
        _check_file(folder / name, name, expected if verify or not name.endswith(DATA) else None)
    return manifest


def _check_file(path: Path, name: str, expected: str | None) -> None:
    """Refuse a file that is missing, a link out of its folder, or not the one that was exported."""
    require_inside(path.parent, AGAIN)
    require_inside(path, AGAIN)
    if not path.is_file():
        raise SavedError(f"{name} is missing", where=str(path), hint=AGAIN)
    if expected is not None and sha256(path) != expected:
        raise SavedError(f"{name} is not the file that was exported", where=str(path), hint=AGAIN)
