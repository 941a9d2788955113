"""A switch on disk: `switch.json` (the schedule and a recipe for each member), `config.json`, and all weights once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import msgspec
import torch

from ..atomic import appearing, sha256
from ..errors import SavedError
from ..graph import Graph
from ..untrusted import Digest, FileName, Format, as_kind, check_format, read_config, read_json, require_inside
from ..version import __version__
from .members import MemberName
from .recipe import CONFIG, SWITCH, GraphRecipe
from .serialization import HARMLESS, OURS, check_target, graph_recipe, only_defaults, rebuilt
from .weight_files import put_weights, read_weights, write_weights

FORMAT = 1
AGAIN = "save the switch again"
log = logging.getLogger("sdgraph")


class SwitchRecipe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The contents of `switch.json`.

    Args:
        format: version of this description.
        version: version of sdgraph that wrote it.
        schedule: the schedule as text.
        carry_features: whether values of common sites are taken over when the turn changes.
        members: the recipe of each member by name, in order.
        guidance_scale: the scale of classifier-free guidance of members by name, where it is not the pipeline's.
        files: SHA-256 of each other file, by name.
        weights: name of the file of weights, or of the index of its shards. Its tensors are named `MEMBER.TENSOR`.
        same: the tensor that is stored, for each that is not, because the two are equal.
    """

    format: Format
    version: str
    schedule: str
    carry_features: bool
    members: Annotated[dict[MemberName, GraphRecipe], msgspec.Meta(min_length=1, max_length=100)]
    files: dict[FileName, Digest]
    weights: FileName
    guidance_scale: dict[MemberName, Annotated[float, msgspec.Meta(gt=0, le=1e6)]] = {}
    same: dict[str, str] = {}


