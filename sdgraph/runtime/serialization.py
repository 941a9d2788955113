"""A GraphUNet on disk: `config.json`, the weights (safetensors) and `sdgraph.json`, the recipe. No pickle."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..atomic import appearing, sha256
from ..compiler.runner import replay
from ..errors import DecisionError, ModeError, SavedError
from ..frontend.capture import capture
from ..frontend.source import make_settings, settings_of
from ..graph import Graph
from ..ir.decisions import Applied
from ..ir.verify import alike, structure
from ..untrusted import Config, as_kind, read_config, require_folder
from ..version import __version__
from .diffusers_api import UPLOAD
from .recipe import (
    AGAIN,
    CALLS,
    CONFIG,
    FOLDED,
    FORMAT,
    PASSES,
    RECIPE,
    SWITCH,
    GraphRecipe,
    Recipe,
    Settings,
    entry,
    passes_of,
    read_recipe,
)
from .to_diffusers import counterpart
from .weight_files import load_weights, write_weights

HINTS = {
    "push_to_hub": UPLOAD,
    "quantization_config": "quantize the source UNet's exported form; a graph computes in one floating dtype",
}
# Names of the file of weights. Where no plain model computes the same, plain diffusers must not find the weights: it
# would leave out what it does not know, in silence.
OURS, THEIRS = "sdgraph", "diffusion_pytorch_model"
WEIGHTS = re.compile(rf"({OURS}|{THEIRS})([.-][\w.-]+)?\.safetensors(\.index[\w.-]*\.json)?")
README = "README.md"
NOT_PLAIN = """\
This UNet was changed by sdgraph, and no `UNet2DConditionModel` of diffusers computes the same. So diffusers alone
cannot load it. Load it with sdgraph:

    import sdgraph

    pipe.unet = sdgraph.GraphUNet.from_pretrained("path/to/this/folder")

If a whole pipeline was saved, its `from_pretrained` loads this UNet too, after `import sdgraph`.
"""
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
# What graphs were seen to come back from, and the plain model of each, or why there is none: a training saves one graph
# many times.
_rebuilt: deque[object] = deque(maxlen=8)
_found: deque[tuple[object, tuple[dict[str, Any], dict[str, str]] | str]] = deque(maxlen=8)


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
    """Write a folder that `load` reads. The folder appears only when it is complete.

    Args:
        graph: the graph of the UNet.
        tensors: its parameters and buffers by name.
        config: its configuration, as the module has it.
        directory: the folder to write. An earlier saved UNet there is replaced.
        variant: part of the file name of the weights, as in diffusers.
        safe_serialization: the weights are written as safetensors even if this is False; then the log says so.
        max_shard_size: largest size of a file of weights; larger ones are split, as in diffusers.
        is_main_process: if False, nothing is written.
        options: what diffusers' pipelines pass along; only defaults are accepted.
    Raises:
        ModeError: the graph cannot be rebuilt from its configuration and recipe.
        SavedError: the folder holds files that are not ours, or cannot be written.
    """
    only_defaults(options, "save_pretrained")
    if not is_main_process:
        return
    if not safe_serialization:
        log.warning("a GraphUNet is saved as safetensors: safe_serialization=False, which would pickle it, is ignored")
    made = graph_recipe(graph)
    traced = made.source
    written = {k: v for k, v in config.items() if not k.startswith("_")} | traced
    plain = _plain(graph, tensors)
    source: dict[str, Any] = {}
    names: dict[str, str] = {}
    if plain is None:
        kind, base = "GraphUNet", OURS
    else:
        kind, base, names = "UNet2DConditionModel", THEIRS, plain[1]
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        written = {k: v for k, v in written.items() if k not in traced and k != PASSES} | plain[0]
        as_written, source = (json.loads(json.dumps(each, default=str)) for each in (plain[0], traced))
        if source == as_written:
            source = {}
    written |= {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    name = f"{base}.{variant + '.' if variant else ''}safetensors"
    with appearing(directory, check_target, SavedError) as folder:
        name, files = write_weights(tensors, folder, name, max_shard_size)
        (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True, default=str) + "\n")
        if plain is None:
            (folder / README).write_text(NOT_PLAIN)
        recipe = Recipe(
            **msgspec.structs.asdict(made) | {"source": source},
            format=FORMAT,
            files={f: sha256(folder / f) for f in (CONFIG, *files)},
            weights=name,
            names={name: theirs for name, theirs in names.items() if theirs != name},
        )
        (folder / RECIPE).write_text(json.dumps(msgspec.to_builtins(recipe), indent=2) + "\n")


def graph_recipe(graph: Graph) -> GraphRecipe:
    """Return the recipe of a graph, which a UNet of its configuration on the meta device is rebuilt from.

    Args:
        graph: the graph of a UNet.
    Raises:
        ModeError: the graph cannot be rebuilt from its configuration and passes.
    """
    traced, inputs, settings = _traced(graph)
    _warn_of_scripts(graph.passes)
    check_savable(graph)
    return GraphRecipe(
        sdgraph=__version__,
        torch=str(torch.__version__),
        diffusers=diffusers.__version__,
        passes=tuple(map(entry, graph.passes)),
        inputs=tuple(inputs),
        dtype=str(next(iter(graph.parameters().values())).dtype).removeprefix("torch."),  # type: ignore[arg-type]
        structure=structure(graph),
        settings=Settings(**settings),  # type: ignore[typeddict-item]
        source=traced,
    )


def _plain(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Return the configuration of the plain model that computes the same, and its name of each tensor.

    Returns:
        None if there is no such model, or if its tensors are not the graph's one by one.
    """
    made_of = _made_of(graph)
    found = next((found for each, found in _found if each == made_of), None)
    if found is None:
        try:
            found = copy.deepcopy(counterpart(graph))
        except ModeError as reason:
            found = reason.what
        _found.append((made_of, found))
    if isinstance(found, str):
        log.debug("plain diffusers cannot load what is saved: %s", found)
        return None
    config, names = copy.deepcopy(found)
    theirs = {ours: name for name, ours in names.items()}
    if theirs.keys() != tensors.keys() or len(theirs) != len(names):
        return None
    return {k: v for k, v in config.items() if not k.startswith("_")}, theirs


