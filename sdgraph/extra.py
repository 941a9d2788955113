"""Optional dependencies, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import ExtraError


def imported(module: str, extra: str) -> Any:
    """A module of an optional dependency.

    Args:
        module: its name.
        extra: of sdgraph's, which installs it.
    Raises:
        ExtraError: it cannot be imported; with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtraError(
            f"{module} cannot be imported: {error}", where=module, hint=f"pip install sdgraph[{extra}]"
        ) from error