@dataclass
class Contents:
    """The parts of a switch that are saved.

    Args:
        schedule: the schedule as text.
        carry_features: whether values of common sites are taken over when the turn changes.
        graphs: the graph of each member by name.
        guidance_scale: the scale of classifier-free guidance of members by name, where it is not the pipeline's.
        tensors: the parameters and buffers of each member, by name.
    """

    schedule: str
    carry_features: bool
    graphs: Mapping[str, Graph]
    guidance_scale: Mapping[str, float]
    tensors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def stored(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors that are stored, by member and name, and the name of the stored one for each other."""
        stored: dict[str, torch.Tensor] = {}
        same: dict[str, str] = {}
        places: dict[object, str] = {}
        for member, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
                first = places.setdefault(place, f"{member}.{name}") if tensor.numel() else f"{member}.{name}"
                if first == f"{member}.{name}":
                    stored[first] = tensor
                else:
                    same[f"{member}.{name}"] = first
        return stored, same


def save_switch(
    contents: Contents,
    config: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    variant: str | None,
    safe_serialization: bool,
    max_shard_size: int | str,
    is_main_process: bool,
    **options: Any,
) -> None:
    """Write a folder that `load_switch` reads. The folder appears only when it is complete.

    Args:
        contents: the parts of the switch.
        config: the configuration, as the module has it.
        directory: the folder to write. An earlier saved UNet there is replaced.
        variant: part of the file name of the weights, as in diffusers.
        safe_serialization: the weights are written as safetensors even if this is False; then the log says so.
        max_shard_size: largest size of a file of weights; larger ones are split.
        is_main_process: if False, nothing is written.
        options: what diffusers' pipelines pass along; only defaults are accepted.
    Raises:
        ModeError: the graph of a member cannot be rebuilt from its recipe.
        SavedError: the folder holds files that are not ours, or cannot be written.
    """
    only_defaults(options, "save_pretrained")
    if not is_main_process:
        return
    if not safe_serialization:
        log.warning("a switch is saved as safetensors: safe_serialization=False, which would pickle it, is ignored")
    recipes = {name: graph_recipe(graph) for name, graph in contents.graphs.items()}
    stored, same = contents.stored()
    written = {k: v for k, v in config.items() if not k.startswith("_")}
    written |= {"_class_name": "SwitchUNet", "_diffusers_version": diffusers.__version__}
    with appearing(directory, check_target, SavedError) as folder:
        file = f"{OURS}.{variant + '.' if variant else ''}safetensors"
        weights, files = write_weights(stored, folder, file, max_shard_size)
        (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True, default=str) + "\n")
        recipe = SwitchRecipe(
            format=FORMAT,
            version=__version__,
            schedule=contents.schedule,
            carry_features=contents.carry_features,
            members=recipes,
            files={name: sha256(folder / name) for name in (CONFIG, *files)},
            weights=weights,
            guidance_scale=dict(contents.guidance_scale),
            same=same,
        )
        plain = json.loads(json.dumps(msgspec.to_builtins(recipe), default=str))
        (folder / SWITCH).write_text(json.dumps(plain, indent=2) + "\n")


def load_switch(
    directory: str | os.PathLike[str], *, subfolder: str | None = None, variant: str | None = None, **options: Any
) -> tuple[Contents, Path]:
    """Read a folder that `save_switch` wrote.

    Args:
        directory: the folder, or the one that holds `subfolder`.
        subfolder: name of the folder in `directory`.
        variant: the variant that the weights must have been saved as.
        options: diffusers' further options; only those that change nothing here are accepted.
    Returns:
        the parts, whose graphs have their weights, and the file that describes them.
    Raises:
        SavedError: something is missing, damaged, unsafe or from a newer version; nothing of it has been run.
    """
    for harmless in HARMLESS:
        options.pop(harmless, None)
    only_defaults(options, "from_pretrained")
    folder = Path(directory) / (subfolder or "")
    if not (folder / SWITCH).is_file():
        other = "; sdgraph.GraphUNet.from_pretrained reads one UNet" if (folder / "sdgraph.json").is_file() else ""
        hint = f"give the folder that SwitchUNet.save_pretrained wrote{other}"
        raise SavedError(f"there is no {SWITCH} in {folder}", where=str(folder), hint=hint)
    path = folder / SWITCH
    plain = read_json(path, AGAIN)
    check_format(plain, FORMAT, path, AGAIN)
    recipe = as_kind(plain, SwitchRecipe, path, AGAIN)
    if variant is not None and f".{variant}." not in recipe.weights:
        what = f"there is no variant {variant!r}, only {recipe.weights}"
        raise SavedError(what, where=str(folder), hint="leave variant out")
    for file in (recipe.weights, CONFIG):
        if file not in recipe.files:
            raise SavedError(f"there is no checksum of {file!r}", where=f"{path}, field files", hint=AGAIN)
    for file, digest in recipe.files.items():
        require_inside(folder / file, AGAIN)
        if not (folder / file).is_file():
            raise SavedError("the file is missing", where=str(folder / file), hint=AGAIN)
        if sha256(folder / file) != digest:
            raise SavedError("the file is not the one that was saved", where=str(folder / file), hint=AGAIN)
    read_config(folder / CONFIG, AGAIN)
    graphs = {name: rebuilt(one, one.source, path) for name, one in recipe.members.items()}
    found = read_weights(folder / recipe.weights, recipe.files, {})
    for name, graph in graphs.items():
        put_weights(graph, dict(_of_member(name, found, recipe.same, path)), folder / recipe.weights)
        graph.config = {**graph.config, "_name_or_path": str(folder)}
    return Contents(recipe.schedule, recipe.carry_features, graphs, recipe.guidance_scale), path


def _of_member(
    member: str, found: Mapping[str, torch.Tensor], same: Mapping[str, str], path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a member by name."""
    start = f"{member}."
    yield from ((name.removeprefix(start), tensor) for name, tensor in found.items() if name.startswith(start))
    for name, other in same.items():
        if name.startswith(start):
            if other not in found:
                raise SavedError(f"the weights have no {other!r}", where=f"{path}, field same", hint=AGAIN)
            yield name.removeprefix(start), found[other]
