"""`Adapters`: what diffusers changes in a UNet after it was made: LoRA, IP-Adapters, attention processors and FreeU.

LoRA layers are put around the leaves of the graph, which have the source's names. Every other change is made on the
graph's source, which is then traced again (`retrace`); only the scales of IP-Adapters are read at every call.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import ip_adapter, peft
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.embeddings import ImageProjection
from diffusers.models.modeling_utils import _LOW_CPU_MEM_USAGE_DEFAULT
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from ..errors import ModeError
from ..frontend.source import SCALED, numbers_of
from ..graph import Graph
from ..ir.weights import Branch
from .diffusers_api import UNetCall
from .retrace import retrace

LORA = (  # methods of diffusers that change LoRA layers
    "load_lora_adapter",
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


class Adapters:
    """The adapters of a UNet that runs a graph.

    The methods named as in diffusers change the source of the graph. They leave the graph as it is, and return the one
    that takes its place, or None if nothing changes.

    Args:
        graph: the graph that runs, whose source has the attention processors.
    """

    def __init__(self, graph: Graph) -> None:
        if graph.source is not None and any(_settings(p, value) for p, value in graph.source.attn_processors.items()):
            graph.source = copy.deepcopy(graph.source)  # other graphs have other settings
        self._graph = graph
        self._adjustable = {path: value for path, value in self.processors.items() if _settings(path, value)}
        self._adjusted = self._settings_now()
        self._without_images = False
        self._lora_scale = 1.0

    def rescheduled(self, graph: Graph) -> Adapters:
        """Return the same adapters for a graph whose sites have other schedules.

        Args:
            graph: the graph, over the same source and weights.
        """
        other = copy.copy(self)
        other._graph = graph
        return other

    # -- attention processors ------------------------------------------------------------------------------------

    @property
    def processors(self) -> dict[str, Any]:
        """The processors that were traced, by module path. The scale of an IP-Adapter may be set in them."""
        return self._graph.source.attn_processors if self._graph.source is not None else {}

    def set_attn_processor(self, processor: Any) -> Graph | None:
        """Set attention processors as in diffusers. The graph is traced again unless nothing changes.

        Args:
            processor: a processor for all attentions, or one for each by module path.
        Raises:
            SourceError: a processor cannot be traced, because it may keep state between calls.
        """
        given = dict(processor) if isinstance(processor, dict) else dict.fromkeys(self.processors, processor)
        without_images = self._without_images
        same = given.keys() == self.processors.keys() and all(
            type(value) is type(given[path]) and not isinstance(value, nn.Module)
            for path, value in self.processors.items()
        )
        if same and not without_images:
            return None

        def change(source: UNet2DConditionModel) -> None:
            if without_images:
                source.encoder_hid_proj = None
                source.config.encoder_hid_dim_type = None
            source.set_attn_processor(given)

        return retrace(self._graph, change)

    def set_default_attn_processor(self) -> Graph | None:
        """Set diffusers' default attention processors. The graph is traced again unless nothing changes."""
        before = {path: type(value) for path, value in self.processors.items()}
        plain = retrace(self._graph, lambda source: source.set_default_attn_processor())
        now = {path: type(value) for path, value in plain.source.attn_processors.items()}
        return plain if now != before else None

    def fuse_qkv_projections(self) -> Graph | None:
        """Fuse the projections of queries, keys and values as in diffusers. Weights are copied into the fused ones."""
        if all("Fused" in type(value).__name__ for value in self.processors.values()):
            return None
        return retrace(self._graph, lambda source: source.fuse_qkv_projections())

    def unfuse_qkv_projections(self) -> Graph | None:
        """Undo `fuse_qkv_projections`. Nothing changes where nothing is fused."""
        if not any("Fused" in type(value).__name__ for value in self.processors.values()):
            return None
        return retrace(self._graph, lambda source: source.unfuse_qkv_projections())

    def follow(self) -> Graph | None:
        """Take over what was set in attention processors since the last call.

        The graph reads the scales of IP-Adapters at every call. For any other attribute it is traced again.

        Returns:
            the graph that runs from now on; None if it stays the same.
        """
        if not self._adjustable or self._adjusted == (wanted := self._settings_now()):
            return None
        for path in (path for path, processor in self._adjustable.items() if type(processor) in SCALED):
            scales = self._adjusted[path]["scale"] = wanted[path]["scale"]
            for i, scale in enumerate(scales):
                leaf = self._graph.weights.get(f"{path}.scale.{i}")
                if leaf is not None:  # or a pass has taken it out
                    leaf.value = scale
        if self._adjusted == wanted:
            return None
        _set(self._graph.source, self._adjusted)
        return retrace(self._graph, lambda source: _set(source, wanted))

    def _settings_now(self) -> dict[str, dict[str, Any]]:
        return {path: _settings(path, processor) for path, processor in self._adjustable.items()}

    # -- FreeU and IP-Adapters -----------------------------------------------------------------------------------

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> Graph | None:
        """Enable FreeU as in diffusers.

        Args:
            s1: the factor of the skip connections in the first up block.
            s2: the factor of the skip connections in the second up block.
            b1: the factor of the features in the first up block.
            b2: the factor of the features in the second up block.
        """
        return retrace(self._graph, lambda source: source.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2))

    def disable_freeu(self) -> Graph | None:
        """Disable FreeU as in diffusers. Nothing changes where it is off."""
        if all(getattr(block, "s1", None) is None for block in self._graph.source.up_blocks):
            return None
        return retrace(self._graph, lambda source: source.disable_freeu())

    def load_ip_adapter_weights(
        self, state_dicts: Any, low_cpu_mem_usage: bool = _LOW_CPU_MEM_USAGE_DEFAULT
    ) -> Graph | None:
        """Load IP-Adapters as diffusers' method does that its pipelines call.

        Args:
            state_dicts: the tensors of each adapter, by name.
            low_cpu_mem_usage: whether no random numbers are drawn for weights that are loaded then.
        """
        # With low_cpu_mem_usage diffusers draws no first weights, so whatever is drawn next must be the same here.
        with torch.random.fork_rng(devices=(), enabled=low_cpu_mem_usage):
            return retrace(
                self._graph, lambda source: source._load_ip_adapter_weights(state_dicts, low_cpu_mem_usage=False)
            )

    def unload_images(self) -> None:
        """Leave out image prompts from the next `set_attn_processor` on, as pipelines do that unload an IP-Adapter."""
        self._without_images = True

    # -- LoRA ----------------------------------------------------------------------------------------------------

    @contextmanager
    def scaled(self, unet: UNetCall, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Scale LoRA layers as one call asks for.

        Args:
            unet: the UNet.
            call: the arguments of the call, by name.
        Returns:
            a context whose value is the arguments without the scale.
        """
        attention = dict(call.get("cross_attention_kwargs") or {})
        scale = attention.pop("scale", 1.0)
        if scale != self._lora_scale:
            unet.reset()  # what was kept between calls was computed with another scale
            self._lora_scale = scale
        scale_lora_layers(unet, scale)
        try:
            yield {**call, "cross_attention_kwargs": attention or None}
        finally:
            unscale_lora_layers(unet, scale)

    @contextmanager
    def changing_lora(self, unet: UNet2DConditionModel, method: str) -> Iterator[None]:
        """Check the LoRA that a method of diffusers puts into a UNet, and take it out again if it would not act.

        Args:
            unet: the UNet.
            method: the name of the method.
        Returns:
            a context to call the method in.
        Raises:
            ModeError: an adapter is for a layer that a pass has rewritten.
        """
        peft._SET_ADAPTER_SCALE_FN_MAPPING[type(unet).__name__] = _scales_by_block  # diffusers looks it up by the class
        before = set(getattr(unet, "peft_config", {}))
        try:
            yield
            for name in set(getattr(unet, "peft_config", {})) - before:
                if path := self._rewritten_target(unet.peft_config[name]):
                    UNet2DConditionModel.delete_adapters(unet, name)
                    raise _no_adapter(path)
        except Exception as error:
            if method != "load_lora_adapter":
                raise
            if not getattr(unet, "peft_config", None):
                UNet2DConditionModel.unload_lora(unet)  # the layers that peft had put in before it failed
            if not isinstance(error, ModeError) and self._rewritten():
                raise _no_adapter(self._rewritten()[0]) from error
            raise

    def _rewritten_target(self, config: Any) -> str:
        """Return the path of a layer that an adapter is for and that a pass has rewritten; "" if there is none."""
        from peft.tuners.tuners_utils import check_target_module_exists

        return next((path for path in self._rewritten() if check_target_module_exists(config, path)), "")

    def _rewritten(self) -> list[str]:
        """Return the paths of the source's layers that are still in the graph, but no longer as one call of a leaf."""
        called = Counter(str(node.target) for node in self._graph.fx.nodes if node.op == "call_module")
        read = {str(node.target).rpartition(".")[0] for node in self._graph.fx.nodes if node.op == "get_attr"}
        layers = [path for path, m in self._graph.source.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [
            path
            for path in layers
            if (called[path] != 1 or path in read)
            and not any(path == gone or path.startswith(f"{gone}.") for gone in self._graph.removed)
        ]


def _no_adapter(path: str) -> ModeError:
    return ModeError(
        "the adapter is for a layer that a pass has rewritten, or that is not one call of the graph",
        where=path,
        hint="load and fuse it in the source UNet (pipe.fuse_lora()), then call sdgraph.apply again",
    )


def _scales_by_block(unet: Any, scales: Any, **options: Any) -> Any:
    """Return scales by block as diffusers does, for a UNet of diffusers or of ours.

    Raises:
        ModeError: the UNet is exported.
    """
    if isinstance(unet, UNetCall):
        if not isinstance(getattr(unet, "adapters", None), Adapters):
            raise ModeError(
                "an exported UNet has the scales that it was exported with",
                where="set_ip_adapter_scale",
                hint="set them on the GraphUNet, and export it again",
            )
        unet = unet.graph.source or unet  # type: ignore[attr-defined]  # a pass may have removed blocks
    return _maybe_expand_lora_scales(unet, scales, **options)


ip_adapter._maybe_expand_lora_scales = _scales_by_block  # pipelines call it there with their UNet


def _settings(path: str, processor: Any) -> dict[str, Any]:
    """Return what can be set in an attention processor: its attributes that are numbers or words, and its scales."""
    own = vars(processor) if hasattr(processor, "__dict__") else {}
    settings = {
        name: value
        for name, value in own.items()
        if isinstance(value, bool | int | float | str) and name != "training" and not name.startswith("_")
    }
    return settings | ({"scale": numbers_of(processor, processor.scale, path)} if type(processor) in SCALED else {})


def _set(source: UNet2DConditionModel, settings: Mapping[str, Mapping[str, Any]]) -> None:
    for path, processor in source.attn_processors.items():
        for name, value in copy.deepcopy(settings.get(path, {})).items():
            setattr(processor, name, value)


class _ImageProjection(Branch, ImageProjection):  # type: ignore[misc]
    """A branch that pipelines take for diffusers' module at its place, by its class."""


def show_settings(graph: Graph) -> None:
    """Copy what pipelines read off a UNet's modules to the graph's: the kinds of IP-Adapters, and FreeU's scales."""
    path = "encoder_hid_proj.image_projection_layers"
    layers = graph.weights.get(path)
    for i, layer in layers.named_children() if layers is not None else ():
        if graph.classes.get(f"{path}.{i}") == "ImageProjection":
            layer.__class__ = _ImageProjection
    for i, block in enumerate(graph.source.up_blocks if graph.source is not None else ()):
        own = graph.weights.get(f"up_blocks.{i}")
        for name in ("s1", "s2", "b1", "b2"):
            if own is not None and hasattr(block, name):
                vars(own)[name] = getattr(block, name)
