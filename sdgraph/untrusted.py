"""Safe reading of untrusted files: JSON is validated against a schema, and file names cannot leave their folder.

A schema is a dataclass or a `msgspec.Struct` whose types are checked. Unknown fields are ignored on purpose, so that a
newer sdgraph may add optional fields; a field that older versions must not ignore raises the number `format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from .errors import SavedError
from .text import json_object

Kind = TypeVar("Kind")
LARGEST_FILE = 16 << 20  # bytes of JSON

FileName = Annotated[str, Meta(pattern=r"^[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,199}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Format = Annotated[int, Meta(ge=1, le=1 << 20)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]  # a number of channels, features or pixels
Layers = Annotated[int, Meta(ge=0, le=1000)]
BlockName = Annotated[str, Meta(max_length=100)]
Block = Annotated[tuple[Kind, ...], Meta(max_length=64)]  # one entry for each block

# A `tuple[Width, Width]` in a union crashes msgspec 0.22 when its type is collected.
Pair = Annotated[tuple[Width, ...], Meta(min_length=2, max_length=2)]


class Config(msgspec.Struct, frozen=True):
    """The fields of a UNet's `config.json` that sdgraph and pipelines read; diffusers checks the others."""

    in_channels: Width = 4
    out_channels: Width = 4
    sample_size: Width | Pair | None = None
    block_out_channels: Block[Width] = ()
    down_block_types: Block[BlockName] = ()
    up_block_types: Block[BlockName] = ()
    layers_per_block: Layers | Block[Layers] = 2
    transformer_layers_per_block: Layers | Block[Layers | Block[Layers]] = 1
    cross_attention_dim: Width | Block[Width] | None = None
    attention_head_dim: Width | Block[Width] | None = None
    num_attention_heads: Width | Block[Width] | None = None
    norm_num_groups: Width | None = None
    num_class_embeds: Width | None = None
    time_cond_proj_dim: Width | None = None
    encoder_hid_dim: Width | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: Width | None = None
    projection_class_embeddings_input_dim: Width | None = None
    upcast_attention: bool | None = None


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        hint: the advice of the error.
    Raises:
        SavedError: the file is missing, a link out of its folder, too large or no JSON object.
    """
    require_inside(path, hint)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise SavedError(f"{path.name} has more than {LARGEST_FILE >> 20} MB", where=str(path), hint=hint)
    except OSError as error:
        raise SavedError(f"{path.name} cannot be read: {error.strerror}", where=str(path), hint=hint) from error
    return json_object(path, SavedError, hint=hint)


def is_exported(folder: Path) -> bool:
    """Return whether a folder holds models of ONNX, of a UNet or of a switch.

    Args:
        folder: the folder.
    """
    return any(folder.glob("*.onnx"))


def require_folder(folder: Path, exported: bool) -> None:
    """Refuse a folder that is missing or holds something else.

    Args:
        folder: the folder.
        exported: whether the folder should hold an exported UNet instead of a saved one.
    Raises:
        SavedError: the folder is missing or holds something else; the message says what it holds and what reads it.
    """
    wanted = "an exported UNet" if exported else "a UNet that sdgraph saved"
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise SavedError(what, where=str(folder), hint=f"give the folder of {wanted}")
    if (folder / "sdgraph.json").exists() or is_exported(folder):
        return  # the loader reports damage
    config = folder / "config.json"
    if (folder / "model_index.json").exists():
        found, hint = "a pipeline", "its UNet is in the folder unet"
    elif (folder / "switch.json").exists():
        found, hint = "a switch of several UNets", "sdgraph.SwitchUNet.from_pretrained reads it"
    elif not config.exists():
        raise SavedError(f"there is no UNet in {folder}", where=str(folder), hint=f"give the folder of {wanted}")
    elif read_json(config, f"give the folder of {wanted}").get("_class_name") != "GraphUNet":
        found = "a UNet of diffusers"
        hint = "load it with diffusers' UNet2DConditionModel.from_pretrained, and call sdgraph.apply"
    else:
        return
    if exported:
        hint = f"export its UNet: sdgraph export {folder} --out DIRECTORY"
    raise SavedError(f"{folder} is {found}, not {wanted}", where=str(folder), hint=hint)


def read_config(path: Path, hint: str) -> dict[str, Any]:
    """Return a UNet's configuration, whose known fields have the types and sizes of `Config`.

    Args:
        path: the file `config.json`.
        hint: the advice of the error.
    Raises:
        SavedError: the file cannot be read, or a field has another type or size.
    """
    plain = read_json(path, hint)
    as_kind(plain, Config, path, hint)
    return plain


def as_kind(plain: Mapping[str, Any], kind: type[Kind], path: Path, hint: str) -> Kind:
    """Convert JSON data to an instance of a schema.

    Args:
        plain: the JSON object.
        kind: the schema.
        path: the file of the data, for the error.
        hint: the advice of the error.
    Raises:
        SavedError: the data does not fit the schema; the message names the field and the reason.
    """
    try:
        return msgspec.convert(plain, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        reason, _, place = str(error).partition(" - at ")
        field = place.rpartition("`$")[2].strip("`.")
        if " matching regex" in reason:  # a regular expression says little to a reader
            reason = "a name of another form, which may lead out of the folder" if "/" in reason else "not a SHA-256"
        where = f"{path}, field {field}" if field else str(path)
        what = f"{path.name} is damaged: {field or 'it'}: {reason[0].lower()}{reason[1:]}"
        raise SavedError(what, where=where, hint=hint) from error


class _Formatted(msgspec.Struct):
    format: Format


def check_format(plain: Mapping[str, Any], newest: int, path: Path, hint: str) -> None:
    """Refuse a file that a newer sdgraph wrote, before any other field is read.

    Args:
        plain: the JSON object.
        newest: the newest format that can be read.
        path: the file of the data, for the error.
        hint: the advice of the error.
    Raises:
        SavedError: the format is newer; the message names both.
    """
    found = as_kind(plain, _Formatted, path, hint).format
    if found > newest:
        raise SavedError(
            f"{path.name} has format {found}, this sdgraph reads up to {newest}",
            where=f"{path}, field format",
            hint=f"upgrade sdgraph; it was written by {str(plain.get('version', 'an unknown version'))[:20]}",
        )


def require_inside(path: Path, hint: str) -> None:
    """Refuse a file that is a link out of its folder.

    Args:
        path: the file.
        hint: the advice of the error.
    Raises:
        SavedError: the file is such a link.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise SavedError(
            f"{path.name} is a link out of its folder",
            where=str(path),
            hint=f"copy the files themselves (cp -rL; local_dir= when they come from the hub), or {hint}",
        )
