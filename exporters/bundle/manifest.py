"""The manifest of an exported directory: its variants, their inputs and outputs, and the calls that they cover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

import torch
from msgspec import Meta

from sdgraph import __version__
from sdgraph.errors import CallError, SpecError
from sdgraph.forecasts import Forecast, Order, as_forecast
from sdgraph.inheritance.tracker import GenerationTracker
from sdgraph.ir.guards import Guard, check_call
from sdgraph.ir.inputs import Input
from sdgraph.ir.sites import Site
from sdgraph.runtime.members import MemberName, common_sites
from sdgraph.runtime.rota import Rota, read_schedule
from sdgraph.schedules import Schedule
from sdgraph.spec import read
from sdgraph.untrusted import Digest, FileName, Format

FORMAT = 1
CONFIG, MODEL, DATA, REPORT, MANIFEST = "config.json", "model.onnx", "model.onnx.data", "export.json", "sdgraph.json"
OUTPUT, CHOICE = "out_sample", "variant"  # names of an output and an input of the models
NAMES = {"B": "batch", "H": "height", "W": "width", "L": "sequence"}  # of sizes, in the models
Target = Literal["portable", "cuda"]
Layout = Literal["variants", "single"]
Dtype = Literal["float32", "float16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16}
AGAIN = "export the UNet again"

KINDS = ("float", "index", "time", "mask")
_DTYPES_OF = {"index": torch.int64, "time": torch.float32}

Count = Annotated[int, Meta(ge=0, le=1 << 60)]


@dataclass(frozen=True)
class Value:
    """A value that calls may inherit.

    Args:
        site: name of its site.
        schedule: schedule of the site, as text.
        forecast: order of the site's forecast, or the forecast as text.
        shape: its shape; a dimension is a number or an expression in the call's sizes.
        invariant: whether it depends on conditioning alone, see `sdgraph.Site`.
        bypassed: whether another value of the call takes its place, so that nothing is kept.
    """

    site: str
    schedule: str
    forecast: Order | str
    shape: tuple[int | str, ...]
    invariant: bool = False
    bypassed: bool = False


@dataclass(frozen=True)
class ExportedVariant:
    """The ONNX model of one variant of the graph, see `sdgraph.ir.variants.Variant`.

    Args:
        file: the name of its file.
        reads: the sites whose values are inputs, `reused.SITE`, after the inputs of the call.
        writes: the sites whose values are outputs, `computed.SITE`, after the noise prediction.
        macs: the multiply-accumulates of a call at the nominal sizes.
        bypassed: the sites whose place another value takes.
        computed: the sites that other variants bypass and this one computes.
    """

    file: FileName
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    macs: Count = 0
    bypassed: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()

    @property
    def reused(self) -> frozenset[str]:
        """The sites that the variant does not compute."""
        return frozenset((*self.reads, *self.bypassed))


@dataclass(frozen=True)
class Manifest:
    """The variants of an exported directory, and the calls that they cover.

    Args:
        target: "portable", or "cuda" with ONNX Runtime's own operators, which have kernels in its CUDA provider.
        layout: "variants" has a file for each variant; "single" has all in one, whose input `variant` selects one.
        dtype: "float32" or "float16".
        opset: version of the ONNX operators.
        inputs: every input of the traced UNet; a dimension is a number or an expression in the call's sizes.
        given: the names of the inputs that the variants have; a call must give exactly these.
        output: shape of the noise prediction, in the same form.
        variants: the variants; the first computes everything.
        values: the values that calls may inherit.
        guards: conditions on the sizes of a call.
        recipe: the passes that were applied, as text.
        quantization: the layers in 8 bits and how, as text; "" for models in float.
        member: the name of the UNet in a switch, with which the names of its models begin; "" for a UNet alone.
        files: SHA-256 of each other file, by name.
        versions: versions of the packages that made it, for the reader.
        version: version of the sdgraph that wrote it.
        format: version of this description.
    """

    target: Target
    layout: Layout
    dtype: Dtype
    opset: Annotated[int, Meta(ge=18, le=30)]
    inputs: tuple[Input, ...]
    given: tuple[str, ...]
    output: tuple[int | str, ...]
    variants: tuple[ExportedVariant, ...]
    values: tuple[Value, ...] = ()
    guards: tuple[Guard, ...] = ()
    recipe: tuple[str, ...] = ()
    quantization: str = ""
    member: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,40}\Z")] = ""
    files: Mapping[FileName, Digest] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    format: Format = FORMAT

    @property
    def members(self) -> dict[str, Manifest]:
        """The manifest itself, as that of the only member."""
        return {self.member: self}

    @property
    def model(self) -> str:
        """The file of the model that computes everything and has one output, for other tools."""
        return named(self.member, MODEL)

    @property
    def own_files(self) -> set[str]:
        """The names of the files that the models need."""
        return {CONFIG, DATA, self.model, *(variant.file for variant in self.variants)}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the models."""
        return DTYPES[self.dtype]

    def dtype_of(self, spec: Input) -> torch.dtype:
        """Return the dtype of an input of a model. Times are float32, to which the UNet would cast them anyway."""
        return _DTYPES_OF.get(spec.kind, self.torch_dtype)

    @cached_property
    def model_inputs(self) -> tuple[Input, ...]:
        """The inputs of a call, in the models' order."""
        return tuple(spec for spec in self.inputs if spec.name in self.given)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites, by name."""
        return {value.site: _site(value) for value in self.values}

    @cached_property
    def kept(self) -> tuple[Value, ...]:
        """The values that one call hands to later ones."""
        return tuple(value for value in self.values if not value.bypassed)

    @cached_property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """The shapes of the values, by site."""
        return {value.site: value.shape for value in self.values}

    def variant_for(self, reused: frozenset[str]) -> tuple[ExportedVariant, bool]:
        """Return the variant for the calls that reuse some sites, and whether it was exported for such calls.

        The variant for such calls reuses no other site and computes none of these; at most one variant does so. Without
        it, the choice is the variant that computes the least among those that reuse no other site.
        """
        candidates = [variant for variant in self.variants if reused >= variant.reused]
        for variant in candidates:
            if reused.isdisjoint((*variant.writes, *variant.computed)):
                return variant, True
        return min(candidates, key=lambda variant: variant.macs), False

    def session_inputs(self, variant: ExportedVariant) -> tuple[Input, ...]:
        """Return all inputs of the file of a model, in the file's order."""
        if self.layout == "variants":
            return self.inputs_of(variant)
        values = (self._port("reused", value.site) for value in self.kept)
        return (*self.model_inputs, Input(CHOICE, (), (), "index"), *values)

    def session_outputs(self, variant: ExportedVariant) -> tuple[Input, ...]:
        """Return all outputs of the file of a model, in the file's order."""
        if self.layout == "variants":
            return self.outputs_of(variant)
        return (Input(OUTPUT, (), self.output), *(self._port("computed", value.site) for value in self.kept))

    def inputs_of(self, variant: ExportedVariant) -> tuple[Input, ...]:
        """Return all inputs of a model, in its order."""
        return (*self.model_inputs, *(self._port("reused", site) for site in variant.reads))

    def outputs_of(self, variant: ExportedVariant) -> tuple[Input, ...]:
        """Return all outputs of a model, in its order."""
        return (Input(OUTPUT, (), self.output), *(self._port("computed", site) for site in variant.writes))

    def _port(self, kind: str, site: str) -> Input:
        return Input(f"{kind}.{site}", (site,), self.shapes[site])

    def check(self, flat: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Check that the models cover a call.

        Args:
            flat: inputs of the call, as `sdgraph.frontend.call.flatten` returns them.
        Returns:
            the sizes of the call, by symbol.
        Raises:
            CallError: the models do not cover it. The error names the input, what it is and what it should be.
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
            if name not in self.given and used:  # a pass may have removed what an unused input was added to
                raise CallError(
                    f"this model was exported without {places[name]}",
                    where=f"argument {places[name]}",
                    hint=f"export again with inputs=({places[name]!r},)",
                )


@dataclass(frozen=True)
class SwitchManifest:
    """The members of an exported switch, whose models share one file of weights, and who computes when.

    Args:
        schedule: the schedule that names the member of each call, as text.
        members: the manifest of each member by name, in order.
        carry_features: whether values of common sites are taken over when the turn changes.
        guidance_scale: the scale of classifier-free guidance of members by name, where it is not the pipeline's.
        version: version of the sdgraph that wrote it.
        format: version of this description.
    """

    schedule: str
    members: Annotated[Mapping[MemberName, Manifest], Meta(min_length=1, max_length=100)]
    carry_features: bool = False
    guidance_scale: Mapping[MemberName, Annotated[float, Meta(gt=0, le=1e6)]] = field(default_factory=dict)
    version: str = __version__
    format: Format = FORMAT

    def rota(self, tracker: GenerationTracker) -> Rota:
        """Return the turns of the members.

        Args:
            tracker: the tracker of the generations.
        Raises:
            ScheduleError, SpecError: the schedule or the sites do not fit the members.
        """
        shapes = [{(value.site, value.shape) for value in member.kept} for member in self.members.values()]
        carried = common_sites(shapes) if self.carry_features else frozenset()
        return Rota(read_schedule(self.schedule), self.members, tracker, carried, self.guidance_scale)


def named(member: str, file: str) -> str:
    """Return the name of a file of a member.

    Args:
        member: the name of the member; "" for a UNet alone.
        file: the name of the file of a UNet alone.
    """
    return f"{member}-{file}" if member else file


def _site(value: Value) -> Site:
    schedule = read(value.schedule, Schedule)
    forecast = read(value.forecast, Forecast) if isinstance(value.forecast, str) else as_forecast(value.forecast)
    if not isinstance(schedule, Schedule):
        raise SpecError(f"{value.schedule!r} is no schedule", hint=AGAIN)
    if not isinstance(forecast, Forecast):
        raise SpecError(f"{value.forecast!r} is no forecast", hint=AGAIN)
    return Site(schedule, forecast, value.invariant, value.bypassed)
