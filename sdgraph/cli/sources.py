"""The inputs of commands: pipelines, UNets, exported directories and prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SdgraphError, SourceError, SpecError
from ..progress import note
from ..text import json_object, lines, read_text

if TYPE_CHECKING:
    from ..graph import Graph

INDEX = "model_index.json"
AGAIN = "repair the folder, or save the model again"
UNETS = ("UNet2DConditionModel", "GraphUNet", "SwitchUNet")
SAVED = {"sdgraph.json": "GraphUNet", "switch.json": "SwitchUNet"}  # the class that reads a folder with that file
NO_UNET = "give a pipeline of Stable Diffusion or SDXL, or the folder of its UNet"
# The files of weights that diffusers and transformers write: plain, of a variant, in shards, with an index.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>(?!safetensors|bin)[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)(?:\.index(?:\.(?P<indexed>[\w-]+))?\.json)?"
)


def local_folder(source: str) -> Path | None:
    """Return the folder that `source` names, or None if `source` is the name of a model on the hub.

    Raises:
        SpecError: there is no such folder, and `source` does not look like the name of a model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _check_readable(path)
        return path
    if path.exists():
        single = path.suffix in (".safetensors", ".ckpt", ".pt", ".bin")
        raise SpecError(
            f"{source} is a file",
            hint="make it a folder: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
            if single
            else "give a folder, or the name of a model on the hub, which is OWNER/NAME",
        )
    match = re.fullmatch(r"(\w[\w.-]*)/[\w.-]+", source)
    if match is None or Path(match[1]).exists():
        raise SpecError(f"there is no folder {source}", hint="check the path; models on the hub are named OWNER/NAME")
    return None


def bundle_folder(source: str) -> Path:
    """Return the folder of an exported UNet.

    Raises:
        SpecError: there is no such folder, or it may not be read.
        SavedError: it holds something else.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise SpecError(f"there is no folder {source}", hint="give the directory that `sdgraph export` wrote")
    _check_readable(folder)
    from ..untrusted import require_folder

    require_folder(folder, exported=True)
    return folder


def _check_readable(folder: Path) -> None:
    """Refuse a folder that may not be read.

    Raises:
        SpecError: there is no permission.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise SpecError(f"there is no permission to read {folder}", hint=f"chmod -R u+rX {folder}, or ask its owner")


def load_bundle(source: str, provider: str | None = None, precision: str | None = None) -> Any:
    """Load an exported UNet from a folder, and say what runs it.

    Args:
        source: the folder.
        provider: the provider of ONNX Runtime; None for the fastest that is installed, see `ORTUNet.from_pretrained`.
        precision: the precision of OpenVINO's provider.
    Raises:
        SpecError: there is no such folder, or it holds no exported UNet; or there is no such provider.
        ExtraError: the provider is not installed.
        SavedError: the export is damaged.
    """
    folder = bundle_folder(source)
    from ..exporters.ort.unet import ORTUNet

    note(f"loading {source}")
    unet = ORTUNet.from_pretrained(folder, provider=provider, precision=precision)
    note(f"ONNX Runtime: {unet.backend.provider} in {unet.backend.precision}")
    return unet


def load_pipeline(source: str, dtype: str, device: str, variant: str | None = None) -> Any:
    """Load a diffusers pipeline, move it to a device, and disable its own progress bar.

    Args:
        source: the folder of a pipeline, or its name on the hub.
        dtype: name of the dtype to load in.
        device: the device to move it to.
        variant: the variant of the weights, such as "fp16". If it is None and a part of the pipeline has the weights of
            one variant only, that variant is loaded.
    Raises:
        SpecError: there is no such folder, or it holds no pipeline of this variant.
        SourceError: diffusers cannot load it, or it has no UNet.
    """
    import torch
    from diffusers import DiffusionPipeline

    kind: Any = DiffusionPipeline
    folder = local_folder(source)
    if folder is not None:
        if not (folder / INDEX).is_file():
            holds = "a UNet alone" if (folder / "config.json").is_file() else "no model_index.json"
            raise SpecError(
                f"there is no pipeline in {source}: it holds {holds}",
                hint="give a folder with model_index.json, which the save_pretrained of a diffusers pipeline writes",
            )
        index = _read_index(folder)
        _check_unet(index, source)
        _check_parts(index, folder)
        kind = _pipeline_class(index, source)
        variant = _variant([folder / name for name in parts(index)], variant, source)
    options = {"torch_dtype": getattr(torch, dtype), "variant": variant}
    if folder is not None and any((folder / "unet" / name).is_file() for name in SAVED):  # whatever the index names
        options["unet"] = load_unet(source, dtype)
    pipe = _load(kind.from_pretrained, source, folder or source, **options)
    if getattr(pipe, "unet", None) is None:
        raise SourceError(f"{type(pipe).__name__} has no UNet", where=source, hint=NO_UNET)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def is_pipeline(source: str) -> bool:
    """Return whether a source is a pipeline, or a name on the hub, where UNets are parts of pipelines.

    Raises:
        SpecError: there is no such folder.
    """
    folder = local_folder(source)
    return folder is None or (folder / INDEX).is_file()


