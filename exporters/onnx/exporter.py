"""`export`: a UNet as a directory that ONNX Runtime runs, checked against eager before it is there."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import diffusers
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import GraphUNet, SwitchUNet
from sdgraph.atomic import appearing
from sdgraph.errors import ExportError, SavedError, SdgraphError, SpecError
from sdgraph.extra import require_onnx
from sdgraph.options import Bounds, NotNegative, Text, checked
from sdgraph.progress import Bar

from ..bundle.describe import describe
from ..bundle.example_calls import example_call, uneven_calls, with_values
from ..bundle.external_data import Weights
from ..bundle.manifest import CONFIG, DATA, MODEL, REPORT, Layout, Manifest, SwitchManifest, Target
from ..bundle.manifest_file import read_manifest, write_manifest
from . import parity
from .parity import Comparison, ExportReport
from .quantize import Calibration, Quantize, check_request, quantized, with_quality
from .request import as_graph, check_members, check_target, chosen_inputs, of_member

if TYPE_CHECKING:
    from ..ort.providers import Provider
    from ..ort.sessions import Sessions
    from ..ort.unet import ORTUNet

log = logging.getLogger("sdgraph")

# 18 is the oldest torch translates to. From 21 on it writes GroupNormalization, for which no provider has a kernel: it
# is inlined into thousands of nodes.
OPSETS = range(18, 21)
CHOOSING = ("TopK", "ArgMax", "ArgMin")  # operators whose answer jumps where two values meet


@checked(SpecError)
def export(
    unet: Annotated[GraphUNet | SwitchUNet | UNet2DConditionModel, Any],
    directory: Text | os.PathLike[str],
    *,
    target: Target = "portable",
    layout: Layout = "variants",
    dtype: torch.dtype | None = None,
    inputs: str | Collection[str] = (),
    calls: Any = 50,
    opset: Annotated[int, Bounds(ge=OPSETS[0], le=OPSETS[-1])] = 20,
    provider: str | None = None,
    precision: str | None = None,
    quantize: Quantize | None = None,
    calibration: Annotated[Calibration | None, Any] = None,
    overwrite: bool = False,
    atol: NotNegative | None = None,
    rtol: NotNegative | None = None,
    progress: bool = True,
) -> ExportReport:
    """Write a UNet as ONNX models with dynamic batch, height, width and sequence length: one for each variant, all over
    one file of weights.

    The models take `sample` `(batch, channels, height, width)`, `timestep` `(1 or batch,)` in float32,
    `encoder_hidden_states` `(batch, sequence, features)` and what else the configuration requires, and give
    `out_sample`. `model.onnx` computes everything, and other tools run it alone. A UNet that inherits features has
    `variant_N.onnx` besides, with further inputs `reused.SITE` and outputs `computed.SITE`, which `ORTUNet` passes.

    The directory holds `config.json`, the models, their weights in `model.onnx.data`, `sdgraph.json`, which says what
    they are, and the report in `export.json`. It appears complete and checked, or not at all.

    Args:
        unet: what `sdgraph.apply` or `sdgraph.switch` returned, or a diffusers UNet; in float32 or float16. The files
            of a switch's models begin with the name of their member.
        directory: the directory to write; missing parents are created.
        target: "portable" has standard operators only, for any provider. "cuda" has ONNX Runtime's own operators for
            normalisation, attention and feed-forward in their place (`sdgraph.exporters.lowering`), which have kernels
            in its CUDA provider; elsewhere they are computed by their definitions, which is slow.
        layout: "variants" writes one file per variant. "single" is one file that branches on its input `variant`;
            CUDA graphs cannot hold it, and other tools must choose the branch themselves.
        dtype: float32 or float16; by default the UNet's, which stays as it is.
        inputs: optional inputs to include: names of arguments such as "mid_block_additional_residual". A call of the
            exported model must then give them.
        calls: the generations to serve, of a UNet that inherits features: a scheduler, timesteps, or a number of calls,
            see `sdgraph.Graph.timetable`. They decide which variants are exported; other calls
            compute more than they need.
        opset: version of the ONNX operators, 18 to 20.
        provider: a provider of ONNX Runtime on which the models are compared as well, beside the CPU's; see
            `ORTUNet.from_pretrained`.
        precision: the precision of that provider, which has separate bounds.
        quantize: the layers to compute in 8 bits. The models in float are compared with eager first, then those in 8
            bits with them, on images.
        calibration: the generations for scales and for that comparison; needed with `quantize`.
        overwrite: replace an earlier export, once the new one is checked.
        atol: bound on the largest difference from eager, which is `atol + rtol * largest value`.
        rtol: the other part of that bound.
        progress: show a progress bar.
    Returns:
        the comparison of the models with eager at two shapes, on ONNX Runtime's CPU provider in the dtype of the models
        and on `provider` in its precision; prints as a table.
    Raises:
        ExtraError: the `onnx` extra is not installed.
        ExportError: wrong kind of model or dtype, the directory exists or cannot be written, or the translation failed.
        ScheduleError: a schedule does not fit `calls`.
        ParityError: the numbers are out of bounds.
        SpecError: unknown inputs, target, layout or opset; or 8 bits that these models, this processor or the
            calibration do not allow.
    Example:
        `print(export(unet, "unet-onnx"))`
    """
    require_onnx()
    switch = unet if isinstance(unet, SwitchUNet) else None
    if switch is not None:
        check_members(switch, quantize is not None or calibration is not None)
    members = {"": unet} if switch is None else dict(switch.members)
    timetable = None if switch is None else switch.timetable(calls)
    optional = None if switch is None else switch.call_inputs
    parts: dict[str, _Part] = {}
    fused: dict[str, int] = {}
    for name, member in members.items():
        with of_member(name):
            graph = as_graph(member, dtype)
            given = chosen_inputs(graph.graph.inputs if optional is None else optional, inputs)
            manifest = describe(graph, given, target, layout, opset, calls, name, timetable)
            lowered, counts = _lowered(graph) if target == "cuda" else (graph, {})
        parts[name] = _Part(graph, lowered, manifest)
        fused = {kind: fused.get(kind, 0) + count for kind, count in counts.items()}
    from ..ort.providers import choose

    if quantize is not None or calibration is not None:
        check_request(quantize, calibration, manifest)
    also = None
    if provider is not None or precision is not None:
        also = choose(provider, precision, None, manifest.dtype)  # refused before the minutes of an export
    modes = {name: part.unet.training for name, part in parts.items()}
    with appearing(directory, partial(check_target, overwrite), ExportError) as folder:
        try:
            for part in parts.values():  # not its own method: that would reset which weights are trainable
                torch.nn.Module.train(part.unet, False)
            with torch.no_grad():
                report = _export(parts, switch, folder, also, (atol, rtol), progress)
                report = replace(report, fused=fused)
                if quantize is not None and calibration is not None:
                    report = _in_eight_bits(folder, manifest, parts[""].unet, quantize, calibration, report, progress)
        finally:
            for name, part in parts.items():
                torch.nn.Module.train(part.unet, modes[name])
        (folder / REPORT).write_text(report.json())
    log.info("exported to %s\n%s", directory, report)
    return report


@dataclass(frozen=True)
class _Part:
    """A UNet to export, as a whole or a member of a switch.

    Args:
        unet: the UNet.
        lowered: the UNet with the operators of the target.
        manifest: its manifest.
    """

    unet: GraphUNet
    lowered: GraphUNet
    manifest: Manifest


def _lowered(unet: GraphUNet) -> tuple[GraphUNet, dict[str, int]]:
    """Return the UNet with ONNX Runtime's own operators, and the number of places that each lowering applied to."""
    from .lowering import ALL

    lowered = sdgraph.apply(unet, ("CleanUp", *ALL), verify=False)  # the export is checked, as a whole
    reports = lowered.report.passes[-len(ALL) :]
    counts = [sum(edit.kind == "replaced" for edit in report.edits) for report in reports]
    return lowered, {type(lowering).__name__: count for lowering, count in zip(ALL, counts, strict=True)}


