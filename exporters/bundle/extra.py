"""The optional dependencies of this package."""

from __future__ import annotations

import importlib

from sdgraph.errors import ExtraError


def require_onnx() -> None:
    """Refuse to go on without the packages of the `onnx` extra.

    Raises:
        ExtraError: naming what is missing and how to install it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExtraError(
                f"{name} cannot be imported: {error}", where=name, cure="pip install sdgraph[onnx]"
            ) from error
