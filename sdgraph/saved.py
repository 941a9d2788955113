"""A GraphUNet on disk: `config.json`, the weights (safetensors) and `sdgraph.json`, the recipe. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import safetensors
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import fx

from .capture import capture
from .decisions import Applied, Decision
from .errors import DecisionError, ModeError, SavedError
from .files import appearing, sha256
from .graph import Graph
from .report import Report
from .runner import replay
from .spec import parse

if TYPE_CHECKING:
    from .unet import GraphUNet

FORMAT = 2  # 1: without decisions
RECIPE, CONFIG = "sdgraph.json", "config.json"


def save(unet: GraphUNet, directory: str | os.PathLike[str], *, variant: str | None = None, **options: Any) -> None:
    """Write a folder that `load` reads; the folder appears whole or not at all.

    Args:
        variant: part of the file name of the weights, as in diffusers.
        options: what diffusers' pipelines pass along; only defaults are accepted.
    Raises:
        ModeError: the graph cannot be rebuilt from its configuration and recipe.
        SavedError: the folder holds files that are not ours, or cannot be written.
    """
    _only_defaults(options, "save_pretrained")
    graph = unet.graph
    config = {k: v for k, v in graph.config.items() if not k.startswith("_")}
    inputs = [i.name for i in graph.inputs if i.name == "encoder_attention_mask"]
    _warn_of_scripts(graph.passes)
    _check_can_come_back(graph, config, inputs)
    name = f"diffusion_pytorch_model.{variant + '.' if variant else ''}safetensors"
    with appearing(directory, _check_target, SavedError) as folder:
        tensors = {k: v.detach().contiguous() for k, v in unet.state_dict().items()}
        safetensors.torch.save_file(_untied(tensors), folder / name, metadata={"format": "pt"})
        plain = dict(config) | {"_class_name": "GraphUNet", "_diffusers_version": diffusers.__version__}
        (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
        recipe = {
            "format": FORMAT if any(applied.decisions for applied in graph.passes) else 1,
            "sdgraph": _version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "passes": [_entry(applied) for applied in graph.passes],
            "inputs": inputs,
            "dtype": str(next(unet.parameters()).dtype).removeprefix("torch."),
            "structure": structure(graph),
            "files": {f: sha256(folder / f) for f in (CONFIG, name)},
            "weights": name,
        }
        (folder / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")


def _warn_of_scripts(passes: Sequence[Applied]) -> None:
    for name in sorted({type(s).__name__ for a in passes for s in a.one.specs() if type(s).__module__ == "__main__"}):
        warnings.warn(
            f"{name} is defined in the script that runs (__main__), so only that script can load what is saved here: "
            f"move it to a module, and import that before loading",
            stacklevel=4,
        )


def _check_can_come_back(graph: Graph, config: dict[str, Any], inputs: list[str]) -> None:
    try:
        # the text of the passes, for that is what is saved
        passes = _passes([_entry(applied) for applied in graph.passes])
        same = structure(_rebuild(config, passes, inputs, graph.dtype)) == structure(graph)
        reason: Exception | None = None
    except DecisionError as error:
        raise ModeError(
            f"it could not be loaded again, which runs the passes on the shapes of weights alone; {error.what}",
            where=error.where,
            cure=error.cure,
        ) from error
    except Exception as error:
        same, reason = False, error
    if not same:
        raise ModeError(
            f"the graph cannot be rebuilt from its configuration and passes{f': {reason}' if reason else ''}",
            where="save_pretrained",
            cure="IP-Adapter layers, custom attention processors and edits outside of passes are not part of a recipe: "
            "save the source UNet and the adapter, and apply again after loading",
        ) from reason


def load(
    directory: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> GraphUNet:
    """Read a folder that `save` wrote.

    Raises:
        SavedError: what is missing, damaged, unsafe or from a newer version; nothing of it has been run.
    """
    from .unet import GraphUNet

    dtype = options.pop("dtype", None) or torch_dtype
    for harmless in ("variant", "use_safetensors", "low_cpu_mem_usage", "local_files_only"):
        options.pop(harmless, None)
    _only_defaults(options, "from_pretrained")
    folder = Path(directory) / (subfolder or "")
    if not folder.is_dir():
        raise SavedError(f"no folder {str(folder)!r}", where="from_pretrained", cure="pass a folder of save_pretrained")
    recipe = _read_recipe(folder)
    for file, digest in recipe["files"].items():
        if sha256(folder / file) != digest:
            raise SavedError("the file is not the one that was saved", where=str(folder / file), cure="save again")
    config = _json(folder / CONFIG)
    saved_dtype = getattr(torch, recipe["dtype"], None)
    if not isinstance(saved_dtype, torch.dtype):
        raise SavedError(f"unknown dtype {recipe['dtype']!r}", where=str(folder / RECIPE), cure="save again")
    try:
        graph = _rebuild(config, _passes(recipe["passes"]), recipe["inputs"], saved_dtype)
    except Exception as error:
        raise SavedError(
            f"the configuration and passes do not give a graph: {error}",
            where=str(folder / RECIPE),
            cure="install the packages of the passes, or import their modules first",
        ) from error
    if structure(graph) != recipe["structure"]:
        raise SavedError(
            f"the recipe gives another graph here than with sdgraph {recipe['sdgraph']}, diffusers "
            f"{recipe['diffusers']}, torch {recipe['torch']}",
            where=str(folder / RECIPE),
            cure="use those versions, or apply the passes again to the source UNet",
        )
    _load_weights(graph, folder / recipe["weights"])
    unet = GraphUNet(graph, Report((), (f"loaded from {folder}",)))
    unet._own_weights = True
    return unet if dtype is None else torch.nn.Module.to(unet, dtype)


def structure(graph: Graph) -> str:
    """SHA-256 of the operations of a graph and how they are joined, whatever the nodes are called."""
    number: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for node in graph.fx.nodes:
        number[node] = len(number)
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        arguments = fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), lambda n: f"%{number[n]}")
        digest.update(f"{node.op} {target} {arguments}\n".encode())
    return digest.hexdigest()


def _entry(applied: Applied) -> str | dict[str, Any]:
    """A pass in a recipe: its text, with what it decided if it did."""
    decisions = [[decision.about, decision.value] for decision in applied.decisions]
    return {"pass": str(applied), "decisions": decisions} if decisions else str(applied)


def _passes(entries: list[str | dict[str, Any]]) -> list[Applied]:
    """What `_entry` wrote."""
    found = []
    for entry in entries:
        text, decisions = (entry, []) if isinstance(entry, str) else (entry["pass"], entry["decisions"])
        (one,) = parse(text)
        found.append(Applied(one, tuple(Decision(str(about), value) for about, value in decisions)))
    return found


def _rebuild(config: dict[str, Any], passes: Sequence[Applied], inputs: list[str], dtype: torch.dtype) -> Graph:
    """The graph of a configuration with passes replayed, on the meta device."""
    with torch.device("meta"):
        plain = dict(config) | {"_class_name": "UNet2DConditionModel"}
        unet = torch.nn.Module.to(UNet2DConditionModel.from_config(plain), dtype)
    return replay(passes, capture(unet, inputs))


def _load_weights(graph: Graph, path: Path) -> None:
    try:
        # Cloned, because kernels round differently on tensors that are not aligned as PyTorch allocates them.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise SavedError(f"cannot read the weights: {error}", where=str(path), cure="save again") from error
    wanted = graph.weights.state_dict()
    for name in wanted.keys() - tensors.keys():
        twin = next((k for k, v in wanted.items() if v is wanted[name] and k in tensors), None)
        if twin is not None:
            tensors[name] = tensors[twin]
    wrong = sorted(wanted.keys() ^ tensors.keys()) or [n for n in wanted if wanted[n].shape != tensors[n].shape]
    if wrong:
        raise SavedError(f"the weights do not fit the graph, first at {wrong[0]!r}", where=str(path), cure="save again")
    graph.weights.load_state_dict(tensors, assign=True)
    graph.device = torch.device("cpu")


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory; tied ones are stored as copies."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _read_recipe(folder: Path) -> dict[str, Any]:
    recipe = _json(folder / RECIPE)
    kinds = {
        "format": int,
        "sdgraph": str,
        "torch": str,
        "diffusers": str,
        "passes": list,
        "inputs": list,
        "dtype": str,
        "structure": str,
        "files": dict,
        "weights": str,
    }
    for key, kind in kinds.items():
        if not isinstance(recipe.get(key), kind):
            raise SavedError(f"the recipe has no valid {key!r}", where=str(folder / RECIPE), cure="save again")
    if recipe["format"] > FORMAT:
        raise SavedError(
            f"the recipe has format {recipe['format']}, this sdgraph reads up to {FORMAT}",
            where=str(folder / RECIPE),
            cure="upgrade sdgraph",
        )
    for file in {recipe["weights"], CONFIG, *recipe["files"]}:
        if Path(file).name != file or file in ("", ".", "..") or (folder / file).is_symlink():
            raise SavedError(f"the recipe names {file!r}, outside of its folder", where=str(folder / RECIPE))
        if file not in recipe["files"]:
            raise SavedError(f"the recipe has no checksum of {file!r}", where=str(folder / RECIPE), cure="save again")
        if not (folder / file).is_file():
            raise SavedError("the file is missing", where=str(folder / file), cure="save again")
    return recipe


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SavedError(
            f"cannot read it: {error}", where=str(path), cure="pass a folder of save_pretrained"
        ) from error
    if not isinstance(value, dict):
        raise SavedError("it is not a JSON object", where=str(path), cure="save again")
    return value


def _check_target(target: Path) -> None:
    if target.exists():
        foreign = [p.name for p in target.iterdir()] if target.is_dir() else [target.name]
        foreign = [n for n in foreign if n not in (RECIPE, CONFIG) and not n.startswith("diffusion_pytorch_model.")]
        if foreign:
            raise SavedError(
                f"the folder holds other files: {', '.join(foreign[:3])}", where=str(target), cure="choose another"
            )


def _only_defaults(options: dict[str, Any], call: str) -> None:
    for name, value in options.items():
        if value not in (None, False) and not (name in ("safe_serialization", "is_main_process") and value is True):
            raise SavedError(f"{call} does not support {name}={value!r}", where=call, cure="leave it out")
        if name == "safe_serialization" and value is False:
            raise SavedError("a GraphUNet is saved as safetensors only", where=call, cure="leave safe_serialization")


def _version() -> str:
    from . import __version__

    return __version__