def _export(
    parts: Mapping[str, _Part],
    switch: SwitchUNet | None,
    folder: Path,
    also: Provider | None,
    bounds: tuple[float | None, float | None],
    progress: bool,
) -> ExportReport:
    import onnx_ir

    from . import translate

    seconds: dict[str, float] = {}
    files: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    choosing = 0
    checks = 1 if also is None else 2
    graphs = sum(len(part.manifest.variants) for part in parts.values())
    stages = (4 + 2 * checks) * graphs + checks  # four to make each, two to check it; and opening them
    with Bar(total=stages, desc="export", unit="stage", disable=not progress) as bar, _ticking(bar):

        @contextmanager
        def stage(name: str, file: str) -> Iterator[None]:
            bar.set_description(f"export: {name} {file}")
            start = time.perf_counter()
            yield
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            bar.update()

        weights = Weights(folder / DATA)
        manifests: dict[str, Manifest] = {}
        for name, part in parts.items():
            unet, manifest = part.unet, part.manifest
            with of_member(name):
                example = example_call(unet, manifest)
                for variant in manifest.variants:
                    module = part.lowered.variant(frozenset(manifest.given), variant.reused)
                    inputs, outputs = manifest.inputs_of(variant), manifest.outputs_of(variant)
                    with stage("capture", variant.file):
                        program = translate.capture(module, with_values(unet, manifest, variant, example), inputs)
                    with stage("translate", variant.file):
                        onnx_model = translate.translate(program, manifest.opset)
                    with stage("compact", variant.file):
                        translate.compact(onnx_model, inputs, outputs)
                        counts[variant.file] = len(onnx_model.graph)
                        choosing += sum(node.op_type in CHOOSING for node in onnx_model.graph)
                    with stage("write", variant.file), _written(folder):
                        weights.take(onnx_model)
                        onnx_model.producer_name, onnx_model.producer_version = "sdgraph", sdgraph.__version__
                        onnx_model.metadata_props["sdgraph.recipe"] = ", ".join(manifest.recipe)
                        onnx_ir.save(onnx_model, folder / variant.file)
                    del onnx_model, program
            files[name] = [variant.file for variant in manifest.variants]
            with _written(folder):
                if manifest.layout == "single":
                    manifest = _joined(folder, manifest)
                elif manifest.variants[0].file != manifest.model:
                    _write_plain(folder, manifest)
            manifests[name] = manifest
        with _written(folder):
            _write_config(folder, next(iter(parts.values())).unet)
            write_manifest(_of_all(manifests, switch), folder)
        comparisons: tuple[Comparison, ...] = ()
        for options in _lean(next(iter(manifests.values()))), also:
            if options is not None:
                with stage("check", MODEL):
                    loaded = _loaded(folder, read_manifest(folder), options)
                for name, part in parts.items():
                    comparisons += _compare(part.unet, loaded.members[name], files[name], bounds, stage)
    tensors = {t.data_ptr(): t.nbytes for part in parts.values() for t in part.unet.parameters()}
    file_bytes = sum(f.stat().st_size for f in folder.iterdir())
    report = ExportReport(counts, sum(tensors.values()), file_bytes, comparisons, seconds)
    parity.require(report, choosing)
    return report


