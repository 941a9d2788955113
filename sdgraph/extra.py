"""Optional dependencies, which are imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import ExtraError


def imported(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: the name of the module.
        extra: the extra of sdgraph that installs it, such as "onnx".
    Returns:
        The module.
    Raises:
        ExtraError: the module cannot be imported; the hint is the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtraError(
            f"{module} cannot be imported: {error}", where=module, hint=f"pip install sdgraph[{extra}]"
        ) from error