def load_unet(source: str, dtype: str, variant: str | None = None) -> Any:
    """Load the UNet of a pipeline, or a UNet from a separate folder.

    Args:
        source: the folder of a pipeline or of a UNet, or the name of a pipeline on the hub.
        dtype: name of the dtype to load in.
        variant: the variant of the weights, as for `load_pipeline`.
    Returns:
        A `GraphUNet` or a `SwitchUNet` if the folder holds a saved one, otherwise a `UNet2DConditionModel`.
    Raises:
        SpecError: there is no such folder, or it holds no UNet of this variant.
        SourceError: diffusers cannot load it.
        SavedError: a saved `GraphUNet` is damaged.
    """
    import torch
    from diffusers import UNet2DConditionModel

    import sdgraph

    folder, options = _unet_folder(source), {"torch_dtype": getattr(torch, dtype)}
    if folder is None:
        options |= {"subfolder": "unet", "variant": variant}
        return _load(UNet2DConditionModel.from_pretrained, source, source, **options)
    for name, kind in SAVED.items():
        if (folder / name).is_file():
            return _load(getattr(sdgraph, kind).from_pretrained, source, folder, variant=variant, **options)
    options["variant"] = _variant([folder], variant, source)
    return _load(UNet2DConditionModel.from_pretrained, source, folder, **options)


def sketch(source: str, variant: str | None = None) -> Graph:
    """Return the graph of the UNet of a pipeline, or of a UNet in a separate folder.

    The weights of a UNet of diffusers are not read, and are on the meta device.

    Raises:
        SpecError, SourceError, SavedError: as `load_unet`.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from ..frontend.capture import capture

    folder = _unet_folder(source)
    if folder is None or (folder / "sdgraph.json").is_file():
        unet = load_unet(source, "float32", variant)
        return unet.graph if hasattr(unet, "graph") else capture(unet)
    with torch.device("meta"):
        return capture(_loaded(UNet2DConditionModel.from_config, source, read_object(folder / "config.json")))


def _unet_folder(source: str) -> Path | None:
    """Return the folder of a UNet, which may be part of a pipeline; None if it is on the hub.

    Raises:
        SpecError: there is no such folder, or it holds no UNet.
        SourceError: the UNet cannot be traced.
    """
    folder = local_folder(source)
    if folder is None:
        return None
    if (folder / "state.json").is_file():  # a checkpoint of a training run
        folder = folder / "unet"
    if (folder / INDEX).is_file():
        _check_unet(_read_index(folder), source)
        folder = folder / "unet"
    from ..untrusted import is_exported

    if is_exported(folder):
        raise SpecError(
            f"{source} is exported already",
            hint="give the model that it was exported from; `sdgraph inspect` lists the passes that were applied",
        )
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"there is neither a pipeline nor a UNet in {source}",
            where=str(folder),
            hint="give a folder with config.json, or one with model_index.json and a folder unet",
        )
    kind = read_object(folder / "config.json").get("_class_name")
    if kind not in (None, *UNETS):
        raise SourceError(f"{source} holds a {kind}, and sdgraph traces a UNet2DConditionModel", hint=NO_UNET)
    return folder


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object of diffusers, which may be a link into the cache of the hub."""
    return json_object(path, SourceError, hint=AGAIN)


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_object(folder / INDEX)
    if not isinstance(index.get("_class_name"), str | list):
        raise SourceError("model_index.json does not name the class of the pipeline", where=str(folder), hint=AGAIN)
    return index


