"""What a `UNet2DConditionModel` has beside its call: each of it does the same here, or is refused with a hint.

Settings of the source (attention processors, fused projections, FreeU, IP-Adapters) are made on it, and the graph is
traced anew, see `again`. LoRA layers are put around the graph's own leaves, which have the source's names.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders import peft as loaders
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from ..compiler.runner import replay
from ..errors import ModeError
from ..frontend.capture import capture
from ..graph import Graph
from ..inheritance.generation import Generations
from .interface import UNetCall
from .recipe import read_passes
from .retrace import again

log = logging.getLogger("sdgraph")

_AGAIN = "do it on the source UNet, then call sdgraph.apply again"
_FUSED = "leave it off: the graph calls PyTorch's fused attention, whatever the backend"
_SOURCE = "call it on the source UNet"
REFUSED: Mapping[str, str] = {
    # attention is what the source's processors did when they were traced
    "enable_npu_flash_attention": _FUSED,
    "disable_npu_flash_attention": _FUSED,
    "set_use_npu_flash_attention": _FUSED,
    "enable_xla_flash_attention": _FUSED,
    "disable_xla_flash_attention": _FUSED,
    "set_use_xla_flash_attention": _FUSED,
    "enable_xformers_memory_efficient_attention": _FUSED,
    "disable_xformers_memory_efficient_attention": _FUSED,
    "set_use_memory_efficient_attention_xformers": _FUSED,
    "set_attention_backend": _FUSED,
    "reset_attention_backend": _FUSED,
    "enable_parallelism": "run one UNet per device; sequences are not split here",
    # a graph is one function; the parts of a UNet's forward are not methods of it
    "get_time_embed": _SOURCE,
    "get_class_embed": _SOURCE,
    "get_aug_embed": _SOURCE,
    "process_encoder_hidden_states": _SOURCE,
    "compile_repeated_blocks": "unet.compile() compiles each variant whole",
    "enable_layerwise_casting": "cast all of it: unet.to(torch.float16)",
    "load_attn_procs": "use load_lora_adapter, or load them into the source UNet and call sdgraph.apply again",
    "save_attn_procs": "use save_lora_adapter, or save them from the source UNet",
    "from_single_file": "UNet2DConditionModel.from_single_file(...), then sdgraph.apply",
    "enable_lora_hotswap": "load the adapter under a new name, then set_adapters; nothing is compiled for good here",
}
LORA = (
    "add_adapter",
    "set_adapter",
    "set_adapters",
    "enable_adapters",
    "disable_adapters",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
    "enable_lora",
    "disable_lora",
    "delete_adapters",
)


class DropIn(UNetCall, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet2DConditionModel whose computation is a graph; to be told apart by nobody who asks in diffusers' terms."""

    _graph: Graph
    generations: Generations
    _supports_gradient_checkpointing = False
    _lora_scale = 1.0

    @property
    def graph(self) -> Graph:
        """The graph that is run."""
        raise NotImplementedError

    def hold(self, graph: Graph) -> None:
        """Run this graph from now on; it belongs to this module."""
        raise NotImplementedError

    def changed(self) -> None:
        """Modules of this one are others than before."""
        raise NotImplementedError

    def _change(self, change: Callable[[UNet2DConditionModel], Any]) -> None:
        self.hold(again(self.graph, change))

    # -- attention -----------------------------------------------------------------------------------------------

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors that were traced, by module path. An IP-Adapter's scale may be set in them."""
        return self._graph.source.attn_processors if self._graph.source is not None else {}

    def set_attn_processor(self, processor: Any) -> None:
        """As in diffusers, for processors that can be traced; the graph is traced anew unless nothing changes.

        Raises:
            SourceError: a processor may keep state between calls.
        """
        given = dict(processor) if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        same = given.keys() == self.attn_processors.keys() and all(
            type(value) is type(given[path]) and not isinstance(value, nn.Module)
            for path, value in self.attn_processors.items()
        )
        without_images = self.__dict__["_modules"].get("encoder_hid_proj", self) is None  # pipelines assign it
        if same and not without_images:
            return

        def change(source: UNet2DConditionModel) -> None:
            if without_images:
                source.encoder_hid_proj = None
                source.config.encoder_hid_dim_type = None
            source.set_attn_processor(given)

        self._change(change)

    def set_default_attn_processor(self) -> None:
        """As in diffusers; the graph is traced anew unless nothing changes."""
        before = {path: type(value) for path, value in self.attn_processors.items()}

        def change(source: UNet2DConditionModel) -> None:
            source.set_default_attn_processor()

        plain = again(self.graph, change)
        if {path: type(value) for path, value in plain.source.attn_processors.items()} != before:
            self.hold(plain)

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """Changes nothing: PyTorch's fused attention keeps no matrix of attention that could be sliced."""
        log.warning("attention slicing changes nothing in a traced UNet, whose fused attention needs no memory for it")

    def fuse_qkv_projections(self) -> None:
        """As in diffusers: one projection for queries, keys and values, at most. Weights are copied into it."""
        if not all("Fused" in type(value).__name__ for value in self.attn_processors.values()):
            self._change(lambda source: source.fuse_qkv_projections())

    def unfuse_qkv_projections(self) -> None:
        """As in diffusers; changes nothing where nothing is fused."""
        if any("Fused" in type(value).__name__ for value in self.attn_processors.values()):
            self._change(lambda source: source.unfuse_qkv_projections())

    # -- FreeU and IP-Adapters -----------------------------------------------------------------------------------

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """As in diffusers."""
        self._change(lambda source: source.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2))

    def disable_freeu(self) -> None:
        """As in diffusers; changes nothing where it is off."""
        if any(getattr(block, "s1", None) is not None for block in self.graph.source.up_blocks):
            self._change(lambda source: source.disable_freeu())

    def _load_ip_adapter_weights(self, state_dicts: Any, low_cpu_mem_usage: bool = False) -> None:
        self._change(lambda source: source._load_ip_adapter_weights(state_dicts, low_cpu_mem_usage=False))

    def take_scales(self) -> None:
        """Remember the scales of IP-Adapters, which pipelines set in the attention processors."""
        if any(hasattr(value, "scale") for value in self.attn_processors.values()):
            self._graph.source = copy.deepcopy(self._graph.source)  # other graphs have scales of their own
        self._scales = self._scales_now()

    def _scales_now(self) -> dict[str, list[float]]:
        return {path: list(p.scale) for path, p in self.attn_processors.items() if hasattr(p, "scale")}

    def follow_scales(self) -> None:
        """Trace anew if the scale of an IP-Adapter was set."""
        if not self._scales or self._scales == (wanted := self._scales_now()):
            return
        _set_scales(self._graph.source, self._scales)
        self._change(lambda source: _set_scales(source, wanted))

    # -- LoRA ----------------------------------------------------------------------------------------------------

    @functools.wraps(UNetCall.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if not self._hf_peft_config_loaded:
            return super().forward(*args, **kwargs)
        attention = dict(kwargs.pop("cross_attention_kwargs", None) or {})
        scale = attention.pop("scale", 1.0)
        if scale != self._lora_scale:
            self.reset()  # what was kept between calls is of another scale
            self._lora_scale = scale
        scale_lora_layers(self, scale)
        try:
            return super().forward(*args, **kwargs | {"cross_attention_kwargs": attention or None})
        finally:
            unscale_lora_layers(self, scale)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """As in diffusers: LoRA layers around the graph's own, for any number of adapters.

        Raises:
            ModeError: the adapter is for a layer that a pass has rewritten.
        """
        before = set(getattr(self, "peft_config", {}))
        with self._adapting():
            try:
                super().load_lora_adapter(
                    pretrained_model_name_or_path_or_dict, prefix=prefix, hotswap=hotswap, **options
                )
                self._check_adapters(set(getattr(self, "peft_config", {})) - before)
            except Exception as error:
                if not getattr(self, "peft_config", None):
                    UNet2DConditionModel.unload_lora(self)  # what peft had put in before it failed
                if not isinstance(error, ModeError) and self._rewritten():
                    raise self._no_adapter(self._rewritten()[0]) from error
                raise

    @contextmanager
    def _adapting(self) -> Iterator[None]:
        # diffusers finds the blocks of a UNet by the name of its class
        scales = loaders._SET_ADAPTER_SCALE_FN_MAPPING
        scales.setdefault(type(self).__name__, scales["UNet2DConditionModel"])
        try:
            yield
        finally:
            for name, child in self.named_children():  # leaves at the top are replaced in this module only
                self.graph.weights.add_module(name, child)
            self.changed()

    def _check_adapters(self, names: Iterable[str]) -> None:
        """Refuse and take back adapters that would not do what they do in the source."""
        from peft.tuners.tuners_utils import check_target_module_exists

        for name in names:
            aimed = (path for path in self._rewritten() if check_target_module_exists(self.peft_config[name], path))
            path = next(aimed, None)
            if path is not None:
                UNet2DConditionModel.delete_adapters(self, name)
                raise self._no_adapter(path)

    def _rewritten(self) -> list[str]:
        """Modules of the source that are still in the graph, but not as the one call of a leaf."""
        called = {str(node.target) for node in self.graph.fx.nodes if node.op == "call_module"}
        read = {str(node.target).rpartition(".")[0] for node in self.graph.fx.nodes if node.op == "get_attr"}
        left = [path for path, m in self.graph.source.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [
            path
            for path in left
            if (path not in called or path in read)
            and not any(path == gone or path.startswith(f"{gone}.") for gone in self.graph.removed)
        ]

    def _no_adapter(self, path: str) -> ModeError:
        return ModeError(
            "the adapter is for a layer that a pass has rewritten, or that is not one call of the graph",
            where=path,
            hint="load and fuse it in the source UNet (pipe.fuse_lora()), then call sdgraph.apply again",
        )

    # -- loading and moving --------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """A UNet with random weights, as diffusers makes one of the configuration, with its passes applied."""
        if not isinstance(config, Mapping):
            config = UNet2DConditionModel.load_config(config)
        passes = config.get(PASSES, ())
        plain = {name: value for name, value in config.items() if name != PASSES} | {
            "_class_name": "UNet2DConditionModel"
        }
        known = UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        own = {name: value for name, value in plain.items() if name in known or name.startswith("_")}
        source, unused = UNet2DConditionModel.from_config(own, return_unused_kwargs=True, **options)
        unused |= {name: value for name, value in plain.items() if name not in own}  # such as that of a moving average
        graph = capture(source)  # which may be on the meta device: accelerate makes empty models to look at their sizes
        made = cls(replay(read_passes(passes), graph))
        return (made, unused) if return_unused_kwargs else made

    def enable_group_offload(self, onload_device: Any, *args: Any, **options: Any) -> None:
        """As in diffusers, at the level of leaves.

        Raises:
            ModeError: for blocks, which nobody calls here.
        """
        if options.get("offload_type", args[1] if len(args) > 1 else "block_level") != "leaf_level":
            raise ModeError(
                "a graph calls its leaves, so blocks would never be brought in",
                where="enable_group_offload",
                hint="offload_type='leaf_level'",
            )
        super().enable_group_offload(onload_device, *args, **options)
        self.changed()

    # -- gradient checkpointing ----------------------------------------------------------------------------------

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        raise ModeError("a traced UNet has no gradient checkpointing", hint="train in smaller batches")

    def disable_gradient_checkpointing(self) -> None:
        """Changes nothing: there is none."""


PASSES = "sdgraph_passes"


def _refusal(name: str, hint: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ModeError(f"a traced UNet has no {name}", where="GraphUNet", hint=hint)

    refuse.__name__ = name
    return refuse


def _adapting(name: str) -> Any:
    inherited = getattr(UNet2DConditionModel, name)

    def adapt(self: DropIn, *args: Any, **kwargs: Any) -> Any:
        with self._adapting():
            if name == "fuse_lora":
                self._take_weights()  # it edits them in place, and the source shares them
            result = inherited(self, *args, **kwargs)
            if name == "add_adapter":
                self._check_adapters([kwargs.get("adapter_name", args[1] if len(args) > 1 else "default")])
            return result

    adapt.__name__, adapt.__doc__ = name, inherited.__doc__
    return adapt


def _set_scales(source: UNet2DConditionModel, scales: Mapping[str, list[float]]) -> None:
    for path, processor in source.attn_processors.items():
        if path in scales:
            processor.scale = list(scales[path])


def as_lists(weights: nn.Module) -> None:
    """Let blocks and layers be iterated over and counted, as in diffusers."""
    for module in weights.modules():
        names = list(module._modules)
        if type(module) is nn.Module and names and names == [str(i) for i in range(len(names))]:
            module.__class__ = nn.ModuleList


def follow_settings(graph: Graph) -> None:
    """Show what pipelines look for in the modules of a UNet: the kinds of IP-Adapters, FreeU."""
    path = "encoder_hid_proj.image_projection_layers"
    layers = graph.weights.get(path)
    for i, layer in layers.named_children() if layers is not None else ():
        if graph.classes.get(f"{path}.{i}") == "ImageProjection":
            layer.__class__ = ImageProjection
    for i, block in enumerate(graph.source.up_blocks if graph.source is not None else ()):
        mine = graph.weights.get(f"up_blocks.{i}")
        for name in ("s1", "s2", "b1", "b2"):
            if mine is not None and hasattr(block, name):
                setattr(mine, name, getattr(block, name))


for _name, _cure in REFUSED.items():
    setattr(DropIn, _name, _refusal(_name, _cure))
for _name in LORA:
    setattr(DropIn, _name, _adapting(_name))
