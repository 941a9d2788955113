"""Methods of a diffusers UNet that a traced one refuses, each with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ModeError

_AGAIN = "do it on the source UNet, then call sdgraph.apply again"
_FUSED = "leave it off: the graph calls PyTorch's fused attention, whatever the backend"
_SOURCE = "call it on the source UNet"
UPLOAD = (
    "save it, and upload the folder by huggingface_hub.upload_folder; from_pretrained takes the folder that "
    "huggingface_hub.snapshot_download(repository, local_dir=...) returns"
)
REFUSED: Mapping[str, str] = {  # hints by name
    # The graph holds the attention that the source's processors computed when they were traced.
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
    # The graph is one function; the parts of a UNet's forward are not methods of it.
    "get_time_embed": _SOURCE,
    "get_class_embed": _SOURCE,
    "get_aug_embed": _SOURCE,
    "process_encoder_hidden_states": _SOURCE,
    "compile_repeated_blocks": "unet.compile() compiles each variant whole",
    "enable_layerwise_casting": "cast all of it: unet.to(torch.float16)",
    "load_attn_procs": "use load_lora_adapter, or load them into the source UNet and call sdgraph.apply again",
    "save_attn_procs": "use save_lora_adapter, or save them from the source UNet",
    "from_single_file": "UNet2DConditionModel.from_single_file(...), then sdgraph.apply",
    # Of a name on the hub, diffusers downloads the files that it knows, without the recipe.
    "push_to_hub": UPLOAD,
    "enable_lora_hotswap": "load the adapter under a new name, then set_adapters; nothing is compiled for good here",
}


def refusal(name: str, hint: str) -> Callable[..., Any]:
    """Return a method that refuses to be called.

    Args:
        name: name of the method.
        hint: what to do instead.
    """

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ModeError(f"a traced UNet has no {name}", where="GraphUNet", hint=hint)

    refuse.__name__ = name
    return refuse