def parts(index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return library and class of each part of a pipeline that is not empty."""
    return {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and not name.startswith("_") and len(value) == 2 and value[0] is not None
    }


def _check_unet(index: Mapping[str, Any], source: str) -> None:
    """Refuse a pipeline without a UNet that can be traced."""
    _, kind = parts(index).get("unet", (None, None))
    if kind is None:
        others = ", ".join(parts(index)) or "nothing"
        raise SourceError(f"{index['_class_name']} has no UNet, only {others}", where=source, hint=NO_UNET)
    if kind not in UNETS:
        raise SourceError(
            f"the UNet of this pipeline is a {kind}, and sdgraph traces a UNet2DConditionModel",
            where=source,
            hint=NO_UNET,
        )


def _check_parts(index: Mapping[str, Any], folder: Path) -> None:
    """Refuse a pipeline that lists a part whose folder is missing."""
    for name in parts(index):
        if not (folder / name).is_dir():
            raise SourceError(
                f"model_index.json lists {name}, and there is no folder {name}",
                where=str(folder),
                hint=f"copy the folder {name} as well, or set {name} to [null, null] if the pipeline can do without",
            )


def _pipeline_class(index: Mapping[str, Any], source: str) -> Any:
    """Return the class that loads a pipeline: one of diffusers, or one that was imported."""
    import diffusers

    name = index["_class_name"]
    by_import = "if it is a class of your own, name its module with --import where the command has that option"
    if isinstance(name, list):
        raise SourceError(
            f"the pipeline is code in its folder, {'.'.join(map(str, name))}, which is not run",
            where=source,
            hint="set _class_name in model_index.json to a class of diffusers, such as StableDiffusionPipeline, or "
            "load it in Python and call sdgraph.evaluate, which takes any pipeline",
        )
    if hasattr(diffusers, name):
        return diffusers.DiffusionPipeline
    kinds = [diffusers.DiffusionPipeline]
    for kind in kinds:
        kinds += kind.__subclasses__()
    own = next((kind for kind in kinds if kind.__name__ == name), None)
    if own is None:
        raise SourceError(
            f"diffusers has no pipeline {name}",
            where=f"{source}, _class_name in model_index.json",
            hint=f"{by_import}, or set _class_name to the class of diffusers that it derives from",
        )
    return own


def _variant(folders: Iterable[Path], asked: str | None, source: str) -> str | None:
    """Return the variant of weights to load: the one that was asked for, or else the only one where none is plain.

    Raises:
        SpecError: there is no such variant, or there are several and no plain weights.
    """
    found = {folder: _variants(folder) for folder in folders}
    every = sorted({variant for variants in found.values() for variant in variants if variant})
    if asked is not None:
        if asked not in every:
            hint = f"variants: {', '.join(every)}" if every else "leave --variant out"
            raise SpecError(f"there is no variant {asked} in {source}", where="--variant", hint=hint)
        return asked
    only = sorted({variant for variants in found.values() if "" not in variants for variant in variants})
    if len(only) > 1:
        raise SpecError(
            f"{source} holds the variants {', '.join(only)}, and no weights without a variant",
            where="--variant",
            hint=f"add --variant {only[0]}",
        )
    if only:
        note(f"{source} holds the variant {only[0]}, which is loaded")
    return only[0] if only else None


def _variants(folder: Path) -> set[str]:
    """Return the variants whose weights lie in a folder; "" is for weights without a variant."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    matches = [WEIGHTS.fullmatch(name) for name in names]
    return {match["variant"] or match["indexed"] or "" for match in matches if match is not None}


def _load(from_pretrained: Callable[..., Any], source: str, *args: Any, **options: Any) -> Any:
    note(f"loading {source}")
    return _loaded(from_pretrained, source, *args, **options)


def _loaded(from_pretrained: Callable[..., Any], source: str, *args: Any, **options: Any) -> Any:
    try:
        return from_pretrained(*args, **options)
    except SdgraphError:
        raise
    except Exception as error:  # whatever libraries raise over files of others; the cause is chained
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
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
    text = read_text(path, SpecError, where="--prompts", hint=hint)
    prompts = [line.strip() for line in lines(text) if line.strip()]
    if not prompts:
        raise SpecError(f"there are no prompts in {path}", where="--prompts", hint=hint)
    return prompts
