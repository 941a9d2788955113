"""`Quantize`: the convolutions and linears of exported models in 8 bits, with scales calibrated on generations."""

from __future__ import annotations

import fnmatch
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sdgraph.errors import ParityError, SpecError
from sdgraph.options import Count, Number, Seed, checked
from sdgraph.plan_search.final_latents import check_request as check_generation
from sdgraph.plan_search.final_latents import final_latents
from sdgraph.runtime.recorded_calls import spread
from sdgraph.spec import Spec

from ..bundle.external_data import Weights
from ..bundle.manifest import DATA, ExportedVariant, Manifest
from ..ort.open_sessions import OpenSessions
from ..ort.providers import CPU, require_eight_bits
from ..ort.sessions import Sessions
from ..ort.unet import ORTUNet
from .parity import Quantization
from .sensitivity import Layer, Range, cheapest, measured

if TYPE_CHECKING:
    import onnx

# Layers of little work whose errors reach everything: the first and the last convolution, the embeddings of time, and
# the keys and values of the text, which are computed once per generation where they are hoisted.
SENSITIVE = ("conv_in", "conv_out", "*time_emb*", "*add_embedding*", "*class_embedding*", "*attn2.to_k", "*attn2.to_v")
KINDS = {"Conv": "convolutions", "MatMul": "linears", "Gemm": "linears"}
SENSITIVITY_CALLS = 4
HELD_OUT = 4  # every fourth prompt is for the check

log = logging.getLogger("sdgraph")


@dataclass(frozen=True)
class Quantize(Spec):
    """The layers of a UNet that are computed in 8 bits, and how.

    Activations have 8 bits without a sign and one scale per tensor, weights 8 bits with a sign and a scale per output
    channel. Static scales are calibrated with the plan on: each variant on the calls that it computes.

    Args:
        convolutions: "static", or "float" for none.
        linears: "static"; "dynamic" for scales that ONNX Runtime's CPU provider finds at each call, over all samples
            of the batch, so that an image depends on the others; or "float" for none.
        keep: patterns of the paths of layers that stay in float, as "conv_in" or "up_blocks.3.*".
        psnr: the lowest PSNR of the final latents of a held-out prompt to those of float, in dB.
        goal: the mean PSNR on the other prompts for which static layers go back to float, in dB: those whose error is
            large for the time that they save. The strategy that was found has no goal, and names them in `keep`.
    Example:
        `export(unet, "unet-8-bits", quantize=Quantize(), calibration=Calibration(pipe, prompts))`
    Source:
        The contract of static scales is that of Q-Diffusion (Li et al., 2023): calibration along the trajectory.
    """

    convolutions: Literal["static", "float"] = "static"
    _: KW_ONLY
    linears: Literal["static", "dynamic", "float"] = "static"
    keep: tuple[str, ...] = SENSITIVE
    psnr: Number = 20.0
    goal: Number | None = None

    def __post_init__(self) -> None:
        if self.convolutions == self.linears == "float":
            raise SpecError("all layers stay in float", where="Quantize", hint="leave one of the two options out")

    def mode(self, node: onnx.NodeProto, path: str) -> str:
        """Return the mode of a layer: "static", "dynamic" or "float".

        Args:
            node: the node of the layer.
            path: the path of its module.
        """
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.keep):
            return "float"
        return str(getattr(self, KINDS[node.op_type]))


class Calibration:
    """The generations of a pipeline on which scales are calibrated, and those on which the result is checked.

    Args:
        pipe: the diffusers pipeline, whose solver adds no random numbers.
        prompts: the prompts; the first and every fourth after it are held out for the check.
        seed: the seed of the first image's latents; the others count up from it.
        batch: the number of prompts of a generation.
        call: further arguments of the pipeline, such as `num_inference_steps=20`.
    Raises:
        SourceError: the pipeline has no UNet, or its solver adds random numbers.
        SpecError: there are fewer than two prompts.
    Example:
        `Calibration(pipe, prompts, num_inference_steps=20)`
    """

    @checked(SpecError)
    def __init__(self, pipe: Any, prompts: Sequence[str], *, seed: Seed = 0, batch: Count = 4, **call: Any) -> None:
        check_generation("Calibration", pipe, prompts, call)
        if len(prompts) < 2:
            raise SpecError(
                "one prompt cannot both calibrate and check", where="prompts", hint="pass 8 prompts or more"
            )
        self.pipe, self.seed, self.batch, self.call = pipe, seed, batch, call
        self.held_out = tuple(prompts[::HELD_OUT])
        self.prompts = tuple(prompt for number, prompt in enumerate(prompts) if number % HELD_OUT)

    def latents(self, unet: Any, held_out: bool) -> torch.Tensor:
        """Return the final latents with a UNet, (images, channels, height, width).

        Args:
            unet: the UNet that generates.
            held_out: whether the prompts are those of the check.
        """
        prompts = self.held_out if held_out else self.prompts
        return torch.cat(
            [
                final_latents(self.pipe, unet, prompts[at : at + self.batch], self.seed + at, self.call)[0]
                for at in range(0, len(prompts), self.batch)
            ]
        )


