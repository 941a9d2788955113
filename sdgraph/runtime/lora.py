"""LoRA on a traced UNet: diffusers puts the layers around the graph's own leaves, which have the source's names."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders import ip_adapter, peft
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from ..errors import ModeError
from .diffusers_api import UNetCall
from .dropin import DropIn

LORA = (  # methods of diffusers that change the adapters
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


class LoraLayers(DropIn):
    """A traced UNet with any number of LoRA adapters."""

    _lora_scale = 1.0

    @functools.wraps(UNetCall.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if not self._hf_peft_config_loaded:
            return super().forward(*args, **kwargs)
        attention = dict(kwargs.pop("cross_attention_kwargs", None) or {})
        scale = attention.pop("scale", 1.0)
        if scale != self._lora_scale:
            self.reset()  # what was kept between calls was computed with another scale
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
        """Load an adapter as in diffusers. Any number of adapters may be loaded.

        Args:
            pretrained_model_name_or_path_or_dict: the adapter: a name on the hub, a folder, or tensors by name.
            prefix: prefix of the names of tensors that are for the UNet.
            hotswap: replace the weights of a loaded adapter of that name.
            options: diffusers' further options.
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
                    UNet2DConditionModel.unload_lora(self)  # the layers that peft had put in before it failed
                if not isinstance(error, ModeError) and self._rewritten():
                    raise self._no_adapter(self._rewritten()[0]) from error
                raise

    @contextmanager
    def _adapting(self) -> Iterator[None]:
        peft._SET_ADAPTER_SCALE_FN_MAPPING[type(self).__name__] = _scales_by_block  # diffusers looks it up so
        try:
            yield
        finally:
            self.changed()

    def _check_adapters(self, names: Iterable[str]) -> None:
        """Remove and refuse adapters that would not do what they do in the source."""
        from peft.tuners.tuners_utils import check_target_module_exists

        for name in names:
            aimed = (path for path in self._rewritten() if check_target_module_exists(self.peft_config[name], path))
            path = next(aimed, None)
            if path is not None:
                UNet2DConditionModel.delete_adapters(self, name)
                raise self._no_adapter(path)

    def _rewritten(self) -> list[str]:
        """Paths of the source's layers that are still in the graph, but no longer as one call of a leaf."""
        called = Counter(str(node.target) for node in self.graph.fx.nodes if node.op == "call_module")
        read = {str(node.target).rpartition(".")[0] for node in self.graph.fx.nodes if node.op == "get_attr"}
        layers = [path for path, m in self.graph.source.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [
            path
            for path in layers
            if (called[path] != 1 or path in read)
            and not any(path == gone or path.startswith(f"{gone}.") for gone in self.graph.removed)
        ]

    def _no_adapter(self, path: str) -> ModeError:
        return ModeError(
            "the adapter is for a layer that a pass has rewritten, or that is not one call of the graph",
            where=path,
            hint="load and fuse it in the source UNet (pipe.fuse_lora()), then call sdgraph.apply again",
        )


def _scales_by_block(unet: Any, scales: Any, **options: Any) -> Any:
    """Return scales by block as diffusers does, with the blocks of the source: a pass may have removed some of them.

    Raises:
        ModeError: the UNet is exported.
    """
    if isinstance(unet, UNetCall) and not isinstance(unet, DropIn):
        raise ModeError(
            "an exported UNet has the scales that it was exported with",
            where="set_ip_adapter_scale",
            hint="set them on the GraphUNet, and export it again",
        )
    source = unet.graph.source if isinstance(unet, DropIn) else None
    return _maybe_expand_lora_scales(unet if source is None else source, scales, **options)


ip_adapter._maybe_expand_lora_scales = _scales_by_block  # pipelines call it there with their UNet


def _adapting(name: str) -> Any:
    """Return diffusers' method of that name, followed by what a graph needs after its leaves have changed."""
    inherited = getattr(UNet2DConditionModel, name)

    def adapt(self: LoraLayers, *args: Any, **kwargs: Any) -> Any:
        with self._adapting():
            if name == "fuse_lora":
                self._take_weights()  # it edits them in place, and the source shares them
            result = inherited(self, *args, **kwargs)
            if name == "add_adapter":
                self._check_adapters([kwargs.get("adapter_name", args[1] if len(args) > 1 else "default")])
            return result

    adapt.__name__, adapt.__doc__ = name, inherited.__doc__
    return adapt


for _name in LORA:
    setattr(LoraLayers, _name, _adapting(_name))
