"""Device maps, of which a UNet that is loaded takes those that name one device."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import SavedError


def one_device(unet: nn.Module, device_map: Any, max_memory: Any) -> Any:
    """Return the device that a device map puts the whole UNet on.

    Raises:
        SavedError: the map puts it on several devices.
    """
    if not isinstance(device_map, dict):
        if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
            return device_map
        from accelerate import infer_auto_device_map

        device_map = infer_auto_device_map(unet, max_memory=max_memory)
    devices = list(dict.fromkeys(map(str, device_map.values())))
    if len(devices) != 1 or devices == ["disk"]:
        raise SavedError(
            f"the device map puts the UNet on {', '.join(devices)}, and a graph runs on one device",
            where="from_pretrained",
            hint="name one device, or offload the loaded pipeline (pipe.enable_model_cpu_offload())",
        )
    return next(iter(device_map.values()))
