"""The models of an exported directory as ONNX Runtime's sessions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdgraph.dims import evaluate
from sdgraph.errors import CallError, ExtraError, SavedError, SpecError, did_you_mean

from .manifest import AGAIN, NAMES, Manifest, Model

log = logging.getLogger("sdgraph")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# cuDNN's exhaustive search, the default, is run anew for every size of a call.
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
_ORT = {torch.float32: "tensor(float)", torch.float16: "tensor(float16)", torch.int64: "tensor(int64)"}


class Models:
    """The graphs of a directory, each opened when it is first run.

    Args:
        folder: where they are; checked.
        others: see `ORTUNet.from_pretrained`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: str | None,
        provider_options: Mapping[str, Any] | None,
        session_options: Any,
        free_dims: Mapping[str, int] | None,
    ) -> None:
        import onnxruntime

        self.folder, self.manifest = folder, manifest
        self.provider = _provider(provider, onnxruntime.get_available_providers())
        options = {**(CUDA_OPTIONS if self.provider == CUDA else {}), **(provider_options or {})}
        self._provider_options = {key: str(value) for key, value in options.items()}
        self._session_options = onnxruntime.SessionOptions() if session_options is None else session_options
        self._sizes = _free(free_dims or {}, self._session_options)
        if manifest.artefact == "cuda" and self.provider != CUDA:  # then models are not opened as files
            where = "session.model_external_initializers_file_folder_path"
            self._session_options.add_session_config_entry(where, str(folder.resolve()))
        self._sessions: dict[Model, Any] = {}
        self._chosen: dict[frozenset[str], Model] = {}

    def of(self, stale: frozenset[str]) -> Model:
        """The model for calls at which the sites `stale` are inherited, or one that computes more."""
        if stale not in self._chosen:
            model, exact = self.manifest.model_for(stale)
            if not exact:
                log.warning(
                    "no model was exported for calls that inherit %s: %s computes more; export with calls= the "
                    "generations that are run", sorted(stale), model.file,
                )  # fmt: skip
            self._chosen[stale] = model
        return self._chosen[stale]

    def run(
        self, model: Model, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of a model, on the session's device.

        Args:
            given: its inputs, by name.
            sizes: of the call.
        Raises:
            CallError: other sizes than `free_dims`.
        """
        for name, size in self._sizes.items():
            if sizes.get(name, size) != size:
                raise CallError(
                    f"{NAMES[name]} is {sizes[name]}, and this UNet was loaded for {size}",
                    where="free_dims",
                    cure="load it without free_dims, or once more for these sizes",
                )
        session = self.session(model)
        binding = session.io_binding()
        bound, results = [], []  # ONNX Runtime gets addresses: what they belong to must live until it is done
        for spec in self.manifest.inputs_of(model):
            value = given[spec.name].detach().to(self.device, self.manifest.dtype_of(spec)).contiguous()
            bound.append(value)
            binding.bind_input(spec.name, *_buffer(value))
        for spec in self.manifest.outputs_of(model):
            shape = [d if isinstance(d, int) else evaluate(d, sizes) for d in spec.shape or ()]
            results.append(torch.empty(shape, dtype=self.manifest.torch_dtype, device=self.device))
            binding.bind_output(spec.name, *_buffer(results[-1]))
        if self.device.type == "cuda":  # ONNX Runtime has a stream of its own; a run ends with it synchronised
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)
        return tuple(results)

    @property
    def device(self) -> torch.device:
        """Where sessions want tensors. Without a CUDA build of PyTorch they stay on the CPU and are copied."""
        if self.provider == CUDA and torch.cuda.is_available():
            return torch.device("cuda", int(self._provider_options.get("device_id", 0)))
        return torch.device("cpu")

    def session(self, model: Model) -> Any:
        """The session of a model, opened when first asked for.

        Raises:
            SavedError: ONNX Runtime refuses it, or it is not what the manifest says.
            ExtraError: the provider does not start.
        """
        if model not in self._sessions:
            self._sessions[model] = self._open(model)
        return self._sessions[model]

    def close(self, model: Model) -> None:
        self._sessions.pop(model, None)

    def _open(self, model: Model) -> Any:
        import onnxruntime

        path = self.folder / model.file
        what: str | bytes = str(path)
        if self.manifest.artefact == "cuda" and self.provider != CUDA:
            from .reference import runnable

            what = runnable(path)
        try:
            session = onnxruntime.InferenceSession(
                what, self._session_options, providers=[(self.provider, self._provider_options)]
            )
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise SavedError(
                f"ONNX Runtime refuses the model: {error}",
                where=str(path),
                cure=f"check provider_options and session_options; if they are right, {AGAIN}",
            ) from error
        if self.provider not in session.get_providers():
            raise ExtraError(
                f"{self.provider} does not start here",
                where="provider",
                cure=f"check the device, its driver and libraries, or pass provider={CPU!r}",
            )
        found = {each.name: each.type for each in session.get_inputs()}
        wanted = {spec.name: _ORT[self.manifest.dtype_of(spec)] for spec in self.manifest.inputs_of(model)}
        outputs = [each.name for each in session.get_outputs()]
        if found != wanted or outputs != [spec.name for spec in self.manifest.outputs_of(model)]:
            raise SavedError("the model's inputs are not those of the manifest", where=str(path), cure=AGAIN)
        return session


def _free(sizes: Mapping[str, int], session_options: Any) -> dict[str, int]:
    """Sizes by symbol, told to ONNX Runtime by the names that they have there."""
    symbols = {name: symbol for symbol, name in NAMES.items()}
    for name, size in sizes.items():
        if name not in symbols:
            cure = did_you_mean(name, symbols) or f"one of {', '.join(symbols)}"
            raise SpecError(f"no size {name!r}", where="free_dims", cure=cure)
        session_options.add_free_dimension_override_by_name(name, size)
    return {symbols[name]: size for name, size in sizes.items()}


def _buffer(tensor: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
    """A contiguous tensor as ONNX Runtime binds it: device, its index, element type, shape, address."""
    return tensor.device.type, tensor.device.index or 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def _provider(name: str | None, available: list[str]) -> str:
    if name is None:
        return CUDA if CUDA in available and torch.cuda.is_available() else CPU
    if name not in available:
        cure = f"{did_you_mean(name, available, 1)} available: {', '.join(available)}".strip()
        raise SpecError(f"ONNX Runtime has no provider {name!r}", where="provider", cure=cure)
    return name


def check_model(path: Path) -> None:
    """Refuse a model file that reaches outside of its directory, or for more than there is.

    Raises:
        SavedError: with what is unsound.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors are of its own implementation
        raise SavedError(f"{path.name} is damaged", where=str(path), cure=AGAIN) from error
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    if model.functions or any(n.domain not in ("", "ai.onnx", "com.microsoft") for n in model.graph.node):
        raise SavedError("the model has operators of its own", where=str(path), cure=AGAIN)


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
