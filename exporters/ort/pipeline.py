"""`open_pipeline`: an exported pipeline as one of diffusers, whose models all run on ONNX Runtime."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

import sdgraph
from sdgraph.errors import ExtraError, SavedError, SpecError
from sdgraph.extra import imported, require_onnx
from sdgraph.options import Text, checked

from ..bundle.manifest import DTYPES
from ..bundle.pipeline_manifest import AGAIN, CLASSES, SCHEDULER, UNET, PipelineManifest, Task, read_pipeline_manifest
from .parts import ORTVAE, Latents, ORTTextEncoder
from .providers import OPENVINO, Provider, choose
from .unet import ORTUNet

log = logging.getLogger("sdgraph")


@checked(SpecError)
def open_pipeline(
    directory: Text | os.PathLike[str],
    *,
    task: Task = "text-to-image",
    provider: str | None = None,
    precision: str | None = None,
    provider_options: Mapping[str, Any] | None = None,
    session_options: Mapping[str, Any] | None = None,
    tile: Latents | None = None,
    verify: bool = True,
) -> Any:
    """Open a folder that `export_pipeline` wrote, as a pipeline of diffusers.

    All models run on ONNX Runtime. PyTorch computes none of them: it draws the noise, holds the tensors, and runs the
    arithmetic of diffusers' schedulers. The pipeline has the call, callbacks and outputs of diffusers', and gives the
    images of the source. Features are inherited as by the source UNet; the pipeline is attached. To stop a
    generation, set `pipe._interrupt = True` in `callback_on_step_end`.

    Args:
        directory: the exported folder.
        task: "text-to-image", "image-to-image" or "inpainting", which decides the class of diffusers.
        provider: the provider of ONNX Runtime for all models, see `ORTUNet.from_pretrained`.
        precision: the precision of OpenVINO's provider.
        provider_options: the options of that provider.
        session_options: attributes and configuration entries of `onnxruntime.SessionOptions`.
        tile: the side of the VAE's tiles in latents, such as 64; by default images are encoded and decoded whole.
        verify: whether to compare the files of weights with their hashes.
    Returns:
        The pipeline of diffusers.
    Raises:
        SavedError: a file is missing, damaged, changed or unsafe; nothing was run.
        SpecError: there is no such provider, precision, option or task.
        ExtraError: the extra `onnx`, `openvino` or `pipelines` is not installed.
    Example:
        `image = open_pipeline("sd15-onnx")("a bowl of fruit", num_inference_steps=25).images[0]`
    """
    require_onnx()
    imported("transformers", "pipelines")
    folder = Path(directory)
    manifest = read_pipeline_manifest(folder, verify)
    options, settings = dict(provider_options or {}), dict(session_options or {})
    unet = ORTUNet.from_pretrained(
        folder / UNET, provider=provider, precision=precision, provider_options=options, session_options=settings,
        verify=verify,
    )  # fmt: skip
    vae = ORTVAE(folder, _beside(unet, options, "float32"), settings)
    if vae.config["latent_channels"] != unet.config["out_channels"]:
        raise SavedError("the VAE decodes other latents than those of the UNet", where=str(folder), hint=AGAIN)
    if tile is not None:
        vae.enable_tiling(tile)
    for_text = _beside(unet, options, manifest.dtype)
    parts: dict[str, Any] = {
        name: ORTTextEncoder(folder / name, for_text, settings, DTYPES[manifest.dtype])
        for name in manifest.text_encoders
    }
    parts |= {"unet": unet, "vae": vae, **_from_libraries(folder, manifest)}
    kind = getattr(diffusers, CLASSES[manifest.kind][task])
    extra: dict[str, Any] = {str(name): value for name, value in manifest.settings.items()}
    if manifest.kind == "StableDiffusionPipeline":
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        extra["add_watermarker"] = False
        if task != "image-to-image" and task != "inpainting":
            extra.pop("requires_aesthetics_score", None)
    pipe = kind(**parts, **extra)
    if unet.manifest.sites:
        sdgraph.attach(pipe)
    log.info("%s on %s in %s", kind.__name__, unet.backend.provider, unet.backend.precision)
    return pipe


def _beside(unet: ORTUNet, options: Mapping[str, Any], dtype: str) -> Provider:
    """Return the provider of the UNet for a part of another dtype."""
    name = unet.backend.provider
    return choose(name, unet.backend.precision if name == OPENVINO else None, options, dtype)


def _from_libraries(folder: Path, manifest: PipelineManifest) -> dict[str, Any]:
    """Return the scheduler and the tokenizers.

    Raises:
        SavedError: a file is damaged, or its class is none of the library.
    """
    import transformers

    scheduler: Any = getattr(diffusers, manifest.scheduler, None)
    if not isinstance(scheduler, type) or not issubclass(scheduler, diffusers.SchedulerMixin):
        raise SavedError(
            f"diffusers has no scheduler {manifest.scheduler!r}",
            where=str(folder / SCHEDULER),
            hint="upgrade diffusers",
        )
    try:
        kind: Any = scheduler
        parts = {SCHEDULER: kind.from_pretrained(folder / SCHEDULER)}
        for name, tokenizer in manifest.tokenizers.items():
            with warnings.catch_warnings(action="ignore"):
                parts[name] = getattr(transformers, tokenizer).from_pretrained(folder / name, local_files_only=True)
    except ExtraError:
        raise
    except Exception as error:  # whatever libraries raise over damaged files
        reason = str(error).strip().partition("\n")[0]
        raise SavedError(f"scheduler or tokenizer cannot be read: {reason}", where=str(folder), hint=AGAIN) from error
    return parts
