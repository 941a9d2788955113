"""The inputs of commands: pipelines, UNets, exported directories and prompts."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SavedError, SourceError, SpecError


def local_folder(source: str) -> Path | None:
    """Return the folder that `source` names, or None if `source` is the name of a model on the hub.

    Raises:
        SpecError: there is no such folder, and `source` does not look like the name of a model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SpecError(
            f"{source} is a file", hint="give a folder, or the name of a model on the hub, which is OWNER/NAME"
        )
    match = re.fullmatch(r"(\w[\w.-]*)/[\w.-]+", source)
    if match is None or Path(match[1]).exists():
        raise SpecError(f"there is no folder {source}", hint="check the path; models on the hub are named OWNER/NAME")
    return None


def bundle_folder(source: str) -> Path:
    """Return the folder of an exported UNet.

    Raises:
        SpecError: there is no such folder.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise SpecError(f"there is no folder {source}", hint="give the directory that `sdgraph export` wrote")
    return folder


def load_pipeline(source: str, dtype: str, device: str) -> Any:
    """Load a diffusers pipeline, move it to a device, and disable its own progress bar.

    Raises:
        SpecError: there is no such folder, or it holds no pipeline.
        SourceError: diffusers cannot load it.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = local_folder(source)
    if folder is not None and not (folder / "model_index.json").is_file():
        raise SpecError(
            f"there is no pipeline in {source}",
            hint="give a folder with model_index.json, which the save_pretrained of a diffusers pipeline writes",
        )
    pipe = _load(DiffusionPipeline.from_pretrained, source, folder or source, torch_dtype=getattr(torch, dtype))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_unet(source: str, dtype: str) -> Any:
    """Load the UNet of a pipeline, or a UNet from a folder of its own.

    Returns:
        A `GraphUNet` if the folder holds a saved one, otherwise a `UNet2DConditionModel`.
    Raises:
        SpecError: there is no such folder, or it holds no UNet.
        SourceError: diffusers cannot load it.
        SavedError: a saved `GraphUNet` is damaged.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from ..runtime.unet import GraphUNet

    folder, torch_dtype = local_folder(source), getattr(torch, dtype)
    if folder is None:
        return _load(UNet2DConditionModel.from_pretrained, source, source, subfolder="unet", torch_dtype=torch_dtype)
    if (folder / "model_index.json").is_file():
        folder = folder / "unet"
    if (folder / "model.onnx").is_file():
        raise SpecError(
            f"{source} is exported already",
            hint="give the model that it was exported from; `sdgraph inspect` lists the passes that were applied",
        )
    if not (folder / "config.json").is_file():
        raise SpecError(f"there is neither a pipeline nor a UNet in {source}", hint="give a folder with config.json")
    if (folder / "sdgraph.json").is_file():
        return _load(GraphUNet.from_pretrained, source, folder, torch_dtype=torch_dtype)
    return _load(UNet2DConditionModel.from_pretrained, source, folder, torch_dtype=torch_dtype)


def _load(from_pretrained: Callable[..., Any], source: str, *args: Any, **options: Any) -> Any:
    print(f"loading {source}", file=sys.stderr)
    try:
        return from_pretrained(*args, **options)
    except SavedError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        if Path(source).expanduser().exists():
            raise SourceError(
                f"{source} cannot be loaded: {reason}", hint="repair the folder, or save the model again"
            ) from error
        raise SourceError(
            f"there is no folder {source}, and the hub does not provide such a model: {reason}",
            hint="check the name, the connection to the hub, and that HF_HUB_OFFLINE is not set",
        ) from error


def read_prompts(path: Path) -> list[str]:
    """Read the non-empty lines of a text file.

    Raises:
        SpecError: there is no such file, it is not text, or it has no prompts.
    """
    hint = "give a text file with one prompt per line"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise SpecError(f"there is no file {path}", where="--prompts", hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}", where="--prompts", hint=hint) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SpecError(f"there are no prompts in {path}", where="--prompts", hint=hint)
    return prompts
