"""`sdgraph.json`: what an exported directory says of itself. Written last, checked on load."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import torch
from msgspec import Meta

from sdgraph import Graph, GraphUNet, __version__
from sdgraph.atomic import sha256
from sdgraph.errors import CallError, ExportError, SavedError, SdgraphError
from sdgraph.forecasts import Forecast, Polynomial, as_forecast
from sdgraph.frontend.call import ARGUMENTS
from sdgraph.ir.dims import evaluate
from sdgraph.ir.guards import Guard, check_call
from sdgraph.ir.inputs import Input
from sdgraph.ir.sites import Site
from sdgraph.ir.sites import sites as inherited
from sdgraph.ir.specialize import per_call
from sdgraph.schedules import Schedule
from sdgraph.spec import read
from sdgraph.untrusted import Digest, FileName, Format, as_kind, check_format, read_json, require_inside

FORMAT = 3  # 2 called the target `artefact`
CONFIG, MODEL, DATA, REPORT, MANIFEST = "config.json", "model.onnx", "model.onnx.data", "export.json", "sdgraph.json"
REFRESH = "refresh.onnx"  # where features are inherited: `model.onnx` with the values that later calls take besides
OUTPUT, CHOICE = "out_sample", "model"
NAMES = {"B": "batch", "H": "height", "W": "width", "L": "sequence"}  # of sizes, in the models
Target = Literal["portable", "cuda"]
Layout = Literal["variants", "single"]
Dtype = Literal["float32", "float16"]
TARGETS, LAYOUTS = get_args(Target), get_args(Layout)
DTYPES = {"float32": torch.float32, "float16": torch.float16}
AGAIN = "export the UNet again"

KINDS = ("float", "index", "time", "mask")
_DTYPES_OF = {"index": torch.int64, "time": torch.float32}
_MODEL_FILE = re.compile(r"[A-Za-z0-9][\w-]{0,60}\.onnx")
_SYMBOL = re.compile(r"[A-Z]\d{0,3}")  # of a size of the call
_LARGEST_SIZE = 1 << 31  # of a dimension, where the sizes of the call are 64

Order = Literal[0, 1, 2]
Count = Annotated[int, Meta(ge=0, le=1 << 60)]


@dataclass(frozen=True)
class Value:
    """A value that calls may inherit.

    Args:
        site: its name.
        schedule: as text.
        forecast: its order, or the forecast as text.
        shape: each dimension a number or an expression in the call's sizes.
        invariant: it depends on conditioning alone, see `sdgraph.Site`.
        bypassed: another value of the call takes its place, and nothing is kept.
    """

    site: str
    schedule: str
    forecast: Order | str
    shape: tuple[int | str, ...]
    invariant: bool = False
    bypassed: bool = False


@dataclass(frozen=True)
class Model:
    """The graph of one kind of call.

    Args:
        file: its name.
        takes: sites whose values are inputs, `inherited.SITE`, after those of the call.
        gives: sites whose values are outputs, `refreshed.SITE`, after the noise prediction.
        macs: multiply-accumulates, at the nominal sizes.
        bypassed: sites whose place another value takes.
        computed: sites that other models bypass, and this one computes.
    """

    file: FileName
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    macs: Count = 0
    bypassed: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()

    @property
    def stale(self) -> frozenset[str]:
        """The sites that are not computed."""
        return frozenset((*self.takes, *self.bypassed))


@dataclass(frozen=True)
class Manifest:
    """What an exported directory holds, and the calls it takes.

    Args:
        target: "portable", or "cuda" with ONNX Runtime's own operators, which have kernels there.
        layout: "variants" has a file for each model; "single" has all in one, whose input `model` says which is to run.
        dtype: "float32" or "float16".
        opset: version of the ONNX operators.
        inputs: every input of the traced UNet, each dimension a number or an expression in the call's sizes.
        given: names of those that the models have; a call gives exactly these.
        output: shape of the output, as of the inputs.
        models: the first computes everything.
        values: what calls may inherit.
        guards: what the sizes of a call must satisfy.
        recipe: the passes applied, as text.
        files: SHA-256 of each other file, by name.
        versions: of the packages that made it, for the reader.
        version: of the sdgraph that wrote it.
        format: of this description.
    """

    target: Target
    layout: Layout
    dtype: Dtype
    opset: Annotated[int, Meta(ge=18, le=30)]
    inputs: tuple[Input, ...]
    given: tuple[str, ...]
    output: tuple[int | str, ...]
    models: tuple[Model, ...]
    values: tuple[Value, ...] = ()
    guards: tuple[Guard, ...] = ()
    recipe: tuple[str, ...] = ()
    files: Mapping[FileName, Digest] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    format: Format = FORMAT

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def dtype_of(self, spec: Input) -> torch.dtype:
        """Dtype of an input of a model. Times are float32: the UNet casts them to it first thing."""
        return _DTYPES_OF.get(spec.kind, self.torch_dtype)

    @cached_property
    def model_inputs(self) -> tuple[Input, ...]:
        """The inputs of a call that the models have, in their order."""
        return tuple(spec for spec in self.inputs if spec.name in self.given)

    @cached_property
    def sites(self) -> dict[str, Site]:
        return {each.site: _site(each) for each in self.values}

    @cached_property
    def kept(self) -> tuple[Value, ...]:
        """The values that one call hands to later ones."""
        return tuple(value for value in self.values if not value.bypassed)

    @cached_property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Of the values, by site."""
        return {each.site: each.shape for each in self.values}

    def model_for(self, stale: frozenset[str]) -> tuple[Model, bool]:
        """The model for calls at which the sites `stale` are inherited, and whether it is made for just these.

        Each site that it meets it takes if stale and computes if not, so there is one at most; else the one that
        computes the least of those that inherit nothing else.
        """
        able = [each for each in self.models if stale >= each.stale]
        for each in able:
            if stale.isdisjoint((*each.gives, *each.computed)):
                return each, True
        return min(able, key=lambda each: each.macs), False

    def session_inputs(self, model: Model) -> tuple[Input, ...]:
        """All inputs of the file of a model, in its order."""
        if self.layout == "variants":
            return self.inputs_of(model)
        values = (self._port("inherited", value.site) for value in self.kept)
        return (*self.model_inputs, Input(CHOICE, (), (), "index"), *values)

    def session_outputs(self, model: Model) -> tuple[Input, ...]:
        """All outputs of the file of a model, in its order."""
        if self.layout == "variants":
            return self.outputs_of(model)
        return (Input(OUTPUT, (), self.output), *(self._port("refreshed", value.site) for value in self.kept))

    def inputs_of(self, model: Model) -> tuple[Input, ...]:
        """All inputs of a model, in its order."""
        return (*self.model_inputs, *(self._port("inherited", site) for site in model.takes))

    def outputs_of(self, model: Model) -> tuple[Input, ...]:
        """All outputs of a model, in its order."""
        return (Input(OUTPUT, (), self.output), *(self._port("refreshed", site) for site in model.gives))

    def _port(self, kind: str, site: str) -> Input:
        return Input(f"{kind}.{site}", (site,), self.shapes[site])

    # -- on disk -------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write it, with the hashes of the files that are there."""
        files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, REPORT)}
        plain = asdict(replace(self, files=files))
        (folder / MANIFEST).write_text(json.dumps({**plain, "sha256": _digest(plain)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a directory, which is not trusted.

        Raises:
            SavedError: it is missing, edited, malformed, or of a newer format.
        """
        path = folder / MANIFEST
        plain = read_json(path, AGAIN)
        if "models" not in plain or "format" not in plain:
            hint = "sdgraph.GraphUNet.from_pretrained reads what save_pretrained wrote"
            raise SavedError(f"{MANIFEST} is not that of an export", where=str(path), hint=hint)
        check_format(plain, FORMAT, path, AGAIN)
        if plain.pop("sha256", None) != _digest(plain):
            raise SavedError(f"{MANIFEST} was edited", where=str(path), hint=f"{AGAIN}: it says what the models are")
        if plain["format"] == 2 and "artefact" in plain:
            plain["target"] = plain.pop("artefact")
        found = as_kind(plain, cls, path, AGAIN)
        try:
            found._check()
        except (SdgraphError, ValueError, RecursionError, MemoryError) as error:
            what = error.what if isinstance(error, SdgraphError) else str(error) or type(error).__name__
            raise SavedError(f"{MANIFEST} is damaged: {what}", where=str(path), hint=AGAIN) from error
        return found

    def _check(self) -> None:
        """What its fields must be to one another.

        Raises:
            ValueError, SdgraphError: they are not.
        """
        if not self.models or self.models[0].stale:
            raise ValueError("models: the first does not compute everything")
        sites = self.sites  # their schedules are read, if only to see that they can be
        if len(sites) < len(self.values):
            raise ValueError("values: a site is there twice")
        for i, model in enumerate(self.models):
            for site in (*model.takes, *model.gives, *model.bypassed, *model.computed):
                _known(site, sites, f"models[{i}]")
            for site in model.takes:
                _known(site, self.models[0].gives, f"models[{i}].takes")
            if not _MODEL_FILE.fullmatch(model.file):
                raise ValueError(f"models[{i}].file: {model.file[:100]!r} is no file name of a model")
        for name in (CONFIG, DATA, *(model.file for model in self.models)):
            if name not in self.files:
                raise ValueError(f"files: there is no hash of {name}")
        for i, spec in enumerate(self.inputs):
            _known(spec.kind, KINDS, f"inputs[{i}].kind")
            _known(spec.place[0] if spec.place else "", ARGUMENTS, f"inputs[{i}].place")
        names = [spec.name for spec in self.inputs if spec.shape is not None]
        if len({spec.name for spec in self.inputs}) < len(self.inputs) or names[:2] != ["sample", "timestep"]:
            raise ValueError("inputs: sample and timestep, and each once")
        for name in self.given:
            _known(name, names, "given")
        self._check_sizes()

    def _check_sizes(self) -> None:
        shapes = {f"inputs[{i}].shape": spec.shape or () for i, spec in enumerate(self.inputs)}
        free = {str(d): 64 for shape in shapes.values() for d in shape if _SYMBOL.fullmatch(str(d))}
        shapes |= {"output": self.output}
        shapes |= {f"values[{i}].shape": each.shape for i, each in enumerate(self.values)}
        for field_name, shape in shapes.items():
            for dim in shape:
                size: object = dim if isinstance(dim, int) else evaluate(dim, free)
                if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= _LARGEST_SIZE:
                    raise ValueError(f"{field_name}: {str(dim)[:80]!r} is no size")
        for guard in self.guards:
            evaluate(guard.condition, free)

    def check_files(self, folder: Path, names: Iterable[str]) -> None:
        """Compare files with their hashes.

        Raises:
            SavedError: one is missing, another, or a link out of the directory.
        """
        for name in names:
            require_inside(folder / name, AGAIN)
            if not (folder / name).is_file():
                raise SavedError(f"{name} is missing", where=str(folder), hint=AGAIN)
            if sha256(folder / name) != self.files.get(name):
                raise SavedError(f"{name} is not the file that was exported", where=str(folder / name), hint=AGAIN)

    # -- calls ---------------------------------------------------------------------------------------------------

    def check(self, flat: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The sizes of a call.

        Args:
            flat: its inputs, as `sdgraph.frontend.call.flatten` gives them.
        Raises:
            CallError: the models do not cover it; naming the input, what it is and what it should be.
        """
        self._check_given(flat)
        given = {name: value for name, value in flat.items() if name in self.given}
        return check_call(self.model_inputs, self.guards, given, self.torch_dtype)

    def _check_given(self, flat: Mapping[str, torch.Tensor]) -> None:
        places = {spec.name: str(spec.place[0]) for spec in self.inputs}
        missing = [n for n in self.given if n not in flat]
        if missing:
            raise CallError(
                f"{places[missing[0]]} is missing", where="call", hint="this model was exported with it; pass it"
            )
        for name in flat:
            used = next(spec for spec in self.inputs if spec.name == name).shape is not None
            if name not in self.given and used:  # an unused one had its place pruned away
                raise CallError(
                    f"this model was exported without {places[name]}",
                    where=f"argument {places[name]}",
                    hint=f"export again with inputs=({places[name]!r},)",
                )


def describe(unet: GraphUNet, given: frozenset[str], target: str, layout: str, opset: int, calls: Any) -> Manifest:
    """The manifest, without files, of a UNet exported with the optional inputs `given`.

    Args:
        calls: the generations it is to serve: how many calls, at timesteps evenly spaced, or their timesteps. They
            decide which models there are.
    """
    graph = unet.graph.copy()
    graph.follow_weights()
    if any(node.target is per_call for node in graph.nodes):
        _one_timestep(graph)
    inputs = graph.resolved_inputs()
    for spec in inputs:
        if "?" in (spec.shape or ()):
            what = f"a size of {spec.name} is no known expression of the call's sizes"
            raise ExportError(what, where=f"input {spec.name}", hint="a pass has made it so; please report it")
    models = _models(graph, calls)
    return Manifest(
        target=cast(Target, target),
        layout=cast(Layout, layout if len(models) > 1 else "variants"),
        dtype=cast(Dtype, str(unet.dtype).removeprefix("torch.")),
        opset=opset,
        inputs=inputs,
        given=tuple(i.name for i in inputs if i.shape is not None and (not i.optional or i.name in given)),
        output=graph.dims.expressions(graph.output.meta["val"], graph.output.meta["probe"]),
        models=models,
        values=tuple(_kept(graph, name, site, unet.dtype) for name, site in graph.sites.items()),
        guards=graph.guards,
        recipe=tuple(map(str, graph.passes)),
        versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "onnx", "onnxscript")},
    )


def _one_timestep(graph: Graph) -> None:
    """Make it the graph that is exported where something depends on the timestep alone: one serves all samples."""
    graph.inputs = tuple(replace(i, shape=(1,), broadcast=False) if i.name == "timestep" else i for i in graph.inputs)
    timestep = graph.input("timestep")
    for key in ("val", "probe"):
        timestep.meta[key] = timestep.meta[key].new_empty(1)
    graph.propagate(anew=True)


def _models(graph: Graph, calls: Any) -> tuple[Model, ...]:
    """One for each kind of call; the first call of a generation refreshes all that it needs."""
    if not graph.sites:
        return (Model(MODEL, macs=graph.macs),)
    found: dict[tuple[tuple[str, ...], ...], Model] = {}
    may_go = {name for name, site in graph.sites.items() if site.bypassed}
    timesteps = np.linspace(999, 0, calls).tolist() if isinstance(calls, int) else calls
    for kind in graph.timetable(timesteps).variants:  # two may differ in what neither needs
        name = f"inherit_{len(found)}.onnx" if found else REFRESH
        given = tuple(site for site in kind.refreshed if site not in may_go)
        computed = tuple(site for site in kind.refreshed if site in may_go)
        key = kind.inherited, kind.refreshed, kind.bypassed
        found.setdefault(key, Model(name, kind.inherited, given, kind.macs, kind.bypassed, computed))
    return tuple(found.values())


def _kept(graph: Graph, name: str, site: Site, dtype: torch.dtype) -> Value:
    node = inherited(graph.fx)[name]
    shape = graph.dims.expressions(node.meta["val"], node.meta["probe"])
    if "?" in shape or node.meta["val"].dtype != dtype:
        raise ExportError(
            f"what is inherited has shape {shape} and dtype {node.meta['val'].dtype}, which is not covered",
            where=name,
            hint="choose another site",
        )
    plain = site.forecast == Polynomial(order) if (order := site.forecast.memory - 1) <= 2 else False
    forecast = cast(Order, order) if plain else str(site.forecast)
    return Value(name, str(site.schedule), forecast, shape, site.invariant, site.bypassed)


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _site(value: Value) -> Site:
    schedule = read(value.schedule, Schedule)
    forecast = read(value.forecast, Forecast) if isinstance(value.forecast, str) else as_forecast(value.forecast)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{value.schedule!r} is no schedule")
    if not isinstance(forecast, Forecast):
        raise TypeError(f"{value.forecast!r} is no forecast")
    return Site(schedule, forecast, value.invariant, value.bypassed)


def _known(name: str | int, among: Container[Any], place: str) -> None:
    if name not in among:
        raise ValueError(f"{place}: {str(name)[:100]!r} is not known")
