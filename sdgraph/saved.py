"""A GraphUNet on disk: `config.json`, the weights (safetensors) and `sdgraph.json`, the recipe. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import diffusers
import msgspec
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
from .untrusted import Digest, FileName, Format, as_kind, check_format, read_config, read_json, require_inside

if TYPE_CHECKING:
    from .unet import GraphUNet

FORMAT = 2  # 1: without decisions
RECIPE, CONFIG = "sdgraph.json", "config.json"
AGAIN = "save the UNet again"


class Entry(msgspec.Struct, frozen=True, rename={"text": "pass"}):
    """A pass that decided something by the numbers of weights: its text, and what it decided about what."""

    text: str
    decisions: tuple[tuple[str, Any], ...]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """`sdgraph.json` of a saved UNet: how its graph comes from its configuration, and what else is in the folder.

    A field that is added needs a default, so that folders saved before still load; if a reader that does not know it
    would go wrong, `FORMAT` is raised too.

    Args:
        format: of this description.
        sdgraph, torch, diffusers: versions that wrote it.
        passes: in order, as text; with their decisions, if they made any.
        inputs: optional inputs that the UNet was traced with.
        dtype: of the weights.
        structure: of the graph, see `structure`; loading must come to the same.
        files: SHA-256 of each other file, by name.
        weights: name of the file of weights.
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
        recipe = Recipe(
            format=FORMAT if any(applied.decisions for applied in graph.passes) else 1,
            sdgraph=_version(),
            torch=str(torch.__version__),
            diffusers=diffusers.__version__,
            passes=tuple(map(_entry, graph.passes)),
            inputs=tuple(inputs),
            dtype=str(next(unet.parameters()).dtype).removeprefix("torch."),  # type: ignore[arg-type]
            structure=structure(graph),
            files={f: sha256(folder / f) for f in (CONFIG, name)},
            weights=name,
        )
        (folder / RECIPE).write_text(json.dumps(msgspec.to_builtins(recipe), indent=2) + "\n")


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
    for file, digest in recipe.files.items():
        if sha256(folder / file) != digest:
            raise SavedError("the file is not the one that was saved", where=str(folder / file), cure=AGAIN)
    config = read_config(folder / CONFIG, AGAIN)
    try:
        graph = _rebuild(config, _passes(recipe.passes), recipe.inputs, getattr(torch, recipe.dtype))
    except Exception as error:
        names = ", ".join(entry if isinstance(entry, str) else entry.text for entry in recipe.passes)
        passes = f"install the packages of these passes, or import their modules first: {names}; or " if names else ""
        raise SavedError(
            f"the configuration and passes do not give a graph: {str(error)[:1000]}",
            where=str(folder / RECIPE),
            cure=f"{passes}{AGAIN}",
        ) from error
    if structure(graph) != recipe.structure:
        raise SavedError(
            f"the recipe gives another graph here than with sdgraph {recipe.sdgraph}, diffusers "
            f"{recipe.diffusers}, torch {recipe.torch}",
            where=str(folder / RECIPE),
            cure="use those versions, or apply the passes again to the source UNet",
        )
    _load_weights(graph, folder / recipe.weights)
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


def _rebuild(config: dict[str, Any], passes: Sequence[Applied], inputs: Sequence[str], dtype: torch.dtype) -> Graph:
    """The graph of a configuration with passes replayed, on the meta device."""
    with torch.device("meta"):
        plain = dict(config) | {"_class_name": "UNet2DConditionModel"}
        unet = torch.nn.Module.to(UNet2DConditionModel.from_config(plain), dtype)
    return replay(passes, capture(unet, tuple(inputs)))


def _load_weights(graph: Graph, path: Path) -> None:
    try:
        # Cloned, because kernels round differently on tensors that are not aligned as PyTorch allocates them.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise SavedError(f"cannot read the weights: {error}", where=str(path), cure=AGAIN) from error
    wanted = graph.weights.state_dict()
    for name in wanted.keys() - tensors.keys():
        twin = next((k for k, v in wanted.items() if v is wanted[name] and k in tensors), None)
        if twin is not None:
            tensors[name] = tensors[twin]
    wrong = sorted(wanted.keys() ^ tensors.keys()) or [n for n in wanted if wanted[n].shape != tensors[n].shape]
    if wrong:
        raise SavedError(f"the weights do not fit the graph, first at {wrong[0]!r}", where=str(path), cure=AGAIN)
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


def _read_recipe(folder: Path) -> Recipe:
    path = folder / RECIPE
    plain = read_json(path, "pass a folder of save_pretrained")
    if "models" in plain and "passes" not in plain:
        raise SavedError(
            "this is an exported directory, not a saved UNet",
            where=str(folder),
            cure="export or load the UNet that it was made of; this one is run by sdgraph.exporters.ort.ORTUNet, and "
            "`sdgraph inspect` says what it holds",
        )
    check_format(plain, FORMAT, path, AGAIN)
    recipe = as_kind(plain, Recipe, path, AGAIN)
    for file in (recipe.weights, CONFIG):
        if file not in recipe.files:
            raise SavedError(f"the recipe has no checksum of {file!r}", where=f"{path}, field files", cure=AGAIN)
    for file in recipe.files:
        require_inside(folder / file, AGAIN)
        if not (folder / file).is_file():
            raise SavedError("the file is missing", where=str(folder / file), cure=AGAIN)
    return recipe


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