def _of_all(manifests: Mapping[str, Manifest], switch: SwitchUNet | None) -> Manifest | SwitchManifest:
    """Return the manifest of a directory."""
    if switch is None:
        return manifests[""]
    return SwitchManifest(str(switch.schedule), manifests, switch.carry_features, switch.guidance_scale)


def _in_eight_bits(
    folder: Path,
    manifest: Manifest,
    unet: GraphUNet,
    quantize: Quantize,
    calibration: Calibration,
    report: ExportReport,
    progress: bool,
) -> ExportReport:
    """Replace the models by those with layers in 8 bits, and add them to the report."""
    start = time.perf_counter()
    with Bar(total=4, desc="export: 8 bits", unit="stage", disable=not progress) as bar, _ticking(bar):
        loaded = _loaded(folder, read_manifest(folder), {})
        reference = calibration.latents(loaded, held_out=True)
        bar.update()
        for variant in manifest.variants:
            loaded.backend.close(variant)
        with _written(folder):
            found = quantized(folder, manifest, unet.config, quantize, calibration)
            if manifest.variants[0].file != MODEL:
                _write_plain(folder, manifest)
            write_manifest(replace(manifest, quantization=found.strategy), folder)
        bar.update(2)
        loaded = _loaded(folder, read_manifest(folder), {})
        found = with_quality(quantize, found, calibration.latents(loaded, held_out=True), reference)
        bar.update()
    seconds = {**report.seconds, "8 bits": time.perf_counter() - start}
    file_bytes = sum(f.stat().st_size for f in folder.iterdir())
    return replace(report, quantization=found, seconds=seconds, file_bytes=file_bytes)


