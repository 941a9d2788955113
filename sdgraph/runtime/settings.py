"""Settings of a UNet that change its computation: attention processors, fused projections, FreeU, IP-Adapters.

They are made on the graph's source, and the graph is traced anew (`retrace`); only the scales of IP-Adapters are read
at every call.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from diffusers.models.modeling_utils import _LOW_CPU_MEM_USAGE_DEFAULT
from torch import nn

from ..frontend.source import SCALED, numbers_of
from ..graph import Graph
from ..ir.weights import Branch
from .dropin import DropIn
from .retrace import again

log = logging.getLogger("sdgraph")


class SourceSettings(DropIn):
    """A traced UNet on which settings of its source can be made."""

    _without_images = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder_hid_proj" and value is None:  # pipelines assign it, and set other processors then
            self._without_images = True
        else:
            super().__setattr__(name, value)

    def _change(self, change: Callable[[UNet2DConditionModel], Any]) -> None:
        self.hold(again(self.graph, change))

    # -- attention -----------------------------------------------------------------------------------------------

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors that were traced, by module path. The scale of an IP-Adapter may be set in them."""
        return self._graph.source.attn_processors if self._graph.source is not None else {}

    def set_attn_processor(self, processor: Any) -> None:
        """Set attention processors as in diffusers. The graph is traced anew unless nothing changes.

        Args:
            processor: a processor for all attentions, or one for each by module path.
        Raises:
            SourceError: a processor cannot be traced, because it may keep state between calls.
        """
        given = dict(processor) if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        same = given.keys() == self.attn_processors.keys() and all(
            type(value) is type(given[path]) and not isinstance(value, nn.Module)
            for path, value in self.attn_processors.items()
        )
        without_images = self._without_images
        if same and not without_images:
            return

        def change(source: UNet2DConditionModel) -> None:
            if without_images:
                source.encoder_hid_proj = None
                source.config.encoder_hid_dim_type = None
            source.set_attn_processor(given)

        self._change(change)

    def set_default_attn_processor(self) -> None:
        """Set diffusers' default attention processors. The graph is traced anew unless nothing changes."""
        before = {path: type(value) for path, value in self.attn_processors.items()}

        def change(source: UNet2DConditionModel) -> None:
            source.set_default_attn_processor()

        plain = again(self.graph, change)
        if {path: type(value) for path, value in plain.source.attn_processors.items()} != before:
            self.hold(plain)

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """Change nothing: PyTorch's fused attention keeps no matrix of attention that could be sliced."""
        log.warning("attention slicing changes nothing in a traced UNet, whose fused attention needs no memory for it")

    def fuse_qkv_projections(self) -> None:
        """Fuse the projections of queries, keys and values as in diffusers. Weights are copied into the fused ones."""
        if not all("Fused" in type(value).__name__ for value in self.attn_processors.values()):
            self._change(lambda source: source.fuse_qkv_projections())

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`. Nothing changes where nothing is fused."""
        if any("Fused" in type(value).__name__ for value in self.attn_processors.values()):
            self._change(lambda source: source.unfuse_qkv_projections())

    # -- FreeU and IP-Adapters -----------------------------------------------------------------------------------

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Enable FreeU as in diffusers.

        Args:
            s1, s2: factors of the skip connections in the first and second up block.
            b1, b2: factors of the features in the first and second up block.
        """
        self._change(lambda source: source.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2))

    def disable_freeu(self) -> None:
        """Disable FreeU as in diffusers. Nothing changes where it is off."""
        if any(getattr(block, "s1", None) is not None for block in self.graph.source.up_blocks):
            self._change(lambda source: source.disable_freeu())

    def _load_ip_adapter_weights(self, state_dicts: Any, low_cpu_mem_usage: bool = _LOW_CPU_MEM_USAGE_DEFAULT) -> None:
        # With low_cpu_mem_usage diffusers draws no first weights, so whatever is drawn next must be the same here.
        with torch.random.fork_rng(devices=(), enabled=low_cpu_mem_usage):
            self._change(lambda source: source._load_ip_adapter_weights(state_dicts, low_cpu_mem_usage=False))

    def take_processors(self) -> None:
        """Remember what is set in the attention processors, such as the scales of IP-Adapters."""
        if any(_settings(path, value) for path, value in self.attn_processors.items()):
            self._graph.source = copy.deepcopy(self._graph.source)  # other graphs have settings of their own
        self._adjustable = {path: value for path, value in self.attn_processors.items() if _settings(path, value)}
        self._adjusted = self._settings_now()

    def _settings_now(self) -> dict[str, dict[str, Any]]:
        return {path: _settings(path, processor) for path, processor in self._adjustable.items()}

    def follow_processors(self) -> None:
        """Take over what was set in attention processors since the last call.

        The graph reads the scales of IP-Adapters at every call. For any other attribute it is traced anew.
        """
        if not self._adjustable or self._adjusted == (wanted := self._settings_now()):
            return
        for path in (path for path, processor in self._adjustable.items() if type(processor) in SCALED):
            scales = self._adjusted[path]["scale"] = wanted[path]["scale"]
            for i, scale in enumerate(scales):
                leaf = self._graph.weights.get(f"{path}.scale.{i}")
                if leaf is not None:  # or a pass has taken it out
                    leaf.value = scale
        if self._adjusted != wanted:
            _set(self._graph.source, self._adjusted)
            self._change(lambda source: _set(source, wanted))


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


def follow_settings(graph: Graph) -> None:
    """Copy what pipelines read off a UNet's modules to the graph's: the kinds of IP-Adapters, and FreeU's scales."""
    path = "encoder_hid_proj.image_projection_layers"
    layers = graph.weights.get(path)
    for i, layer in layers.named_children() if layers is not None else ():
        if graph.classes.get(f"{path}.{i}") == "ImageProjection":
            layer.__class__ = _ImageProjection
    for i, block in enumerate(graph.source.up_blocks if graph.source is not None else ()):
        mine = graph.weights.get(f"up_blocks.{i}")
        for name in ("s1", "s2", "b1", "b2"):
            if mine is not None and hasattr(block, name):
                vars(mine)[name] = getattr(block, name)
