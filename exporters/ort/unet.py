"""`ORTUNet`: an exported UNet on ONNX Runtime, which replaces a diffusers UNet in a pipeline."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
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
from sdgraph.options import Bounds, Count, Text, checked
from sdgraph.runtime.diffusers_api import UNetCall
from sdgraph.runtime.members import common_inputs
from sdgraph.untrusted import read_config, require_folder

from ..bundle.example_calls import random_call
from ..bundle.manifest import AGAIN, CONFIG, DATA, Manifest, SwitchManifest
from ..bundle.manifest_file import check_files, read_manifest
from ..bundle.untrusted import check_model
from .open_sessions import OpenSessions
from .providers import CPU, CUDA
from .sessions import Sessions

log = logging.getLogger("sdgraph")
Size = Annotated[int, Bounds(ge=1, lt=2**31)]


class ORTUNet(UNetCall):
    """An exported UNet, which is called like a diffusers `UNet2DConditionModel` in an unmodified pipeline.

    `from_pretrained` loads it. Features are inherited as by the source UNet: `sdgraph.attach(pipe)`, `expecting`,
    `reset` and `cache_bytes` do the same here.

    Of an exported switch, `members` are the sessions of its UNets by name, and the schedule names the one that computes
    each call, as in `SwitchUNet`. `backend` and `manifest` are those of the first one, or of the only one, whose name
    is "".
    """

    backend: Sessions

    def __init__(
        self, members: Mapping[str, Sessions], config: Mapping[str, Any], switch: SwitchManifest | None = None
    ) -> None:
        self.members = dict(members)
        self.backend = next(iter(self.members.values()))
        self.manifest = self.backend.manifest
        self.config = FrozenDict(config)
        self.dtype = self.manifest.torch_dtype
        self.device = self.backend.device
        self.tracker = GenerationTracker()
        self.rota = None if switch is None else switch.rota(self.tracker)
        self.call_inputs = tuple(common_inputs([member.manifest.inputs for member in self.members.values()]))
        self._conditioning = tuple(i.name for i in self.call_inputs if i.conditioning)
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
        memory: Count | None = None,
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
            memory: the most bytes of open sessions, each counted with its file and the weights that it reads; None for
                no bound. Where a session would exceed it, the ones used least recently close, and open again when they
                are needed. The working memory of calls is not counted.
            verify: whether to compare all files with the hashes of the manifest, which reads the weights once.
        Returns:
            The UNet. The sessions of a switch are opened when they are first needed.
        Raises:
            SavedError: a file is missing, damaged, changed or unsafe; nothing was run.
            SpecError: ONNX Runtime has no such provider, precision or option, or the models have no such size;
                or `memory` does not hold the largest model.
            ExtraError: the extra `onnx` or `openvino` is not installed, or the provider does not start.
        Example:
            `pipe.unet = ORTUNet.from_pretrained("unet-onnx")`
        """
        require_onnx()
        folder = Path(directory)
        require_folder(folder, exported=True)
        config, manifest = read_config(folder / CONFIG, AGAIN), read_manifest(folder)
        check_files(manifest, folder, leave_out=() if verify else (DATA,))
        sizes = {
            variant.file: check_model(folder / variant.file, member.files)
            for member in manifest.members.values()
            for variant in member.variants
        }
        (name, first), *others = manifest.members.items()
        sessions = Sessions(
            folder, first, provider, precision, provider_options, session_options, free_dims, cuda_graph,
            OpenSessions(sizes, memory),
        )  # fmt: skip
        if isinstance(manifest, Manifest):
            sessions.session(first.variants[0])
        log.info("on %s in %s, %s threads", sessions.provider, sessions.precision, sessions.threads)
        members = {name: sessions, **{other: sessions.of_member(one) for other, one in others}}
        return cls(members, config, manifest if isinstance(manifest, SwitchManifest) else None)

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
        if self.rota is not None:
            inherits = any(member.sites for member in self.members.values())
            return self.rota.run(flat, self._conditioning, partial(self._covering, flat), inherits).to(
                flat["sample"].device
            )
        self._covering(flat)
        if self.manifest.sites:
            result = self.tracker.run(flat, self._conditioning, always(self.backend))
        else:
            result, _ = self.backend.compute(flat, frozenset(), no_value)
        return result.to(flat["sample"].device)

    def _covering(self, flat: Mapping[str, torch.Tensor], member: str = "") -> Sessions:
        """Return the sessions of a member, which cover the call."""
        self.members[member].sizes(flat)
        return self.members[member]

    def foreseen(self, calls: Any) -> Iterable[tuple[Sessions, frozenset[str]]]:
        return [(member, variant.reused) for member in self.members.values() for variant in member.manifest.variants]

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
        if self.rota is not None:
            recipe = f"{', '.join(self.members)} by {self.rota.schedule}"
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