@contextmanager
def _ticking(bar: Bar) -> Iterator[None]:
    """The time on a bar goes on during a stage: capturing and translating a large UNet take a minute."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _joined(folder: Path, manifest: Manifest) -> Manifest:
    """All models in one file."""
    import onnx

    from .merge import merge

    files = [folder / variant.file for variant in manifest.variants]
    models = [onnx.load(file, load_external_data=False) for file in files]
    for file in files:
        file.unlink()
    onnx.save(merge(models, manifest), folder / manifest.model)
    return replace(manifest, variants=tuple(replace(variant, file=manifest.model) for variant in manifest.variants))


def _write_plain(folder: Path, manifest: Manifest) -> None:
    """`model.onnx`: the graph that computes everything, with one output, over the same weights. Tools that know nothing
    of inheriting run it as any other UNet."""
    import onnx

    model = onnx.load(folder / manifest.variants[0].file, load_external_data=False)
    del model.graph.output[1:]
    onnx.save(model, folder / manifest.model)


def _write_config(folder: Path, unet: GraphUNet) -> None:
    """Write the configuration of the source UNet, as diffusers does."""
    public = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    named = {"_class_name": "UNet2DConditionModel", "_diffusers_version": diffusers.__version__, **public}
    (folder / CONFIG).write_bytes((json.dumps(named, indent=2, sort_keys=True) + "\n").encode())


def _loaded(folder: Path, manifest: Manifest | SwitchManifest, on: Provider | dict[str, Any]) -> ORTUNet:
    """The exported models, on a provider, or on the CPU's with settings of its sessions."""
    from ..ort.providers import CPU
    from ..ort.unet import ORTUNet

    where: dict[str, Any] = {"provider": CPU, "session_options": on}
    if not isinstance(on, dict):
        where = {"provider": on.name, "precision": on.precision}
    try:
        return ORTUNet.from_pretrained(folder, **where, verify=False)
    except SavedError as error:
        raise ExportError(f"the exported model does not load: {error.what}", hint="please report it") from error


def _compare(
    unet: GraphUNet,
    sessions: Sessions,
    names: Sequence[str],
    bounds: tuple[float | None, float | None],
    stage: Callable[[str, str], AbstractContextManager[None]],
) -> tuple[Comparison, ...]:
    """Every output of every model, at two shapes."""
    comparisons = []
    manifest, on = sessions.manifest, (sessions.provider, sessions.precision)
    usual = parity.BOUNDS[getattr(torch, max(manifest.dtype, on[1], key=_coarseness))]
    atol, rtol = (own if given is None else given for given, own in zip(bounds, usual, strict=True))
    for name, variant in zip(names, manifest.variants, strict=True):
        module = unet.variant(frozenset(manifest.given), variant.reused)
        for call in uneven_calls(unet, manifest):
            with stage("check", name):
                given = with_values(unet, manifest, variant, call)
                eager = module(*given.values())
                eager = eager if isinstance(eager, tuple) else (eager,)
                try:
                    exported = sessions.run(variant, given, manifest.check(call))
                except SdgraphError:
                    raise
                except Exception as error:  # ONNX Runtime's errors have no base class
                    raise ExportError(
                        f"ONNX Runtime opens the exported model and cannot run it: {error}",
                        where=name,
                        hint="an operator that a pass inserted may have no kernel for its dtype; try float32",
                    ) from error
                comparisons.append(parity.compare(name, eager, exported, call, atol, rtol, on))
        sessions.close(variant)
    return tuple(comparisons)


def _coarseness(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).eps)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"writing failed: {error.strerror or error}", where=str(folder.parent), hint="check space and rights"
        ) from error


def _lean(manifest: Manifest) -> dict[str, Any]:
    """Settings with which a session takes little memory beside its weights, and those as they lie in the file."""
    import onnxruntime

    level, order = onnxruntime.GraphOptimizationLevel, onnxruntime.ExecutionOrder
    # The CPU computes float16 in float32, and optimised would keep all weights in that; beyond the extended level it
    # rearranges the weights of convolutions.
    half = manifest.dtype == "float16"
    return {
        "enable_cpu_mem_arena": False,
        "execution_order": order.PRIORITY_BASED,  # weights are cast when they are used, not all at first
        "session.disable_prepacking": 1,
        "graph_optimization_level": level.ORT_DISABLE_ALL if half else level.ORT_ENABLE_EXTENDED,
    }
