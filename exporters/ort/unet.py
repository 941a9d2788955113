"""`ORTUNet`: an exported UNet on ONNX Runtime, which replaces a diffusers UNet in a pipeline."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Self

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict

from sdgraph.errors import ModeError, SpecError
from sdgraph.extra import require_onnx
from sdgraph.inheritance.cache import always, no_value
from sdgraph.inheritance.tracker import GenerationTracker
from sdgraph.options import Bounds, Text, checked
from sdgraph.runtime.diffusers_api import UNetCall
from sdgraph.untrusted import read_config, require_folder

from ..bundle.example_calls import random_call
from ..bundle.manifest import AGAIN, CONFIG, DATA
from ..bundle.manifest_file import check_files, read_manifest
from ..bundle.untrusted import check_model
from .providers import CPU, CUDA
from .sessions import Sessions

log = logging.getLogger("sdgraph")
Size = Annotated[int, Bounds(ge=1, lt=2**31)]


class ORTUNet(UNetCall):
    """An exported UNet, which is called like a diffusers `UNet2DConditionModel` in an unmodified pipeline.

    `from_pretrained` loads it. Features are inherited as by the source UNet: `sdgraph.attach(pipe)`, `expecting`,
    `reset` and `cache_bytes` do the same here.
    """

    backend: Sessions

    def __init__(self, sessions: Sessions, config: Mapping[str, Any]) -> None:
        self.backend = sessions
        self.manifest = sessions.manifest
        self.config = FrozenDict(config)
        self.dtype = self.manifest.torch_dtype
        self.device = sessions.device
        self.tracker = GenerationTracker()
        self.call_inputs = self.manifest.inputs
        self._conditioning = tuple(i.name for i in self.manifest.inputs if i.conditioning)
        if config.get("addition_embed_type") == "text_time":  # SDXL's pipelines read this size from the module
            width = config.get("projection_class_embeddings_input_dim")
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @classmethod
    @checked(SpecError)
    def from_pretrained(
        cls,
        directory: Text | os.PathLike[str],
        *,
        provider: str | None = None,
        precision: str | None = None,
        provider_options: Mapping[str, Any] | None = None,
        session_options: Any = None,
        free_dims: Mapping[str, Size] | None = None,
        cuda_graph: bool = False,
        verify: bool = True,
    ) -> ORTUNet:
        """Load a directory that `sdgraph.exporters.onnx.export` wrote.

        Args:
            directory: the exported directory.
            provider: the name of an execution provider of ONNX Runtime; by default CUDA's if PyTorch sees a CUDA device
                and ONNX Runtime has the provider; else OpenVINO's for a model in float32, if the extra `openvino` is
                installed and it multiplies in bfloat16 on this processor; else the CPU's. The log and `repr` say which.
            precision: the dtype that OpenVINO computes in, "float32" (default) or "bfloat16". Other providers compute
                in the dtype of the model.
            provider_options: the options of that provider; CUDA's have defaults. For OpenVINO they are properties of
                its CPU plugin, such as `{"CACHE_DIR": "compiled"}`, which caches compiled models.
            session_options: attributes and configuration entries of `onnxruntime.SessionOptions`, such as
                `{"intra_op_num_threads": 4, "session.disable_prepacking": 1}`. By default a session has as many threads
                as PyTorch (`torch.get_num_threads()`). A `SessionOptions` is used unchanged, and then sessions share
                neither weights nor working memory.
            free_dims: the sizes that all calls will have, such as `{"batch": 2, "height": 64, "width": 64}` (of the
                latents), for which ONNX Runtime optimises. Other calls are refused.
            cuda_graph: whether to record the kernels of each graph, for each set of sizes, and replay them as one. If
                capture is not possible, a warning says why and calls run without it.
            verify: whether to compare all files with the hashes of the manifest, which reads the weights once.
        Returns:
            The UNet.
        Raises:
            SavedError: a file is missing, damaged, changed or unsafe; nothing was run.
            SpecError: ONNX Runtime has no such provider, precision or option, or the models have no such size.
            ExtraError: the extra `onnx` or `openvino` is not installed, or the provider does not start.
        Example:
            `pipe.unet = ORTUNet.from_pretrained("unet-onnx")`
        """
        require_onnx()
        folder = Path(directory)
        require_folder(folder, exported=True)
        config, manifest = read_config(folder / CONFIG, AGAIN), read_manifest(folder)
        check_files(manifest, folder, manifest.files if verify else (n for n in manifest.files if n != DATA))
        for variant in manifest.variants:
            check_model(folder / variant.file, manifest.files)
        sessions = Sessions(
            folder, manifest, provider, precision, provider_options, session_options, free_dims, cuda_graph
        )
        sessions.session(manifest.variants[0])
        log.info("on %s in %s, %s threads", sessions.provider, sessions.precision, sessions.threads)
        return cls(sessions, config)

    # -- the call ------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the noise prediction, without gradients and on the device of `sample`.

        Args:
            args: the positional arguments of `forward`.
            kwargs: the keyword arguments of `forward`.
        """
        with torch.no_grad():
            return self.forward(*args, **kwargs)

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the noise prediction; tensors on the session's device are not copied.

        Args:
            flat: the inputs of the call by name, flattened.
        Raises:
            CallError: the models do not cover the call.
        """
        self.backend.sizes(flat)
        if self.manifest.sites:
            result = self.tracker.run(flat, self._conditioning, always(self.backend))
        else:
            result, _ = self.backend.compute(flat, frozenset(), no_value)
        return result.to(flat["sample"].device)

    def foreseen(self, calls: Any) -> Iterable[frozenset[str]]:
        return {frozenset(variant.reused) for variant in self.manifest.variants}

    def random_inputs(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        symbols = {d for i in self.manifest.model_inputs for d in i.shape or () if isinstance(d, str)}
        rest = {symbol: 6 for symbol in symbols if symbol.isidentifier()}  # the model's own, such as SDXL's time ids
        return random_call(self, self.manifest, rest | dict(sizes))

    # -- what pipelines do with a UNet ---------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the UNet itself if it already has the device and the dtype.

        Args:
            args: a device, a dtype or both, as in `torch.nn.Module.to`.
            kwargs: `device` and `dtype`.
        Raises:
            ModeError: the device or the dtype is another one, and a session cannot move.
        """
        for wish in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(wish, torch.dtype) and wish != self.dtype:
                raise ModeError(f"the model is exported in {self.dtype}", hint=f"export unet.to({wish})")
            if isinstance(wish, str | int | torch.device) and not isinstance(wish, bool):
                device = torch.device(wish)
                if (device.type, device.index or 0) != (self.device.type, self.device.index or 0):
                    provider = CUDA if device.type == "cuda" else CPU
                    raise ModeError(
                        f"an ONNX Runtime session cannot move from {self.device} to {device}",
                        hint=f"ORTUNet.from_pretrained(directory, provider={provider!r})",
                    )
        return self

    def eval(self) -> Self:
        """Return the UNet itself; an exported model has no training mode."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ModeError(
            "an ORTUNet is not copied: its sessions belong to ONNX Runtime",
            where="ORTUNet",
            hint="call ORTUNet.from_pretrained(directory) again; pipelines may share one",
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError("an ORTUNet is not pickled", hint="send the directory, and call ORTUNet.from_pretrained there")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for these before any attribute exists
            raise AttributeError(name)
        if hasattr(UNet2DConditionModel, name):
            hint = "do it on the source UNet, then call sdgraph.apply and export again"
            raise ModeError(f"an exported UNet has no {name}", where="ORTUNet", hint=hint)
        raise AttributeError(f"'ORTUNet' object has no attribute {name!r}")

    def __repr__(self) -> str:
        recipe = ", ".join(self.manifest.recipe) or "no passes"
        return f"ORTUNet({self.backend.provider} in {self.backend.precision}, {recipe})"


@checked(SpecError)
def load_pipeline(pipeline: Text | os.PathLike[str], unet: ORTUNet, **options: Any) -> Any:
    """Load a diffusers pipeline around an exported UNet, without reading the weights of the UNet that it replaces.

    Args:
        pipeline: the folder of the pipeline that the UNet was exported from, or its name on the hub. The folder need
            not contain the UNet.
        unet: the exported UNet, whose dtype the other models get.
        options: the options of `DiffusionPipeline.from_pretrained`, such as `variant="fp16"`.
    Returns:
        The pipeline. If the UNet inherits features, call `sdgraph.attach` on it.
    Example:
        `pipe = load_pipeline("stable-diffusion-v1-5", ORTUNet.from_pretrained("unet-onnx"))`
    """
    with warnings.catch_warnings():
        # Newer versions of diffusers call it `dtype`, which older ones ignore.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        without = DiffusionPipeline.from_pretrained(pipeline, **{"unet": None, "torch_dtype": unet.dtype, **options})
        # Pipelines look at the sizes of their UNet when they are made.
        return type(without).from_pipe(without, unet=unet, torch_dtype=unet.dtype)
