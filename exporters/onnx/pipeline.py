"""`export_pipeline`: a whole pipeline as a folder that ONNX Runtime runs, in the layout that optimum loads."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch

from sdgraph.atomic import appearing
from sdgraph.errors import ExportError, ParityError, SpecError
from sdgraph.extra import require_onnx
from sdgraph.options import Bounds, Text, checked
from sdgraph.progress import Bar
from sdgraph.runtime.switch import SwitchUNet
from sdgraph.views.format import format_table

from ..bundle.manifest import MODEL, REPORT, Manifest, Target
from ..bundle.manifest_file import read_manifest, write_manifest
from ..bundle.pipeline_manifest import (
    CLASSES,
    DECODER,
    ENCODER,
    INDEX,
    SCHEDULER,
    SETTINGS,
    TEXT_ENCODERS,
    TOKENIZERS,
    UNET,
    PipelineManifest,
    write_pipeline_manifest,
)
from .exporter import OPSETS, export
from .parity import FORMAT, Comparison, ExportReport
from .parts import Part, text_part, vae_parts, write_part
from .quantize import Calibration, Quantize
from .request import check_target

log = logging.getLogger("sdgraph")

# optimum's names of sizes, by ours. Those of other parts differ from them.
SIZES = {"batch": "batch_size", "height": "latent_height", "width": "latent_width", "sequence": "sequence_length"}
NOT_COVERED = {
    "safety_checker": "the images are then not checked; check them yourself",
    "image_encoder": "an IP-Adapter then has no images",
    "controlnet": "export its UNet with inputs= the residuals, and run the ControlNet in PyTorch",
    "adapter": "export its UNet with inputs= the residuals, and run the adapter in PyTorch",
}


@dataclass(frozen=True)
class PipelineReport:
    """The report of an exported pipeline. It prints as tables; `as_dict()` is plain data.

    Args:
        unet: the report of the UNet.
        comparisons: the comparisons of the other parts with PyTorch, two for each.
        sizes: the bytes of each part on disk, by its folder.
        seconds: the wall time of each part, in seconds.
    """

    unet: ExportReport
    comparisons: tuple[Comparison, ...]
    sizes: dict[str, int]
    seconds: dict[str, float]

    def __str__(self) -> str:
        rows = [("part", "input", "largest |eager|", "difference", "bound", "")]
        for c in self.comparisons:
            (shape,) = c.shapes.values()
            verdict = "ok" if c.holds else "OUT OF BOUNDS"
            figures = (f"{c.largest:.3g}", f"{c.difference:.3g}", f"{c.bound:.3g}")
            rows.append((c.model, "x".join(map(str, shape)), *figures, verdict))
        sizes = [("folder", "MB", "seconds")]
        sizes += [(name, f"{size / 1e6:.1f}", f"{self.seconds.get(name, 0):.1f}") for name, size in self.sizes.items()]
        sizes.append(("whole pipeline", f"{sum(self.sizes.values()) / 1e6:.1f}", f"{sum(self.seconds.values()):.1f}"))
        return "\n\n".join([str(self.unet), format_table(rows), format_table(sizes)])

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain data."""
        return asdict(self)


