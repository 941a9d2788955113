"""The optional dependencies of this package."""

from __future__ import annotations

from sdgraph.extra import imported


def require_onnx() -> None:
    """Refuse to go on without the packages of the `onnx` extra.

    Raises:
        ExtraError: naming what is missing and how to install it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        imported(name, "onnx")
