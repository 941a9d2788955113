"""`ORTUNet`: an exported UNet on ONNX Runtime, in the place of a diffusers UNet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict

from sdgraph.call import UNetCall
from sdgraph.dims import evaluate
from sdgraph.errors import ExtraError, ModeError, SavedError, SpecError, did_you_mean
from sdgraph.inputs import Input

from .extra import require_onnx
from .manifest import AGAIN, MODEL, Manifest, read_config

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# cuDNN's exhaustive search, the default, is run anew for every size of a call.
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
OUTPUT = "out_sample"
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
_ORT = {torch.float32: "tensor(float)", torch.float16: "tensor(float16)", torch.int64: "tensor(int64)"}


class ORTUNet(UNetCall):
    """An exported UNet. Called like a diffusers `UNet2DConditionModel`, in an unmodified pipeline.

    Made by `from_pretrained`.
    """

    def __init__(self, session: Any, manifest: Manifest, config: Mapping[str, Any]) -> None:
        self.session = session
        self.manifest = manifest
        self.config = FrozenDict(config)
        self.dtype = manifest.torch_dtype
        self.device = _device(session)
        if config.get("addition_embed_type") == "text_time":  # SDXL's pipelines read this size from the module
            width = config.get("projection_class_embeddings_input_dim")
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        provider: str | None = None,
        provider_options: Mapping[str, Any] | None = None,
        session_options: Any = None,
    ) -> ORTUNet:
        """Load what `sdgraph.exporters.onnx.export` wrote.

        Args:
            directory: the exported directory.
            provider: of ONNX Runtime; by default CUDA if PyTorch sees a CUDA device and ONNX Runtime has the provider,
                else the CPU.
            provider_options: of that provider; by default settled for CUDA.
            session_options: an `onnxruntime.SessionOptions`.
        Raises:
            SavedError: missing, damaged, changed or unsafe files; nothing was run.
            SpecError: ONNX Runtime has no such provider.
            ExtraError: the `onnx` extra is not installed, or the provider does not start.
        """
        require_onnx()
        import onnxruntime

        folder = Path(directory)
        config, sha256 = read_config(folder)
        manifest = _read_model(folder / MODEL)
        if manifest.config_sha256 != sha256:
            raise SavedError("config.json is not the one the model was exported with", where=str(folder), cure=AGAIN)
        name = _provider(provider, onnxruntime.get_available_providers())
        options = {**(CUDA_OPTIONS if name == CUDA else {}), **(provider_options or {})}
        try:
            session = onnxruntime.InferenceSession(
                str(folder / MODEL), session_options, providers=[(name, {k: str(v) for k, v in options.items()})]
            )
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise SavedError(
                f"ONNX Runtime refuses the model: {error}",
                where=str(folder / MODEL),
                cure=f"check provider_options and session_options; if they are right, {AGAIN}",
            ) from error
        if name not in session.get_providers():
            raise ExtraError(
                f"{name} does not start here",
                where="provider",
                cure=f"check the device, its driver and libraries, or pass provider={CPU!r}",
            )
        _check_session(session, manifest, folder)
        return cls(session, manifest, config)

    # -- the call ------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The noise prediction, without gradients and on the device of `sample`; arguments as of `forward`."""
        return self.forward(*args, **kwargs)

    def call_inputs(self) -> Sequence[Input]:
        return self.manifest.inputs

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The noise prediction for flat inputs, by name. Tensors on the session's device are not copied.

        Raises:
            CallError: the model does not cover the call.
        """
        sizes = self.manifest.check(flat)
        shape = [d if isinstance(d, int) else evaluate(d, sizes) for d in self.manifest.output]
        result = torch.empty(shape, dtype=self.dtype, device=self.device)
        binding = self.session.io_binding()
        bound = []  # ONNX Runtime gets addresses: what they belong to must live until it is done
        for spec in self.manifest.model_inputs:
            value = flat[spec.name].detach().to(self.device, self.manifest.dtype_of(spec)).contiguous()
            bound.append(value)
            binding.bind_input(spec.name, *_buffer(value))
        binding.bind_output(OUTPUT, *_buffer(result))
        if self.device.type == "cuda":  # ONNX Runtime has a stream of its own; a run ends with it synchronised
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        return result.to(flat["sample"].device)

    # -- what pipelines do with a UNet ---------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself, if it is there already.

        Raises:
            ModeError: it is on another device or has another dtype, and a session cannot move.
        """
        for wish in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(wish, torch.dtype) and wish != self.dtype:
                raise ModeError(f"the model is exported in {self.dtype}", cure=f"export unet.to({wish})")
            if isinstance(wish, str | int | torch.device) and not isinstance(wish, bool):
                device = torch.device(wish)
                if (device.type, device.index or 0) != (self.device.type, self.device.index or 0):
                    provider = CUDA if device.type == "cuda" else CPU
                    raise ModeError(
                        f"an ONNX Runtime session cannot move from {self.device} to {device}",
                        cure=f"ORTUNet.from_pretrained(directory, provider={provider!r})",
                    )
        return self

    def eval(self) -> Self:
        """Itself: an exported model has no training mode."""
        return self

    def __getattr__(self, name: str) -> Any:
        if hasattr(UNet2DConditionModel, name):
            cure = "do it on the source UNet, then call sdgraph.apply and export again"
            raise ModeError(f"an exported UNet has no {name}", where="ORTUNet", cure=cure)
        raise AttributeError(f"'ORTUNet' object has no attribute {name!r}")

    def __repr__(self) -> str:
        recipe = ", ".join(self.manifest.recipe) or "no passes"
        return f"ORTUNet({self.session.get_providers()[0]}, {self.manifest.dtype}, {recipe})"