@checked(SpecError)
def export_pipeline(
    pipe: Annotated[Any, Any],
    directory: Text | os.PathLike[str],
    *,
    target: Target = "portable",
    dtype: torch.dtype | None = None,
    calls: Any = 50,
    opset: Annotated[int, Bounds(ge=OPSETS[0], le=OPSETS[-1])] = 20,
    provider: str | None = None,
    precision: str | None = None,
    quantize: Quantize | None = None,
    calibration: Annotated[Calibration | None, Any] = None,
    leave_out: Collection[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> PipelineReport:
    """Write a pipeline of Stable Diffusion or SDXL as ONNX models: text encoders, UNet, VAE, and what else it needs.

    The folder has the layout of optimum, whose `ORTStableDiffusionPipeline` and `ORTStableDiffusionXLPipeline` load it
    unchanged and run `unet/model.onnx`. `sdgraph.exporters.ort.open_pipeline` and `sdgraph generate` also run the
    variants beside that file, which inherit features. Every model is compared with PyTorch. The folder appears complete
    and checked, or not at all.

    Args:
        pipe: the pipeline of diffusers, whose UNet is a `UNet2DConditionModel` or what `sdgraph.apply` returned. Fuse
            LoRA into its weights beforehand.
        directory: the directory to write; missing parents are created.
        target: the operators of the UNet, see `export`.
        dtype: the dtype of the UNet and the text encoders, float32 or float16; by default the UNet's. The VAE is in
            float32, because that of SDXL overflows in float16.
        calls: the generations to serve, see `export`.
        opset: version of the ONNX operators, 18 to 20.
        provider: a provider of ONNX Runtime on which the UNet is compared as well.
        precision: the precision of that provider.
        quantize: the layers of the UNet to compute in 8 bits, see `export`.
        calibration: the images on which these are calibrated.
        leave_out: the parts to leave out, such as "safety_checker", which are not exported.
        overwrite: replace an earlier export, once the new one is checked.
        progress: show a progress bar.
    Returns:
        The report.
    Raises:
        ExtraError: the extra `onnx` is not installed.
        ExportError: a part is not covered; the directory exists or cannot be written; or a translation failed.
        ParityError: the numbers are out of bounds.
        SpecError: an option has no such value.
    Example:
        `print(export_pipeline(pipe, "sd15-onnx", leave_out=["safety_checker"]))`
    """
    require_onnx()
    kind = _kind(pipe, leave_out)
    if isinstance(pipe.unet, SwitchUNet):
        hint = "export the switch alone (sdgraph.exporters.onnx.export), or give the pipeline one of its UNets"
        raise ExportError("a pipeline is exported with one UNet, and this is a switch", where="unet", hint=hint)
    _check_latents(pipe)
    xl = kind == "StableDiffusionXLPipeline"
    dtype = dtype or pipe.unet.dtype
    encoders = [name for name in TEXT_ENCODERS if getattr(pipe, name, None) is not None]
    parts = [text_part(name, getattr(pipe, name), dtype, xl) for name in encoders]
    parts += vae_parts(pipe.vae)
    of_unet = {"target": target, "calls": calls, "provider": provider, "precision": precision}
    of_unet |= {"quantize": quantize, "calibration": calibration}
    with appearing(directory, partial(check_target, overwrite), ExportError) as folder:
        try:
            report = _export(pipe, folder, kind, parts, dtype, opset, progress, of_unet)
        except OSError as error:
            raise ExportError(
                f"writing failed: {error.strerror or error}", where=str(directory), hint="check space and rights"
            ) from error
    log.info("exported to %s\n%s", directory, report)
    return report


def _export(
    pipe: Any,
    folder: Path,
    kind: str,
    parts: Sequence[Part],
    dtype: torch.dtype,
    opset: int,
    progress: bool,
    of_unet: Mapping[str, Any],
) -> PipelineReport:
    """Write all parts and the manifest.

    Raises:
        ParityError: a part is out of bounds.
    """
    seconds: dict[str, float] = {}
    comparisons: list[Comparison] = []
    with Bar(total=len(parts), desc="export", unit="part", disable=not progress) as bar:
        for part in parts:
            bar.set_description(f"export: {part.name}")
            start = time.perf_counter()
            comparisons += write_part(part, folder / part.name, opset)
            seconds[part.name] = time.perf_counter() - start
            bar.update()
    start = time.perf_counter()
    unet = export(pipe.unet, folder / UNET, dtype=dtype, opset=opset, progress=progress, **of_unet)
    seconds[UNET] = time.perf_counter() - start
    _plain(folder / UNET)
    pipe.scheduler.save_pretrained(folder / SCHEDULER)
    tokenizers = {name: getattr(pipe, name) for name in TOKENIZERS if getattr(pipe, name, None) is not None}
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
        if not (folder / name / "vocab.json").is_file():  # transformers 5 writes neither of the files that 4 reads
            tokenizer.backend_tokenizer.model.save(str(folder / name))
    manifest = PipelineManifest(
        kind,  # type: ignore[arg-type]
        str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        type(pipe.scheduler).__name__,
        {name: _tokenizer(value) for name, value in tokenizers.items()},  # type: ignore[misc]
        {name: bool(pipe.config[name]) for name in SETTINGS if pipe.config.get(name) is not None},
    )
    _write_index(manifest, folder)
    sizes = {path.name: _bytes(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    report = PipelineReport(unet, tuple(comparisons), sizes, seconds)
    write_pipeline_manifest(manifest, folder)
    (folder / REPORT).write_text(json.dumps({"format": FORMAT, **report.as_dict()}, indent=2) + "\n")
    for comparison in comparisons:
        if not comparison.holds:
            raise ParityError(
                f"an exported part is out of bounds against PyTorch\n{report}",
                where=comparison.model,
                hint="nothing was written; in float16 try float32, else report it",
            )
    return report


def _kind(pipe: Any, leave_out: Collection[str]) -> str:
    """Return the class of a pipeline for text, and refuse parts that are not covered.

    Raises:
        ExportError: a part is not covered.
        SpecError: a part to leave out has no such name.
    """
    name = type(pipe).__name__
    kind = next((kind for kind, classes in CLASSES.items() if name in classes.values()), None)
    if kind is None:
        covered = ", ".join(name for classes in CLASSES.values() for name in classes.values())
        raise ExportError(
            f"a {name} is not covered",
            where="pipe",
            hint=f"covered: {covered}; of others, export the UNet alone (sdgraph.exporters.onnx.export, --unet-only)",
        )
    components = pipe.components
    for name in leave_out:
        if name not in NOT_COVERED:
            raise SpecError(f"{name!r} cannot be left out", where="leave_out", hint=f"one of {', '.join(NOT_COVERED)}")
    for name, advice in NOT_COVERED.items():
        if components.get(name) is not None and name not in leave_out:
            raise ExportError(
                f"the {name} of this pipeline is not exported",
                where=name,
                hint=f"pass leave_out=[{name!r}] (--leave-out {name}): {advice}",
            )
    count = 2 if kind == "StableDiffusionXLPipeline" else 1
    for name in ("vae", "unet", "scheduler", *TEXT_ENCODERS[:count], *TOKENIZERS[:count]):
        if components.get(name) is None:
            raise ExportError(f"the pipeline has no {name}", where=name, hint="load it with all of its parts")
    return kind


def _check_latents(pipe: Any) -> None:
    """Refuse a VAE whose latents are not those of the UNet."""
    own, other = pipe.vae.config["latent_channels"], pipe.unet.config["out_channels"]
    if own != other:
        raise ExportError(
            f"the VAE decodes latents with {own} channels, and the UNet makes latents with {other}",
            where="vae",
            hint="give the pipeline the VAE that its UNet was trained with",
        )


def _tokenizer(tokenizer: Any) -> str:
    """Return the class of a tokenizer; a fast one of transformers is written in the form that every version reads.

    Raises:
        ExportError: it is none of CLIP's.
    """
    name = type(tokenizer).__name__
    if name not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise ExportError(
            f"the tokenizer is a {name}, which is not covered", where="tokenizer", hint="give it CLIP's tokenizer"
        )
    return name


def _plain(folder: Path) -> None:
    """Write `model.onnx` of a UNet with the names of optimum: a scalar timestep, one output, its names of sizes.

    The graph that computes everything becomes `variant_0.onnx`, unless the UNet inherits features and has one already.
    """
    import onnx

    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest)
    if manifest.variants[0].file == MODEL:
        own = "variant_0.onnx"  # as of a UNet that inherits
        (folder / MODEL).rename(folder / own)
        manifest = replace(manifest, variants=(replace(manifest.variants[0], file=own), *manifest.variants[1:]))
    model = onnx.load(folder / manifest.variants[0].file, load_external_data=False)
    del model.graph.output[1:]
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in SIZES:
                dim.dim_param = SIZES[dim.dim_param]
    _scalar_timestep(model)
    onnx.save(model, folder / MODEL)
    write_manifest(manifest, folder)


def _scalar_timestep(model: Any) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    timestep = next(value for value in model.graph.input if value.name == "timestep")
    row = "timestep_row"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "timestep":
                node.input[i] = row
    del timestep.type.tensor_type.shape.dim[:]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "timestep_axis"))
    model.graph.node.insert(0, helper.make_node("Unsqueeze", ["timestep", "timestep_axis"], [row], name="timestep"))


def _write_index(manifest: PipelineManifest, folder: Path) -> None:
    """Write `model_index.json`, from which optimum takes the scheduler and the tokenizers."""
    index: dict[str, Any] = {
        "_class_name": manifest.kind,
        "_diffusers_version": diffusers.__version__,
        SCHEDULER: ["diffusers", manifest.scheduler],
        **{name: ["transformers", kind] for name, kind in manifest.tokenizers.items()},
        **{name: ["diffusers", "OnnxRuntimeModel"] for name in (*manifest.text_encoders, UNET, ENCODER, DECODER)},
    }
    index.update((str(name), value) for name, value in manifest.settings.items())
    if manifest.kind == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
