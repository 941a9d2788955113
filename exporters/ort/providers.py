"""The execution providers of ONNX Runtime: the choice of one of those installed, and its options."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdgraph.errors import ExtraError, SpecError, did_you_mean
from sdgraph.extra import imported

CPU, CUDA, OPENVINO = "CPUExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider"
PLUGIN = "onnxruntime_ep_openvino"  # the package that brings OpenVINO's provider
# cuDNN's exhaustive search, the default, runs again for every size of a call.
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
# OpenVINO's names of the dtypes that it computes in.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
# Instructions that add products of 8 bits in 32 bits, as Linux names them.
EIGHT_BITS = frozenset(("avx512_vnni", "avx_vnni"))
# Properties of OpenVINO that other arguments set.
SETTLED = {
    "INFERENCE_PRECISION_HINT": "pass precision=",
    "INFERENCE_NUM_THREADS": "pass session_options={'intra_op_num_threads': N}",
}

log = logging.getLogger("sdgraph")
_registering = threading.Lock()


@dataclass(frozen=True)
class Provider:
    """An execution provider with its options.

    Args:
        name: ONNX Runtime's name of the provider.
        precision: the dtype that it computes in: "float32", "float16" or "bfloat16".
        options: its options.
        device: the device of a plugin; None for a provider that is built into ONNX Runtime.
    """

    name: str
    precision: str
    options: Mapping[str, str] = field(default_factory=dict)
    device: Any = None

    def __str__(self) -> str:
        return f"{self.name} in {self.precision}"

    def session(self, model: str | bytes, options: Any, threads: int) -> Any:
        """Open a session of a model; ONNX Runtime's errors pass through.

        Args:
            model: the path of the model, or the serialized model.
            options: the `SessionOptions`, to which a plugin is added.
            threads: the number of threads for a plugin, which does not read those of `options`.
        """
        import onnxruntime

        if self.device is None:
            return onnxruntime.InferenceSession(model, options, providers=[(self.name, dict(self.options))])
        properties = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
            "INFERENCE_NUM_THREADS": str(threads),
            **self.options,
        }
        options.add_provider_for_devices([self.device], {"load_config": json.dumps({"CPU": properties})})
        return onnxruntime.InferenceSession(model, options, enable_fallback=0)  # otherwise errors select the CPU


def choose(name: str | None, precision: str | None, options: Mapping[str, Any] | None, dtype: str) -> Provider:
    """Return the provider of a name, or the fastest one that is installed.

    Without a name it is CUDA's if ONNX Runtime and PyTorch support CUDA; else OpenVINO's if it is installed and
    multiplies in bfloat16 on this processor, as on recent ones of Intel; else the CPU's. Without a precision every
    provider computes in the dtype of the model, so that the choice changes the numbers by rounding only.

    Args:
        name: the name of the provider, or None.
        precision: the dtype to compute in, or None.
        options: the caller's options of the provider.
        dtype: the dtype of the model, as text.
    Raises:
        SpecError: ONNX Runtime has no such provider, or the provider has no such precision or option.
        ExtraError: the provider is not installed, or has no device here.
    """
    import onnxruntime

    if precision not in (None, "float16", *PRECISIONS):
        hint = did_you_mean(str(precision), PRECISIONS) or f"one of {', '.join(PRECISIONS)}"
        raise SpecError(f"there is no precision {precision!r}", where="precision", hint=hint)
    available = onnxruntime.get_available_providers()
    if name is None:
        name = _fastest(available, precision, dtype)
    if name == OPENVINO:
        return _openvino(precision or "float32", options or {})
    if name not in available:
        known = list(dict.fromkeys((*available, OPENVINO)))
        short = [full for full in known if full.lower().startswith(str(name).lower())]
        near = f"did you mean {short[0]!r}?" if short else did_you_mean(str(name), known, 1)
        hint = f"{near} available: {', '.join(known)}".strip()
        raise SpecError(f"ONNX Runtime has no provider {name!r}", where="provider", hint=hint)
    if precision not in (None, dtype):
        hint = f"provider={OPENVINO!r}, which has {' and '.join(PRECISIONS)}; or export the UNet in another dtype"
        raise SpecError(f"{name} computes a {dtype} model in {dtype}, not in {precision}", where="precision", hint=hint)
    chosen = {**(CUDA_OPTIONS if name == CUDA else {}), **(options or {})}
    return Provider(name, dtype, {key: str(value) for key, value in chosen.items()})


def _fastest(available: list[str], precision: str | None, dtype: str) -> str:
    """Return the name of the default provider."""
    if CUDA in available and torch.cuda.is_available() and precision in (None, dtype):
        return CUDA
    if precision not in (None, dtype):
        return OPENVINO  # the only provider with a choice of precision; it raises if it is missing
    if dtype != "float32" or importlib.util.find_spec(PLUGIN) is None:
        return CPU
    try:
        device = _device()
    except ExtraError as error:
        log.info("not on OpenVINO: %s", error.what)
        return CPU
    if not has_bfloat16(device):
        return CPU
    log.info("precision='bfloat16' is faster on this processor than float32, and less precise")
    return OPENVINO


def has_bfloat16(device: Any) -> bool:
    """Return whether OpenVINO multiplies in bfloat16 on a device; elsewhere it would compute in float32 instead."""
    return "BF16" in dict(device.ep_metadata).get("OPTIMIZATION_CAPABILITIES", "").split()


def require_eight_bits(name: str) -> None:
    """Refuse layers in 8 bits on a provider or a processor that does not compute them as such.

    Args:
        name: the name of the provider.
    Raises:
        SpecError: the provider computes them in float, or the processor has no instructions for them.
    """
    if name not in (CPU, OPENVINO):
        raise SpecError(
            f"{name} computes layers in 8 bits as float, and slower",
            where="provider",
            hint="on an NVIDIA GPU TensorRT has 8 bits; or run the bundle in float there",
        )
    flags = processor_flags()
    if flags and flags.isdisjoint(EIGHT_BITS):
        raise SpecError(
            "this processor has no VNNI: without it, sums of products in 8 bits overflow, and images differ",
            where="quantize",
            hint="export and run the UNet in float here",
        )


def processor_flags() -> frozenset[str]:
    """Return the instruction sets of an x86 processor, as Linux names them; none where they are not known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(found, ()))


