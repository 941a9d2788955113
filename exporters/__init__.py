"""Exporters: `onnx.export` writes a directory, `ort.ORTUNet` runs it. Each is loaded when first asked for."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("engines", "onnx", "ort"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