def _warn_of_scripts(passes: Sequence[Applied]) -> None:
    for name in sorted({type(s).__name__ for a in passes for s in a.one.specs() if type(s).__module__ == "__main__"}):
        warnings.warn(
            f"{name} is defined in the script that runs (__main__), so only that script can load what is saved here: "
            f"move it to a module, and import that before loading",
            stacklevel=6,
        )


def _traced(graph: Graph) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
    """Return what a graph was traced from: the configuration, the inputs that were asked for, and settings."""
    config = {k: v for k, v in graph.config.items() if not k.startswith("_")}
    return config, [i.name for i in graph.inputs if i.name == "encoder_attention_mask"], settings_of(graph.source)


def _made_of(graph: Graph) -> object:
    """Return all of a graph but its numbers. It is equal for graphs that are saved in the same way."""
    config, inputs, settings = _traced(graph)
    recipe = copy.deepcopy(config), inputs, settings, [entry(applied) for applied in graph.passes], graph.dtype
    functions = [node.target for node in graph.fx.nodes if node.op == "call_function"]  # `structure` has their names
    return recipe, structure(graph), graph.details(), functions, list(graph.parameters())


def check_savable(graph: Graph) -> None:
    """Refuse a graph that would not come back from its configuration and passes. Graphs that are alike are tried once.

    Args:
        graph: the graph of a UNet, which is traced again on the meta device.
    Raises:
        ModeError: the configuration and passes give no graph or another one, or the graph has LoRA layers.
    """
    graph.check_unaltered()
    config, inputs, settings = _traced(graph)
    made_of = _made_of(graph)
    if made_of in _rebuilt:
        return
    where, reason, cause = "save_pretrained", "", None  # type: str, str, Exception | None
    try:
        # by the text of the passes, because that is what is saved
        passes = passes_of([entry(applied) for applied in graph.passes])
        again = _rebuild(config, passes, inputs, graph.dtype, settings)
    except DecisionError as error:
        raise ModeError(
            f"it could not be loaded again, which runs the passes on the shapes of weights alone; {error.what}",
            where=error.where,
            hint=error.hint,
        ) from error
    except Exception as error:
        reason, cause = f": {error}", error
    else:
        if alike(again, graph):
            _rebuilt.append(made_of)
            return
        ours, theirs = graph.kinds(), again.kinds()
        changed = next((path for path in {**theirs, **ours} if ours.get(path) != theirs.get(path)), None)
        if changed is not None and structure(again) == structure(graph):
            where, reason = changed, ", which differ from what the UNet has here"
    raise ModeError(
        f"the graph cannot be rebuilt from its configuration and passes{reason}",
        where=where,
        hint="IP-Adapter layers, custom attention processors, exchanged modules and edits outside of passes are in no "
        "recipe: save the source UNet and the adapter, and apply again after loading",
    ) from cause