def check_request(quantize: Quantize | None, calibration: Calibration | None, manifest: Manifest) -> None:
    """Refuse 8 bits before the minutes of an export.

    Args:
        quantize: the layers and how, or None.
        calibration: the generations, or None.
        manifest: the manifest of the export.
    Raises:
        SpecError: one is given without the other, or the models or this processor do not allow 8 bits.
    """
    if quantize is None or calibration is None:
        what, other = ("calibration", "quantize") if quantize is None else ("quantize", "calibration")
        hint = "calibration=Calibration(pipe, prompts), or on the command line --quantize with --prompts"
        raise SpecError(f"{what} without {other}", where=what, hint=hint)
    if manifest.target == "cuda":
        raise SpecError(
            "ONNX Runtime's CUDA provider computes layers in 8 bits as float, and slower",
            where="quantize",
            hint="on an NVIDIA GPU TensorRT has 8 bits; for a CPU choose target='portable'",
        )
    if manifest.layout == "single":
        raise SpecError("8 bits need one file for each variant", where="layout", hint="layout='variants'")
    if manifest.dtype != "float32":
        raise SpecError(
            f"a UNet in {manifest.dtype} has no 8 bits for a CPU", where="quantize", hint="dtype=torch.float32"
        )
    require_eight_bits(CPU)


def quantized(
    folder: Path, manifest: Manifest, config: Mapping[str, Any], quantize: Quantize, calibration: Calibration
) -> Quantization:
    """Replace the models of a bundle by those with layers in 8 bits.

    Args:
        folder: the folder of the bundle in float, whose models and weights are replaced.
        manifest: its manifest.
        config: the configuration of the UNet.
        quantize: the layers and how.
        calibration: the generations.
    Returns:
        The number of layers by mode; the quality is not measured yet.
    Raises:
        SpecError: a value is not finite on the calibration, or no layer is left.
    """
    sessions = CalibratingSessions(folder, manifest, quantize)
    reference = calibration.latents(ORTUNet({"": sessions}, config), held_out=False)
    new = folder / "new"
    found = _write(folder, new, manifest, quantize, sessions.ranges)
    chosen, error, layers = quantize, math.inf, list[Layer]()
    while quantize.goal is not None:
        latents = calibration.latents(ORTUNet({"": _sessions(new, manifest)}, config), held_out=False)
        reached = float(np.mean(latent_psnr(latents, reference)))
        log.info("%.1f dB on the prompts of the calibration: %s", reached, found)
        if reached >= quantize.goal:
            break
        if not layers:
            layers = _measured(folder, new, manifest, quantize, sessions)
            error = math.fsum(layer.error for layer in layers)
        if all(layer.path in chosen.keep for layer in layers):
            raise SpecError(
                f"{reached:.1f} dB with all layers in float that may go back", where="Quantize.goal",
                hint="linears='static' or 'float', or a lower goal",
            )  # fmt: skip
        error *= 10 ** (-max(quantize.goal - reached, 0.5) / 10)  # squared errors of layers add up to that of the image
        chosen = replace(quantize, keep=(*quantize.keep, *cheapest(layers, error)))
        shutil.rmtree(new)
        found = _write(folder, new, manifest, chosen, sessions.ranges)
    if set(found.layers) <= {"float"}:
        raise SpecError(
            "no layer is left for 8 bits", where="Quantize", hint="keep fewer layers in float, or a lower goal"
        )
    for file in new.iterdir():
        file.replace(folder / file.name)
    new.rmdir()
    return replace(found, strategy=str(replace(chosen, goal=None)))


