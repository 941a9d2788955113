"""Optional dependencies, which are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import ExtraError
from .version import __version__


def imported(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: the name of the module.
        extra: the extra of sdgraph that installs it, such as "onnx".
    Returns:
        The module.
    Raises:
        ExtraError: the module cannot be imported; the hint says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtraError(
            f"{module} cannot be imported: {error}",
            where=module,
            hint=f"install the extra {extra!r}, from a clone: pip install -e '.[{extra}]', or from a wheel "
            f"file: pip install 'sdgraph_compiler-{__version__}-py3-none-any.whl[{extra}]'",
        ) from error


def require_onnx() -> None:
    """Require the packages of the extra `onnx`.

    Raises:
        ExtraError: a package is missing; the message says which, and how to install it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        imported(name, "onnx")