def _openvino(precision: str, options: Mapping[str, Any]) -> Provider:
    if precision not in PRECISIONS:
        hint = f"one of {', '.join(PRECISIONS)}"
        raise SpecError(f"{OPENVINO} has no precision {precision!r} on a CPU", where="precision", hint=hint)
    for key in options:
        if key in SETTLED:
            raise SpecError(f"{key} is set by another argument", where="provider_options", hint=SETTLED[key])
        if not key.isupper():
            hint = "properties of OpenVINO's CPU plugin, such as {'CACHE_DIR': 'compiled'}"
            raise SpecError(f"{OPENVINO} has no option {key!r}", where="provider_options", hint=hint)
    device = _device()
    if precision == "bfloat16" and not has_bfloat16(device):
        raise SpecError(
            "this processor does not multiply in bfloat16, and OpenVINO would compute in float32",
            where="precision",
            hint="precision='float32'",
        )
    return Provider(OPENVINO, precision, {key: str(value) for key, value in options.items()}, device)


def _device() -> Any:
    """Return OpenVINO's device for the CPU; the first call registers the plugin.

    Raises:
        ExtraError: the plugin is not installed, does not load, or serves no processor of this kind.
    """
    import onnxruntime

    with _registering:
        if not any(device.ep_name == OPENVINO for device in _devices()):
            library = imported(PLUGIN, "openvino").get_library_path()
            try:
                onnxruntime.register_execution_provider_library(OPENVINO, library)
            except Exception as error:  # ONNX Runtime's errors have no common base
                if "already" not in str(error):
                    raise ExtraError(
                        f"OpenVINO's plugin does not load: {error}",
                        where="provider",
                        hint=f"ONNX Runtime 1.23 or later, and a new {PLUGIN.replace('_', '-')}",
                    ) from error
    for device in _devices():
        if device.ep_name == OPENVINO and dict(device.ep_metadata).get("ov_device") == "CPU":
            return device
    raise ExtraError(
        "OpenVINO's plugin has no device for this processor: it serves Intel's",
        where="provider",
        hint=f"provider={CPU!r}",
    )


def _devices() -> list[Any]:
    import onnxruntime

    if not hasattr(onnxruntime, "get_ep_devices"):
        raise ExtraError(
            f"ONNX Runtime {onnxruntime.__version__} takes no plugins",
            where="provider",
            hint="install ONNX Runtime 1.23 or later",
        )
    return list(onnxruntime.get_ep_devices())
