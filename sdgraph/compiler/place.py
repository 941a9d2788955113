"""Where in its own code a pass failed, and what it was working on."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import fx

from ..graph import Graph
from ..ir.nodes import scope
from ..ir.region import Region
from .base import Pass


def place(error: BaseException, one: Pass, graph: Graph) -> str:
    """The line of the pass's code that an error came through last, and the regions and nodes in its local variables.

    Args:
        graph: that the pass was editing.
    Returns:
        such as `thin.py:31, with region = mid_block, node = add_3 of mid_block.resnets.0`; empty if the error did not
        come through code of the pass.
    """
    packages = {_package(cls.__module__) for cls in type(one).__mro__ if not _is_core(cls.__module__)}
    own = [(frame, line) for frame, line in _frames(error) if _package(frame.f_globals.get("__name__", "")) in packages]
    if not own:
        return ""
    frame, line = own[-1]
    return f"{frame.f_code.co_filename}:{line}{_working_on([f for f, _ in own], graph)}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that an error came through, with their lines, outermost first."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _is_core(module: str) -> bool:
    return module in ("builtins", "abc") or _package(module) == "sdgraph"


def _package(module: str) -> str:
    """What a module is distributed in; the passes that come with sdgraph are their own."""
    names = module.split(".")
    return ".".join(names[:2]) if names[:2] in (["sdgraph", "passes"], ["sdgraph", "exporters"]) else names[0]


def _working_on(frames: list[FrameType], graph: Graph) -> str:
    """The regions, nodes and paths in the local variables of the innermost frame that has some."""
    for frame in reversed(frames):
        found = {name: _named(value, graph) for name, value in frame.f_locals.items()}
        told = [f"{name} = {what}" for name, what in found.items() if what]
        if told:
            return f", with {', '.join(told[:3])}"
    return ""


def _named(value: Any, graph: Graph) -> str:
    if isinstance(value, fx.proxy.Attribute):  # to ask for its node would make one
        return ""
    if isinstance(value, fx.Proxy):
        value = value.node
    if isinstance(value, fx.Node):
        return f"{value.name} of {scope(value) or 'the top level'}"
    if isinstance(value, Region):
        return value.path
    return value if isinstance(value, str) and value in graph.classes else ""