def _sessions(folder: Path, manifest: Manifest) -> Sessions:
    return Sessions(
        folder, manifest, CPU, None, None, None, None, False, OpenSessions(dict.fromkeys(manifest.own_files, 0))
    )


def _write(
    folder: Path, new: Path, manifest: Manifest, quantize: Quantize, ranges: Mapping[str, Mapping[str, Range]]
) -> Quantization:
    """Write the models with layers in 8 bits to a new folder."""
    import onnx
    import onnx_ir

    new.mkdir()
    weights, counts = Weights(new / DATA), dict[str, int]()
    for variant in manifest.variants:
        if variant.file not in ranges:
            raise SpecError(
                f"no calibration call uses {variant.file}",
                where="calibration",
                hint="calibrate with the scheduler and the number of steps that calls= has",
            )
        model = onnx.load(folder / variant.file)
        modes = _modes(model, quantize)
        model = _dynamic(_static(model, modes, ranges[variant.file]), modes)
        if not counts:
            counts = {mode: list(modes.values()).count(mode) for mode in sorted(set(modes.values()))}
        converted = onnx_ir.from_proto(model)
        weights.take(converted)
        onnx_ir.save(converted, new / variant.file)
    return Quantization(str(quantize), counts)


def _measured(
    folder: Path, new: Path, manifest: Manifest, quantize: Quantize, sessions: CalibratingSessions
) -> list[Layer]:
    """Measure the static layers of the variant that computes everything."""
    import onnx

    file = manifest.variants[0].file
    model = onnx.load(folder / file, load_external_data=False)
    modes = _modes(model, quantize)
    paths = {node.name: path_of(node) for node in model.graph.node if modes.get(node.name) == "static"}
    calls = spread(sessions.calls, SENSITIVITY_CALLS)
    options = partial(_options, sessions.threads)
    return measured(folder / file, paths, sessions.ranges[file], calls, new / file, options)


class CalibratingSessions(Sessions):
    """The float models of a bundle, which record the ranges of activations while a pipeline generates.

    Args:
        folder: the folder of the bundle.
        manifest: its manifest.
        quantize: the layers whose activations are recorded.
    """

    def __init__(self, folder: Path, manifest: Manifest, quantize: Quantize) -> None:
        super().__init__(
            folder, manifest, CPU, None, None, None, None, False, OpenSessions(dict.fromkeys(manifest.own_files, 0))
        )
        self.quantize = quantize
        self.ranges: dict[str, dict[str, Range]] = {}
        self.calls: list[Mapping[str, Any]] = []  # of the variant that computes everything
        self._watched: dict[str, tuple[Any, list[str]]] = {}

    def run(
        self, variant: ExportedVariant, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> tuple[torch.Tensor, ...]:
        session, names = self._watch(variant)
        inputs = {spec.name: self._input(spec, variant, given, sizes) for spec in self.manifest.session_inputs(variant)}
        arrays = {name: value.numpy() for name, value in inputs.items()}
        if variant is self.manifest.variants[0]:
            self.calls.append({name: value.copy() for name, value in arrays.items()})
        values = session.run(None, arrays)
        outputs, seen = values[: -2 * len(names)], values[-2 * len(names) :]
        ranges = self.ranges.setdefault(variant.file, {})
        for name, low, high in zip(names, seen[::2], seen[1::2], strict=True):
            if not math.isfinite(low) or not math.isfinite(high):
                raise SpecError(
                    f"{name} of {variant.file} is not finite at a calibration call",
                    where="calibration",
                    hint="check the weights and the prompts; an image of this UNet has no finite values either",
                )
            before = ranges.get(name, (0.0, 0.0))  # zero is always exact, as in padding
            ranges[name] = min(before[0], float(low)), max(before[1], float(high))
        return tuple(map(torch.from_numpy, outputs))

    def _watch(self, variant: ExportedVariant) -> tuple[Any, list[str]]:
        """Return the session of a variant with further outputs: the least and the largest of each activation."""
        import onnx
        from onnx import TensorProto, helper

        if variant.file not in self._watched:
            model = onnx.load(self.folder / variant.file, load_external_data=False)
            modes = _modes(model, self.quantize)
            layers = [node for node in model.graph.node if modes.get(node.name) == "static"]
            names = list(dict.fromkeys(name for node in layers for name in (node.input[0], node.output[0])))
            for number, name in enumerate(names):
                for kind in ("ReduceMin", "ReduceMax"):
                    output = f"sdgraph.{kind}.{number}"
                    model.graph.node.append(helper.make_node(kind, [name], [output], keepdims=0))
                    model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ()))
            path = self.folder / f"watched-{variant.file}"  # beside the weights
            onnx.save(model, path)
            self._watched[variant.file] = self._provider.session(str(path), _options(self.threads), self.threads), names
            path.unlink()
        return self._watched[variant.file]