def _buffer(tensor: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
    """A contiguous tensor as ONNX Runtime binds it: device, its index, element type, shape, address."""
    return tensor.device.type, tensor.device.index or 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def _device(session: Any) -> torch.device:
    """Where the session wants its tensors. Without a CUDA build of PyTorch they stay on the CPU and are copied."""
    if session.get_providers()[0] == CUDA and torch.cuda.is_available():
        return torch.device("cuda", int(session.get_provider_options()[CUDA].get("device_id", 0)))
    return torch.device("cpu")


def _provider(name: str | None, available: list[str]) -> str:
    if name is None:
        return CUDA if CUDA in available and torch.cuda.is_available() else CPU
    if name not in available:
        cure = f"{did_you_mean(name, available, 1)} available: {', '.join(available)}".strip()
        raise SpecError(f"ONNX Runtime has no provider {name!r}", where="provider", cure=cure)
    return name


def _read_model(path: Path) -> Manifest:
    """The manifest of a model file, once the file and the weights it refers to are found sound."""
    import onnx

    if not path.is_file():
        raise SavedError(f"{path.name} is missing", where=str(path.parent), cure=AGAIN)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors are of its own implementation
        raise SavedError(f"{path.name} is damaged", where=str(path), cure=AGAIN) from error
    manifest = Manifest.read({each.key: each.value for each in model.metadata_props}, str(path))
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    if model.functions or any(n.domain not in ("", "ai.onnx", "com.microsoft") for n in model.graph.node):
        raise SavedError("the model has operators of its own", where=str(path), cure=AGAIN)
    return manifest


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_external(tensor: Any, path: Path) -> None:
    """Weights lie in the directory, and are all there."""
    entry = {each.key: each.value for each in tensor.external_data}
    location = entry.get("location", "")
    if location != os.path.basename(location) or location in ("", ".", "..") or "\\" in location:
        raise SavedError(f"weights outside of the directory: {location[:100]!r}", where=tensor.name, cure=AGAIN)
    file = path.parent / location
    if not file.is_file():
        raise SavedError(f"{location} is missing", where=str(path.parent), cure=AGAIN)
    try:
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
    except ValueError as error:
        raise SavedError(f"the place of {tensor.name} is damaged", where=str(path), cure=AGAIN) from error
    if end > file.stat().st_size:
        raise SavedError(f"{location} is truncated: {tensor.name} ends at {end}", where=str(file), cure=AGAIN)


def _check_session(session: Any, manifest: Manifest, folder: Path) -> None:
    found = {each.name: each.type for each in session.get_inputs()}
    wanted = {spec.name: _ORT[manifest.dtype_of(spec)] for spec in manifest.model_inputs}
    outputs = [each.name for each in session.get_outputs()]
    if found != wanted or outputs != [OUTPUT]:
        raise SavedError("the model's inputs are not those its metadata names", where=str(folder), cure=AGAIN)
