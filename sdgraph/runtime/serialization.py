"""A GraphUNet on disk: `config.json`, the weights (safetensors) and `sdgraph.json`, the recipe. No pickle."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import diffusers
import msgspec
import safetensors
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, _add_variant
from huggingface_hub import split_torch_state_dict_into_shards

from ..atomic import appearing, sha256
from ..compiler.parse import parse
from ..compiler.runner import replay
from ..errors import DecisionError, ModeError, SavedError
from ..frontend.capture import capture
from ..frontend.source import make_settings, settings_of
from ..graph import Graph
from ..ir.decisions import Applied, Decision
from ..ir.structure import alike, structure
from ..untrusted import Digest, FileName, Format, as_kind, check_format, read_config, read_json, require_inside
from ..version import __version__

FORMAT = 2  # 1: without decisions, shards and settings
RECIPE, CONFIG = "sdgraph.json", "config.json"
AGAIN = "save the UNet again"
CURES = {
    "push_to_hub": "save it, then unet.push_to_hub(repository)",
    "quantization_config": "quantize the source UNet's exported form; a graph computes in one floating dtype",
}
# Options of diffusers about downloads, about files that are not safetensors, and about memory while loading.
HARMLESS = (
    "cache_dir",
    "disable_mmap",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "revision",
    "token",
    "use_safetensors",
    "user_agent",
)
log = logging.getLogger("sdgraph")


class Entry(msgspec.Struct, frozen=True, rename={"text": "pass"}):
    """A pass that decided something by the numbers of weights: its text, and what it decided about what."""

    text: str
    decisions: tuple[tuple[str, Any], ...]


class Settings(TypedDict, total=False):
    """What sets a source UNet apart from others of its configuration.

    Keys:
        processors: class names of the attention processors, by module path.
        freeu: its four scales, by module path.
    """

    processors: dict[str, str]
    freeu: dict[str, Annotated[list[float], msgspec.Meta(min_length=4, max_length=4)]]


class Index(msgspec.Struct, frozen=True):
    """The index of shards, as diffusers writes it: the file of each tensor."""

    weight_map: dict[str, FileName]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`sdgraph.json` of a saved UNet: how its graph comes from its configuration, and what else is in the folder.

    A field that is added needs a default, so that folders saved before still load; if a reader that does not know it
    would go wrong, `FORMAT` is raised too.

    Args:
        format: of this description.
        sdgraph, torch, diffusers: versions that wrote it.
        passes: in order, as text; with their decisions, if they made any.
        inputs: optional inputs that the UNet was traced with.
        dtype: of the weights.
        structure: of the graph, see `sdgraph.ir.structure`; loading must come to the same.
        files: SHA-256 of each other file, by name.
        weights: name of the file of weights, or of the index of its shards.
        settings: what was set on the source UNet beside its configuration, see `sdgraph.frontend.source`.
    """

    format: Format
    sdgraph: str
    torch: str
    diffusers: str
    passes: tuple[str | Entry, ...]
    inputs: tuple[str, ...]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    structure: Digest
    files: dict[FileName, Digest]
    weights: FileName
    settings: Settings = {}