def with_quality(
    quantize: Quantize, found: Quantization, latents: torch.Tensor, reference: torch.Tensor
) -> Quantization:
    """Return a quantisation with its quality.

    Args:
        quantize: the layers and the bound.
        found: the quantisation.
        latents: the final latents of the held-out prompts in 8 bits, (images, channels, height, width).
        reference: the same in float, (images, channels, height, width).
    Raises:
        ParityError: an image is below the bound, or not finite.
    """
    each = latent_psnr(latents, reference)
    worst = math.nan if any(map(math.isnan, each)) else min(each)
    found = replace(found, psnr=float(np.mean(each)), worst=worst, prompts=len(each))
    if not worst >= quantize.psnr:
        raise ParityError(
            f"{worst:.1f} dB to float at the worst held-out prompt, below {quantize.psnr:g}\n{found}",
            where="Quantize.psnr",
            hint="nothing was written; keep more layers in float, calibrate on more prompts, or lower psnr=",
        )
    return found


def latent_psnr(latents: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Return the PSNR of each image's latents in dB; the peak is the span of its reference.

    Args:
        latents: the latents, (images, channels, height, width).
        reference: the reference latents, (images, channels, height, width).
    """
    error = (latents.double() - reference.double()).square().flatten(1).mean(1).sqrt()
    flat = reference.double().flatten(1)
    span = flat.amax(1) - flat.amin(1)
    return [float(value) for value in 20 * torch.log10(span / error)]


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    return options


def path_of(layer: onnx.NodeProto) -> str:
    """Return the path of the module of a layer, which its weight is named after."""
    name: str = layer.input[1].rstrip("_")
    return name.removesuffix(".T").removesuffix(".weight")  # a transposed weight has a further suffix


def _modes(model: onnx.ModelProto, quantize: Quantize) -> dict[str, str]:
    """Return the mode of each layer with a constant weight, by the name of its node."""
    constants = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) >= 2}
    return {
        node.name: quantize.mode(node, path_of(node))
        for node in model.graph.node
        if node.op_type in KINDS and node.input[1] in constants
    }


def _static(model: onnx.ModelProto, modes: Mapping[str, str], ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """Put QuantizeLinear and DequantizeLinear around the static layers.

    ONNX Runtime computes a convolution in 8 bits only if the one consumer of its output is a QuantizeLinear; a matrix
    product needs none, and keeps its output in float.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    nodes = [name for name, mode in modes.items() if mode == "static"]
    if not nodes:
        return model
    held = {tensor.name for tensor in model.graph.initializer}
    infos = [info for info in model.graph.value_info if info.name not in held]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    data = {name: tuple(np.array(bound, np.float32) for bound in pair) for name, pair in ranges.items()}
    quantizer = QDQQuantizer(
        model, per_channel=True, reduce_range=False, weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data), nodes_to_quantize=nodes, nodes_to_exclude=[],
        op_types_to_quantize=list(KINDS),
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                       "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}, "WeightSymmetric": True},
    )  # fmt: skip
    quantizer.quantize_model()
    return quantizer.model.model  # type: ignore[no-any-return]


def _dynamic(model: onnx.ModelProto, modes: Mapping[str, str]) -> onnx.ModelProto:
    """Give the dynamic layers scales that are found at each call."""
    from onnxruntime.quantization import QuantizationMode, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

    nodes = [name for name, mode in modes.items() if mode == "dynamic"]
    if not nodes:
        return model
    quantizer = ONNXQuantizer(
        model, True, False, QuantizationMode.IntegerOps, False, QuantType.QInt8, QuantType.QUInt8, None, nodes, [],
        ["MatMul", "Gemm"], {"MatMulConstBOnly": True},
    )  # fmt: skip
    quantizer.quantize_model()
    return quantizer.model.model  # type: ignore[no-any-return]
