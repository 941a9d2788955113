"""Exporters: `onnx.export` writes a directory, `ort.ORTUNet` runs it. Each is loaded when first asked for."""

import importlib
from typing import Any

__all__ = ["engines", "onnx", "ort"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
