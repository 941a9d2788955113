"""sdgraph: a graph-transformation compiler for diffusion UNets."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

_PACKAGES = ("exporters", "forecasts", "options", "passes", "schedules", "testing", "tuning")  # the public ones

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Load a public name or a submodule when it is first asked for, so that `sdgraph --help` does not load PyTorch."""
    if name == "ModelMixin":  # diffusers looks for the base class of `GraphUNet` in the module that a pipeline names
        return importlib.import_module("diffusers").ModelMixin
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    public = importlib.import_module(f"{__name__}.public")
    if name == "__all__" or name in public.__all__:
        value = globals()[name] = getattr(public, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__getattr__("__all__"), *_PACKAGES})
