"""The recipe, `sdgraph.json` of a saved UNet: the passes that make its graph from its configuration, and its files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec

from ..compiler.passes import parse
from ..errors import SavedError
from ..ir.decisions import Applied, Decision
from ..untrusted import Digest, FileName, Format, as_kind, check_format, read_json, require_inside

FORMAT = 1
RECIPE, CONFIG, SWITCH = "sdgraph.json", "config.json", "switch.json"
AGAIN = "save the UNet again"
FOLDED, CALLS = "guidance_folded", "few_step_calls"  # the entries of the configuration of a few-step student
PASSES = "sdgraph_passes"  # the entry of a configuration that lists the passes


class Entry(msgspec.Struct, frozen=True, rename={"text": "pass"}):
    """A pass that made decisions by the numbers of weights.

    Args:
        text: the pass as text.
        decisions: pairs of what was decided about, and the decision.
    """

    text: str
    decisions: tuple[tuple[str, Any], ...]


class Settings(TypedDict, total=False):
    """Settings that distinguish a source UNet from others with the same configuration.

    Keys:
        processors: class names of the attention processors, by module path.
        freeu: the four scales of FreeU, by module path.
    """

    processors: dict[str, str]
    freeu: dict[str, Annotated[list[float], msgspec.Meta(min_length=4, max_length=4)]]


class GraphRecipe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of a recipe that gives the graph of one UNet, without its weights.

    Args:
        sdgraph, torch, diffusers: versions that wrote it.
        passes: the passes as text, in order; an `Entry` for a pass that made decisions.
        inputs: optional inputs that the UNet was traced with.
        dtype: dtype of the weights.
        structure: digest of the graph; the graph rebuilt on loading must have the same one.
        settings: what was set on the source UNet besides its configuration, see `sdgraph.frontend.source`.
        source: the configuration of the source UNet, where no other file has it.
    """

    sdgraph: str
    torch: str
    diffusers: str
    passes: tuple[str | Entry, ...]
    inputs: tuple[str, ...]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    structure: Digest
    settings: Settings = {}
    source: dict[str, Any] = {}


class Recipe(GraphRecipe, frozen=True, kw_only=True, omit_defaults=True):
    """The contents of `sdgraph.json`. The configuration `source` is there if `config.json` is another one: that of the
    plain model of diffusers which computes the same as the graph.

    A new field needs a default, so that earlier folders still load. If a reader that does not know the field would load
    the folder wrongly, `FORMAT` is raised as well.

    Args:
        format: version of this description.
        files: SHA-256 of each other file, by name.
        weights: name of the file of weights, or of the index of its shards.
        names: the plain model's name of each tensor of the graph, where it is another.
    """

    format: Format
    files: dict[FileName, Digest]
    weights: FileName
    names: dict[str, str] = {}


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a saved folder, and check that the files it names are there.

    Raises:
        SavedError: the recipe or a file is missing, malformed, unsafe, or of a newer format.
    """
    path = folder / RECIPE
    plain = read_json(path, "pass a folder of save_pretrained")
    if "variants" in plain and "passes" not in plain:
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


def entry(applied: Applied) -> str | Entry:
    """Return a pass as a recipe lists it."""
    decisions = tuple((decision.about, decision.value) for decision in applied.decisions)
    return Entry(str(applied), decisions) if decisions else str(applied)


def passes_of(entries: Sequence[str | Entry]) -> list[Applied]:
    """Return the passes that a recipe lists, the reverse of `entry`.

    Raises:
        SpecError: a pass is not known here, or does not take its options.
    """
    passes = []
    for listed in entries:
        (parsed,) = parse(listed if isinstance(listed, str) else listed.text)
        decisions = () if isinstance(listed, str) else listed.decisions
        passes.append(Applied(parsed, tuple(Decision(about, value) for about, value in decisions)))
    return passes


def plain_passes(passes: Iterable[Applied]) -> list[Any]:
    """Return passes and their decisions as plain data, for a configuration."""
    return [msgspec.to_builtins(entry(applied)) for applied in passes]


def read_passes(plain: Any) -> list[Applied]:
    """Return the passes that `plain_passes` wrote."""
    return passes_of(msgspec.convert(plain, tuple[str | Entry, ...]))
