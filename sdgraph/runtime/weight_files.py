"""The weights of a saved UNet: safetensors, in shards with an index where they are too large for one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
import torch
from diffusers.utils import _add_variant
from huggingface_hub import split_torch_state_dict_into_shards

from ..errors import SavedError
from ..graph import Graph
from ..untrusted import FileName, as_kind, read_json
from .recipe import AGAIN


class Index(msgspec.Struct, frozen=True):
    """The index of shards, as diffusers writes it: the file of each tensor."""

    weight_map: dict[str, FileName]


def write_weights(
    tensors: Mapping[str, torch.Tensor], folder: Path, name: str, max_shard_size: int | str
) -> tuple[str, list[str]]:
    """Write weights, with files named as in diffusers.

    Args:
        tensors: parameters and buffers by name.
        folder: where to write.
        name: name of the file, if there is only one.
        max_shard_size: largest size of a file.
    Returns:
        the file to begin reading at, and all files.
    Raises:
        SavedError: `max_shard_size` is no size.
    """
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    stored = _untied({n: tensor.detach().contiguous() for n, tensor in tensors.items()})
    try:
        split = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=max_shard_size)
    except (ValueError, TypeError) as error:
        raise SavedError(str(error), where="max_shard_size", hint='write a number of bytes, or as in "5GB"') from error
    for file, names in split.filename_to_tensors.items():
        safetensors.torch.save_file({n: stored[n] for n in names}, folder / file, metadata={"format": "pt"})
    if not split.is_sharded:
        return name, [name]
    base, *variant = name.removesuffix(".safetensors").split(".")
    index = _add_variant(f"{base}.safetensors.index.json", variant[0] if variant else None)
    contents = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / index).write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
    return index, [index, *split.filename_to_tensors]


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory with an earlier one, which safetensors refuses to write."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def read_weights(path: Path, known: Mapping[str, str], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved UNet, by their names in its graph.

    Args:
        path: the file of weights, or the index of its shards.
        known: SHA-256 of the files of the folder, by name.
        names: the file's name of a tensor of the graph, where it is another.
    Raises:
        SavedError: the files are damaged, or the index names others.
    """
    shards = [path]
    if path.suffix == ".json":
        index = as_kind(read_json(path, AGAIN), Index, path, AGAIN)
        shards = [path.parent / file for file in sorted(set(index.weight_map.values()))]
        for shard in shards:
            if shard.name not in known or shard.parent != path.parent:
                raise SavedError("the index names a file without a checksum", where=str(shard), hint=AGAIN)
    ours = {theirs: name for name, theirs in names.items()}
    try:
        # Cloned, because kernels round differently on tensors that are not aligned as PyTorch allocates them.
        found = {n: tensor.clone() for shard in shards for n, tensor in safetensors.torch.load_file(shard).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise SavedError(f"cannot read the weights: {error}", where=str(path), hint=AGAIN) from error
    missing = sorted(ours.keys() - found.keys())
    if missing:
        raise SavedError(f"the weights do not fit the recipe, first at {missing[0]!r}", where=str(path), hint=AGAIN)
    return {ours.get(name, name): tensor for name, tensor in found.items()}


def load_weights(graph: Graph, path: Path, known: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Give a graph the weights of a file.

    Args:
        graph: without weights, on the meta device.
        path: see `read_weights`.
        known: see `read_weights`.
        names: see `read_weights`.
    Raises:
        SavedError: the files are damaged, or hold other tensors than the graph needs.
    """
    put_weights(graph, read_weights(path, known, names), path)


def put_weights(graph: Graph, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Give a graph its weights.

    Args:
        graph: without weights, on the meta device.
        tensors: the tensors by their names in the graph.
        path: their file, for errors.
    Raises:
        SavedError: they are other tensors than the graph needs.
    """
    wanted = {**dict(graph.weights.named_buffers()), **graph.weights.state_dict()}
    for name in wanted.keys() - tensors.keys():
        twin = next((k for k, v in wanted.items() if v is wanted[name] and k in tensors), None)
        if twin is not None:
            tensors[name] = tensors[twin]
    wrong = sorted(wanted.keys() ^ tensors.keys()) or [n for n in wanted if wanted[n].shape != tensors[n].shape]
    if wrong:
        raise SavedError(f"the weights do not fit the graph, first at {wrong[0]!r}", where=str(path), hint=AGAIN)
    kept = graph.weights.state_dict().keys()
    graph.weights.load_state_dict({name: tensors[name] for name in kept}, assign=True)
    for name in tensors.keys() - kept:  # buffers that no state_dict holds
        holder, _, leaf = name.rpartition(".")
        graph.weights.get_submodule(holder)._buffers[leaf] = tensors[name]
    graph.device = torch.device("cpu")