def load(
    directory: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    **options: Any,
) -> tuple[Graph, dict[str, Any]]:
    """Read a folder that `save` wrote.

    Args:
        directory: the folder, or the one that holds `subfolder`.
        subfolder: name of the folder in `directory`.
        variant: the variant that the weights must have been saved as.
        options: diffusers' further options; only those that change nothing here are accepted.
    Returns:
        the graph with its weights, and the entries of the configuration that are not the graph's, such as the state of
        a moving average.
    Raises:
        SavedError: something is missing, damaged, unsafe or from a newer version; nothing of it has been run.
    """
    for harmless in HARMLESS:
        options.pop(harmless, None)
    only_defaults(options, "from_pretrained")
    folder = Path(directory) / (subfolder or "")
    require_folder(folder, exported=False)
    recipe = read_recipe(folder)
    if variant is not None and f".{variant}." not in recipe.weights:
        raise SavedError(
            f"there is no variant {variant!r}, only {recipe.weights}", where=str(folder), hint="leave variant out"
        )
    for file, digest in recipe.files.items():
        if sha256(folder / file) != digest:
            raise SavedError("the file is not the one that was saved", where=str(folder / file), hint=AGAIN)
    config = read_config(folder / CONFIG, AGAIN)
    graph = rebuilt(recipe, config, folder / RECIPE)
    load_weights(graph, folder / recipe.weights, recipe.files, recipe.names)
    few_steps = {name: config[name] for name in (FOLDED, CALLS) if name in config}
    graph.config = {**graph.config, "_name_or_path": str(folder), **few_steps}  # diffusers notes the folder as well
    return graph, {k: v for k, v in config.items() if not k.startswith("_") and k not in graph.config}


def rebuilt(recipe: GraphRecipe, config: Mapping[str, Any], path: Path) -> Graph:
    """Return the graph of a recipe, without weights.

    Args:
        recipe: the recipe.
        config: the configuration that holds if the recipe has none.
        path: the file of the recipe, for errors.
    Raises:
        SavedError: the recipe gives no graph, or another one than when it was written.
    """
    as_kind(recipe.source, Config, path, AGAIN)
    try:
        passes = passes_of(recipe.passes)
        graph = _rebuild(recipe.source or config, passes, recipe.inputs, getattr(torch, recipe.dtype), recipe.settings)
    except Exception as error:
        names = ", ".join(listed if isinstance(listed, str) else listed.text for listed in recipe.passes)
        install = f"install the packages of these passes, or import their modules first: {names}; or " if names else ""
        raise SavedError(
            f"the configuration and passes do not give a graph: {str(error)[:1000]}",
            where=str(path),
            hint=f"{install}{AGAIN}",
        ) from error
    if structure(graph) != recipe.structure:
        raise SavedError(
            f"the recipe gives another graph here than with sdgraph {recipe.sdgraph}, diffusers "
            f"{recipe.diffusers}, torch {recipe.torch}",
            where=str(path),
            hint="use those versions, or apply the passes again to the source UNet",
        )
    return graph


def _rebuild(
    config: Mapping[str, Any],
    passes: Sequence[Applied],
    inputs: Sequence[str],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> Graph:
    """Trace a UNet of the configuration with the settings, and replay the passes, on the meta device."""
    with torch.device("meta"):
        known = UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        plain = {k: v for k, v in config.items() if k in known} | {"_class_name": "UNet2DConditionModel"}
        unet = torch.nn.Module.to(UNet2DConditionModel.from_config(plain), dtype)
        make_settings(unet, settings)
    return replay(passes, capture(unet, tuple(inputs)))


def check_target(target: Path) -> None:
    """Refuse a folder to write that holds something else than a saved UNet or switch.

    Args:
        target: the folder, which need not exist.
    Raises:
        SavedError: it holds other files.
    """
    if target.exists():
        foreign = [p.name for p in target.iterdir()] if target.is_dir() else [target.name]
        foreign = [n for n in foreign if n not in (RECIPE, CONFIG, SWITCH) and not WEIGHTS.fullmatch(n)]
        if README in foreign and (target / README).read_bytes() == NOT_PLAIN.encode():
            foreign.remove(README)
        if foreign:
            raise SavedError(
                f"the folder holds other files: {', '.join(foreign[:3])}", where=str(target), hint="choose another"
            )
        if (target / CONFIG).exists() and not any((target / name).exists() for name in (RECIPE, SWITCH)):
            raise SavedError(
                "the folder holds a model that sdgraph has not saved, such as the one that this UNet comes from",
                where=str(target),
                hint="choose another, or remove it yourself",
            )


def only_defaults(options: dict[str, Any], call: str) -> None:
    """Refuse options of diffusers that would change something.

    Args:
        options: the options by name.
        call: the method that they were passed to.
    Raises:
        SavedError: an option has another value than its default.
    """
    for name, value in options.items():
        if value not in (None, False):
            raise SavedError(
                f"{call} does not support {name}={value!r}", where=call, hint=HINTS.get(name, "leave it out")
            )


def one_device(unet: nn.Module, device_map: Any, max_memory: Any) -> Any:
    """Return the device that a device map puts the whole UNet on.

    Raises:
        SavedError: the map puts it on several devices.
    """
    if not isinstance(device_map, dict):
        if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
            return device_map
        from accelerate import infer_auto_device_map

        device_map = infer_auto_device_map(unet, max_memory=max_memory)
    devices = list(dict.fromkeys(map(str, device_map.values())))
    if len(devices) != 1 or devices == ["disk"]:
        raise SavedError(
            f"the device map puts the UNet on {', '.join(devices)}, and a graph runs on one device",
            where="from_pretrained",
            hint="name one device, or offload the loaded pipeline (pipe.enable_model_cpu_offload())",
        )
    return next(iter(device_map.values()))