def save(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    variant: str | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str = "10GB",
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """Write a folder that `load` reads; the folder appears whole or not at all.

    Args:
        graph: of the UNet.
        tensors: its parameters and buffers by name.
        config: its configuration, as the module has it.
        variant: part of the file name of the weights, as in diffusers.
        safe_serialization: the weights are safetensors also without it, which the log says.
        max_shard_size: of a file of weights; larger ones are split, as in diffusers.
        is_main_process: other processes write nothing.
        options: what diffusers' pipelines pass along; only defaults are accepted.
    Raises:
        ModeError: the graph cannot be rebuilt from its configuration and recipe.
        SavedError: the folder holds files that are not ours, or cannot be written.
    """
    _only_defaults(options, "save_pretrained")
    if not is_main_process:
        return
    if not safe_serialization:
        log.warning("a GraphUNet is saved as safetensors: safe_serialization=False, which would pickle it, is ignored")
    traced = {k: v for k, v in graph.config.items() if not k.startswith("_")}
    inputs = [i.name for i in graph.inputs if i.name == "encoder_attention_mask"]
    settings = settings_of(graph.source)
    _warn_of_scripts(graph.passes)
    _check_can_come_back(graph, traced, inputs, settings)
    name = f"diffusion_pytorch_model.{variant + '.' if variant else ''}safetensors"
    with appearing(directory, _check_target, SavedError) as folder:
        held = {k: v.detach().contiguous() for k, v in tensors.items()}
        name, files = _write_weights(_untied(held), folder, name, max_shard_size)
        plain = {k: v for k, v in config.items() if not k.startswith("_")} | traced
        plain |= {"_class_name": "GraphUNet", "_diffusers_version": diffusers.__version__}
        (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
        recipe = Recipe(
            format=FORMAT if settings or len(files) > 1 or any(a.decisions for a in graph.passes) else 1,
            sdgraph=__version__,
            torch=str(torch.__version__),
            diffusers=diffusers.__version__,
            passes=tuple(map(_entry, graph.passes)),
            inputs=tuple(inputs),
            dtype=str(next(iter(graph.parameters().values())).dtype).removeprefix("torch."),  # type: ignore[arg-type]
            structure=structure(graph),
            files={f: sha256(folder / f) for f in (CONFIG, *files)},
            weights=name,
            settings=Settings(**settings),  # type: ignore[typeddict-item]
        )
        (folder / RECIPE).write_text(json.dumps(msgspec.to_builtins(recipe), indent=2) + "\n")


def _write_weights(
    tensors: dict[str, torch.Tensor], folder: Path, name: str, max_shard_size: int | str
) -> tuple[str, list[str]]:
    """Safetensors, in shards with an index where they are too large for one file, named as in diffusers.

    Returns:
        the file to begin reading at, and all files.
    """
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        safetensors.torch.save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
    if not split.is_sharded:
        return name, [name]
    index = _add_variant(SAFE_WEIGHTS_INDEX_NAME, name.split(".")[1] if name.count(".") > 1 else None)
    found = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / index).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return index, [index, *split.filename_to_tensors]


def _warn_of_scripts(passes: Sequence[Applied]) -> None:
    for name in sorted({type(s).__name__ for a in passes for s in a.one.specs() if type(s).__module__ == "__main__"}):
        warnings.warn(
            f"{name} is defined in the script that runs (__main__), so only that script can load what is saved here: "
            f"move it to a module, and import that before loading",
            stacklevel=4,
        )


def _check_can_come_back(graph: Graph, config: dict[str, Any], inputs: list[str], settings: Mapping[str, Any]) -> None:
    try:
        # the text of the passes, for that is what is saved
        passes = _passes([_entry(applied) for applied in graph.passes])
        same = alike(_rebuild(config, passes, inputs, graph.dtype, settings), graph)
        reason: Exception | None = None
    except DecisionError as error:
        raise ModeError(
            f"it could not be loaded again, which runs the passes on the shapes of weights alone; {error.what}",
            where=error.where,
            hint=error.hint,
        ) from error
    except Exception as error:
        same, reason = False, error
    if not same:
        raise ModeError(
            f"the graph cannot be rebuilt from its configuration and passes{f': {reason}' if reason else ''}",
            where="save_pretrained",
            hint="IP-Adapter layers, custom attention processors and edits outside of passes are not part of a recipe: "
            "save the source UNet and the adapter, and apply again after loading",
        ) from reason


def load(
    directory: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    **options: Any,
) -> tuple[Graph, dict[str, Any]]:
    """Read a folder that `save` wrote.

    Args:
        variant: that the weights must have been saved as.
    Returns:
        the graph with its weights, and what the configuration says beside that of the graph, such as the state of a
        moving average.
    Raises:
        SavedError: what is missing, damaged, unsafe or from a newer version; nothing of it has been run.
    """
    for harmless in HARMLESS:
        options.pop(harmless, None)
    _only_defaults(options, "from_pretrained")
    folder = Path(directory) / (subfolder or "")
    if not folder.is_dir():
        raise SavedError(f"no folder {str(folder)!r}", where="from_pretrained", hint="pass a folder of save_pretrained")
    recipe = _read_recipe(folder)
    if variant is not None and f".{variant}." not in recipe.weights:
        raise SavedError(
            f"there is no variant {variant!r}, only {recipe.weights}", where=str(folder), hint="leave variant out"
        )
    for file, digest in recipe.files.items():
        if sha256(folder / file) != digest:
            raise SavedError("the file is not the one that was saved", where=str(folder / file), hint=AGAIN)
    config = read_config(folder / CONFIG, AGAIN)
    try:
        graph = _rebuild(config, _passes(recipe.passes), recipe.inputs, getattr(torch, recipe.dtype), recipe.settings)
    except Exception as error:
        names = ", ".join(entry if isinstance(entry, str) else entry.text for entry in recipe.passes)
        passes = f"install the packages of these passes, or import their modules first: {names}; or " if names else ""
        raise SavedError(
            f"the configuration and passes do not give a graph: {str(error)[:1000]}",
            where=str(folder / RECIPE),
            hint=f"{passes}{AGAIN}",
        ) from error
    if structure(graph) != recipe.structure:
        raise SavedError(
            f"the recipe gives another graph here than with sdgraph {recipe.sdgraph}, diffusers "
            f"{recipe.diffusers}, torch {recipe.torch}",
            where=str(folder / RECIPE),
            hint="use those versions, or apply the passes again to the source UNet",
        )
    _load_weights(graph, folder / recipe.weights, recipe.files)
    beside = {k: v for k, v in config.items() if not k.startswith("_") and k not in graph.config}
    return graph, beside


def plain_passes(passes: Iterable[Applied]) -> list[Any]:
    """Passes and their decisions as plain data."""
    return [msgspec.to_builtins(_entry(applied)) for applied in passes]


def read_passes(plain: Any) -> list[Applied]:
    """What `plain_passes` gave."""
    return _passes(msgspec.convert(plain, tuple[str | Entry, ...]))


def _entry(applied: Applied) -> str | Entry:
    decisions = tuple((decision.about, decision.value) for decision in applied.decisions)
    return Entry(str(applied), decisions) if decisions else str(applied)


def _passes(entries: Sequence[str | Entry]) -> list[Applied]:
    """What `_entry` wrote."""
    found = []
    for entry in entries:
        (one,) = parse(entry if isinstance(entry, str) else entry.text)
        decisions = () if isinstance(entry, str) else entry.decisions
        found.append(Applied(one, tuple(Decision(about, value) for about, value in decisions)))
    return found


def _rebuild(
    config: Mapping[str, Any],
    passes: Sequence[Applied],
    inputs: Sequence[str],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> Graph:
    """The graph of a configuration with settings and passes replayed, on the meta device."""
    with torch.device("meta"):
        known = UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        plain = {k: v for k, v in config.items() if k in known} | {"_class_name": "UNet2DConditionModel"}
        unet = torch.nn.Module.to(UNet2DConditionModel.from_config(plain), dtype)
        make_settings(unet, settings)
    return replay(passes, capture(unet, tuple(inputs)))


def _load_weights(graph: Graph, path: Path, known: Mapping[str, str]) -> None:
    shards = [path]
    if path.suffix == ".json":
        index = as_kind(read_json(path, AGAIN), Index, path, AGAIN)
        shards = [path.parent / file for file in sorted(set(index.weight_map.values()))]
        for shard in shards:
            if shard.name not in known or shard.parent != path.parent:
                raise SavedError("the index names a file without a checksum", where=str(shard), hint=AGAIN)
    try:
        # Cloned, because kernels round differently on tensors that are not aligned as PyTorch allocates them.
        tensors = {n: tensor.clone() for shard in shards for n, tensor in safetensors.torch.load_file(shard).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise SavedError(f"cannot read the weights: {error}", where=str(path), hint=AGAIN) from error
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


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory; tied ones are stored as copies."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _read_recipe(folder: Path) -> Recipe:
    path = folder / RECIPE
    plain = read_json(path, "pass a folder of save_pretrained")
    if "models" in plain and "passes" not in plain:
        raise SavedError(
            "this is an exported directory, not a saved UNet",
            where=str(folder),
            hint="export or load the UNet that it was made of; this one is run by sdgraph.exporters.ort.ORTUNet, and "
            "`sdgraph inspect` says what it holds",
        )
    check_format(plain, FORMAT, path, AGAIN)
    recipe = as_kind(plain, Recipe, path, AGAIN)
    for file in (recipe.weights, CONFIG):
        if file not in recipe.files:
            raise SavedError(f"the recipe has no checksum of {file!r}", where=f"{path}, field files", hint=AGAIN)
    for file in recipe.files:
        require_inside(folder / file, AGAIN)
        if not (folder / file).is_file():
            raise SavedError("the file is missing", where=str(folder / file), hint=AGAIN)
    return recipe


def _check_target(target: Path) -> None:
    if target.exists():
        foreign = [p.name for p in target.iterdir()] if target.is_dir() else [target.name]
        foreign = [n for n in foreign if n not in (RECIPE, CONFIG) and not n.startswith("diffusion_pytorch_model.")]
        if foreign:
            raise SavedError(
                f"the folder holds other files: {', '.join(foreign[:3])}", where=str(target), hint="choose another"
            )


def _only_defaults(options: dict[str, Any], call: str) -> None:
    for name, value in options.items():
        if value not in (None, False):
            raise SavedError(
                f"{call} does not support {name}={value!r}", where=call, hint=CURES.get(name, "leave it out")
            )
