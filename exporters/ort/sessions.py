"""ONNX Runtime's sessions of the models of an exported directory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdgraph.errors import CallError, ExtraError, SavedError, SdgraphError, SpecError, did_you_mean
from sdgraph.ir.dims import evaluate
from sdgraph.ir.inputs import Input

from ..bundle.external_data import SharedWeights
from ..bundle.manifest import AGAIN, CHOICE, NAMES, ExportedVariant, Manifest
from . import session_options as options
from .io_binding import Captured, run
from .open_sessions import OpenSessions
from .providers import CPU, CUDA, Provider, choose, require_eight_bits

log = logging.getLogger("sdgraph")
_ORT = {torch.float32: "tensor(float)", torch.float16: "tensor(float16)", torch.int64: "tensor(int64)"}


class Sessions:
    """The variants of a directory, each opened when it is first run.

    Args:
        folder: the exported directory, already checked.
        manifest: its manifest.
        provider: the name of the provider, or None; this and the following as in `ORTUNet.from_pretrained`.
        precision: the dtype that OpenVINO computes in, or None.
        provider_options: the options of the provider.
        session_options: a mapping of settings, or a `SessionOptions`.
        free_dims: the sizes that all calls will have, by name.
        cuda_graph: whether to record and replay the kernels of each graph.
        open_sessions: the open sessions of the folder.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: str | None,
        precision: str | None,
        provider_options: Mapping[str, Any] | None,
        session_options: Any,
        free_dims: Mapping[str, int] | None,
        cuda_graph: bool,
        open_sessions: OpenSessions,
    ) -> None:
        import onnxruntime

        self.folder, self.manifest = folder, manifest
        self._provider = choose(provider, precision, provider_options, manifest.dtype)
        if manifest.quantization:
            require_eight_bits(self._provider.name)
        self._free_dims = dict(free_dims or {})
        self._sizes = _by_symbol(self._free_dims)
        self._session_options = {} if session_options is None else session_options
        if isinstance(session_options, onnxruntime.SessionOptions):
            _require_nothing_else(free_dims, manifest, self._provider)
        elif not isinstance(self._session_options, Mapping):
            hint = "pass a mapping of attributes of onnxruntime.SessionOptions"
            raise SpecError(f"{type(session_options).__name__} is no mapping", where="session_options", hint=hint)
        elif not cuda_graph and self._session_options.get("enable_cpu_mem_arena", True):
            shared = options.one_arena(self.provider, self._provider.options)
            self._session_options = {**shared, **self._session_options}
        self.threads = options.threads(self._session_options)
        self.open_sessions = open_sessions
        self._graphs: dict[Any, Captured] = {}
        self._weights = SharedWeights(folder, self.device)
        self.cuda_graph = cuda_graph
        if cuda_graph and manifest.layout == "single":
            self._without_graphs("they cannot hold a file with branches; export with layout='variants'")
        elif cuda_graph and self.device.type != "cuda":
            self._without_graphs(f"{self.provider} has none, or PyTorch has no CUDA")
        elif cuda_graph:
            self._provider = replace(self._provider, options={**self._provider.options, "enable_cuda_graph": "1"})
        self._chosen: dict[frozenset[str], ExportedVariant] = {}
        self._accepted: dict[object, Mapping[str, int]] = {}
        self.sites = manifest.sites

    def of_member(self, manifest: Manifest) -> Sessions:
        """Return the sessions of another member of a switch, with the same settings, weights and bound.

        Args:
            manifest: the manifest of the member.
        """
        other = copy.copy(self)
        other.manifest, other.sites = manifest, manifest.sites
        other._chosen, other._accepted, other._graphs = {}, {}, {}
        return other

    def compute(
        self, inputs: Mapping[str, torch.Tensor], reused: frozenset[str], read: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the output of a call that reuses some sites, and the values of the sites that it computed.

        Args:
            inputs: the inputs of the call, by name.
            reused: the sites that need not be computed.
            read: the function that returns the value of a reused site.
        Raises:
            CallError: the variants do not cover the call.
        """
        variant = self.of(reused)
        values = {f"reused.{site}": read(site) for site in variant.reads}
        output, *computed = self.run(variant, {**inputs, **values}, self.sizes(inputs))
        return output, dict(zip(variant.writes, computed, strict=True))

    def sizes(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, int]:
        """Return the sizes of a call, by symbol. Calls of the same shapes and dtypes are checked once.

        Args:
            inputs: the inputs of the call, by name.
        Raises:
            CallError: the variants do not cover the call.
        """
        signature = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        if signature not in self._accepted:
            self._accepted[signature] = self.manifest.check(inputs)
        return self._accepted[signature]

    def of(self, reused: frozenset[str]) -> ExportedVariant:
        """Return the variant for the calls that reuse some sites, or one that computes more."""
        if reused not in self._chosen:
            variant, exact = self.manifest.variant_for(reused)
            if not exact:
                log.warning(
                    "no variant was exported for calls that reuse %s: %s computes more; export with calls= the "
                    "generations that are run", sorted(reused), variant.file,
                )  # fmt: skip
            self._chosen[reused] = variant
        return self._chosen[reused]

    def run(
        self, variant: ExportedVariant, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> tuple[torch.Tensor, ...]:
        """Run a variant, and return its outputs on the session's device.

        Args:
            variant: the variant.
            given: its inputs by name.
            sizes: the sizes of the call by symbol.
        Raises:
            CallError: the sizes differ from `free_dims`.
        """
        for name, size in self._sizes.items():
            if sizes.get(name, size) != size:
                raise CallError(
                    f"{NAMES[name]} is {sizes[name]}, and this UNet was loaded for {size}",
                    where="free_dims",
                    hint="load it without free_dims, or once more for these sizes",
                )
        inputs = {spec.name: self._input(spec, variant, given, sizes) for spec in self.manifest.session_inputs(variant)}
        outputs = {spec.name: self._empty(spec, sizes) for spec in self.manifest.session_outputs(variant)}
        if self.cuda_graph:
            outputs = self._captured(variant, inputs, outputs)
        else:
            run(self.session(variant), inputs, outputs)
        return tuple(outputs[spec.name] for spec in self.manifest.outputs_of(variant))

    def _input(
        self, spec: Input, variant: ExportedVariant, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> torch.Tensor:
        if spec.name == CHOICE:
            return torch.tensor(self.manifest.variants.index(variant))  # on the CPU, where branches are taken
        if spec.name in given:
            return given[spec.name].detach().to(self.device, self.manifest.dtype_of(spec)).contiguous()
        return self._empty(spec, sizes).zero_()  # in a single file all sites are inputs, taken or not

    def _captured(
        self, variant: ExportedVariant, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Run through a CUDA graph. On the first failure, warn and disable CUDA graphs for all sessions."""
        key = variant.file, *(tuple(value.shape) for value in inputs.values())
        try:
            if key not in self._graphs:
                self._graphs[key] = Captured(self.session(variant), inputs, outputs, len(self._graphs) + 1)
            return self._graphs[key].run(inputs)
        except SdgraphError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no common base
            self._without_graphs(str(error))
        run(self.session(variant), inputs, outputs)
        return outputs

    def _without_graphs(self, reason: str) -> None:
        log.warning("no CUDA graphs: %s", reason)
        self.cuda_graph = False
        kept = {key: value for key, value in self._provider.options.items() if key != "enable_cuda_graph"}
        self._provider = replace(self._provider, options=kept)
        self._graphs.clear()
        for variant in self.manifest.variants:
            self.close(variant)

    def _empty(self, spec: Input, sizes: Mapping[str, int]) -> torch.Tensor:
        shape = [d if isinstance(d, int) else evaluate(d, sizes) for d in spec.shape or ()]
        return torch.empty(shape, dtype=self.manifest.torch_dtype, device=self.device)

    @property
    def provider(self) -> str:
        """The name of the execution provider."""
        return self._provider.name

    @property
    def precision(self) -> str:
        """The dtype that it computes in."""
        return self._provider.precision

    @property
    def device(self) -> torch.device:
        """The device of the sessions' tensors: without a CUDA build of PyTorch the CPU, and tensors are copied."""
        if self.provider == CUDA and torch.cuda.is_available():
            return torch.device("cuda", int(self._provider.options.get("device_id", 0)))
        return torch.device("cpu")

    def session(self, variant: ExportedVariant) -> Any:
        """The session of a model, opened when first asked for.

        Raises:
            SavedError: ONNX Runtime refuses it, or it is not what the manifest says.
            ExtraError: the provider does not start.
        """
        return self.open_sessions.session(variant.file, lambda: self._open(variant), self._closed)

    def close(self, variant: ExportedVariant) -> None:
        """Close the session of a model; the next call that needs it opens it again.

        Args:
            variant: the variant.
        """
        self.open_sessions.close(variant.file)

    def _closed(self, file: str) -> None:
        self._weights.release(self.folder / file)
        for key in [key for key in self._graphs if key[0] == file]:
            del self._graphs[key]

    def _open(self, variant: ExportedVariant) -> Any:
        path = self.folder / variant.file
        what: str | bytes = str(path)
        settings = self._session_options
        if _by_definition(self.manifest, self.provider):
            from .contrib_functions import runnable

            what = runnable(path)
            settings = {**settings, "session.model_external_initializers_file_folder_path": self.folder.resolve()}
        if isinstance(settings, Mapping):
            settings = options.make(
                {**settings, options.THREADS: self.threads}, self._free_dims, self._weights.of(path)
            )
        try:
            session = self._provider.session(what, settings, self.threads)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SavedError(
                f"ONNX Runtime refuses the model: {error}",
                where=str(path),
                hint=f"check provider_options and session_options; if they are right, {AGAIN}",
            ) from error
        if self.provider not in session.get_providers():
            raise ExtraError(
                f"{self.provider} does not start here",
                where="provider",
                hint=f"check the device, its driver and libraries, or pass provider={CPU!r}",
            )
        inputs = {port.name: (port.type, port.shape) for port in session.get_inputs()}
        wanted = {
            spec.name: (_ORT[self.manifest.dtype_of(spec)], spec) for spec in self.manifest.session_inputs(variant)
        }
        outputs = {port.name: port.shape for port in session.get_outputs()}
        given = {spec.name: spec for spec in self.manifest.session_outputs(variant)}
        if (
            {name: kind for name, (kind, _) in inputs.items()} != {name: kind for name, (kind, _) in wanted.items()}
            or list(outputs) != list(given)
            or not all(_agree(shape, wanted[name][1]) for name, (_, shape) in inputs.items())
            or not all(_agree(shape, given[name]) for name, shape in outputs.items())
        ):
            raise SavedError(
                "the model's inputs are not those of the manifest, or its outputs", where=str(path), hint=AGAIN
            )
        return session


def _agree(shape: list[int | str], spec: Input) -> bool:
    """Return whether a session's input or output has the rank and the fixed sizes of the manifest."""
    expected = spec.shape or ()
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _by_definition(manifest: Manifest, provider: str) -> bool:
    """Return whether the provider lacks kernels of `com.microsoft` operators, so that models need their definitions."""
    return manifest.target == "cuda" and provider != CUDA


def _require_nothing_else(free_dims: Any, manifest: Manifest, provider: Provider) -> None:
    """Refuse a caller's `SessionOptions` where something would have to be added to it."""
    needs = "free_dims" if free_dims else "a cuda target on another provider"
    if provider.device is not None:
        needs = provider.name
    if free_dims or provider.device is not None or _by_definition(manifest, provider.name):
        raise SpecError(
            f"{needs} and a SessionOptions do not go together",
            where="session_options",
            hint="pass a mapping of its attributes, such as {'intra_op_num_threads': 4}",
        )


def _by_symbol(sizes: Mapping[str, int]) -> dict[str, int]:
    symbols = {name: symbol for symbol, name in NAMES.items()}
    for name in sizes:
        if name not in symbols:
            hint = did_you_mean(name, symbols) or f"one of {', '.join(symbols)}"
            raise SpecError(f"no size {name!r}", where="free_dims", hint=hint)
    return {symbols[name]: size for name, size in sizes.items()}
