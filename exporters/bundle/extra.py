"""The optional dependencies of this package."""

from __future__ import annotations

from sdgraph.extra import imported


def require_onnx() -> None:
    """Require the packages of the extra `onnx`.

    Raises:
        ExtraError: a package is missing; the message says which, and how to install it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        imported(name, "onnx")
