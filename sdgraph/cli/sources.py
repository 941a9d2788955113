"""What commands are given to work on: pipelines, UNets and prompts."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..errors import SavedError, SourceError, SpecError
from ..runtime.unet import GraphUNet


def folder_of(source: str) -> Path | None:
    """The folder that is meant, or None if it is the name of a model on the hub.

    Raises:
        SpecError: it is neither, for there is no such folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SpecError(f"{source} is a file", hint="give a folder, or the name of a model on the hub: OWNER/NAME")
    named = re.fullmatch(r"(\w[\w.-]*)/[\w.-]+", source)
    if named is None or Path(named[1]).exists():
        raise SpecError(f"there is no folder {source}", hint="check the path; models on the hub are named OWNER/NAME")
    return None


def exported(source: str) -> Path:
    """A folder of an exported UNet.

    Raises:
        SpecError: there is no such folder.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise SpecError(f"there is no folder {source}", hint="the folder that `sdgraph export` wrote")
    return folder


def load_pipeline(source: str, dtype: str, device: str) -> Any:
    """A diffusers pipeline on a device, without its own progress bar.

    Raises:
        SpecError: there is no such folder, or no pipeline in it.
        SourceError: diffusers cannot load it.
    """
    folder = folder_of(source)
    if folder is not None and not (folder / "model_index.json").is_file():
        raise SpecError(
            f"there is no pipeline in {source}",
            hint="a folder with model_index.json, as save_pretrained writes it",
        )
    pipe = _load(DiffusionPipeline.from_pretrained, source, folder or source, torch_dtype=getattr(torch, dtype))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_unet(source: str, dtype: str) -> Any:
    """The UNet of a pipeline, or of a folder of its own: diffusers' or, if it was saved after `apply`, a `GraphUNet`.

    Raises:
        SpecError: there is no such folder, or no UNet in it.
        SourceError: diffusers cannot load it.
        SavedError: a saved `GraphUNet` is damaged.
    """
    folder, wanted = folder_of(source), getattr(torch, dtype)
    if folder is None:
        return _load(UNet2DConditionModel.from_pretrained, source, source, subfolder="unet", torch_dtype=wanted)
    if (folder / "model_index.json").is_file():
        folder = folder / "unet"
    if (folder / "model.onnx").is_file():
        raise SpecError(
            f"{source} is exported already",
            hint="give the model that it was exported from; `sdgraph inspect` says what was done to it",
        )
    if not (folder / "config.json").is_file():
        raise SpecError(f"there is neither a pipeline nor a UNet in {source}", hint="a folder with config.json")
    if (folder / "sdgraph.json").is_file():
        return _load(GraphUNet.from_pretrained, source, folder, torch_dtype=wanted)
    return _load(UNet2DConditionModel.from_pretrained, source, folder, torch_dtype=wanted)


def _load(read: Callable[..., Any], source: str, *args: Any, **options: Any) -> Any:
    print(f"loading {source}", file=sys.stderr)
    try:
        return read(*args, **options)
    except SavedError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        if Path(source).expanduser().exists():
            raise SourceError(
                f"{source} cannot be loaded: {reason}", hint="mend the folder, or save it again"
            ) from error
        raise SourceError(
            f"there is no folder {source}, and the hub gives no such model: {reason}",
            hint="check the name, and that the hub can be reached (HF_HUB_OFFLINE is not set)",
        ) from error


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        SpecError: there is no such file, it is no text, or there is no prompt in it.
    """
    hint = "a text file with one prompt per line"
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
