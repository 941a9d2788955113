"""The location in a pass's own code where it failed, and the nodes that it was working on."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import fx

from ..errors import DecisionError, PassError
from ..graph import Graph
from ..ir.nodes import scope
from ..ir.regions import Region


def location(error: BaseException, failed: object, graph: Graph) -> str:
    """Return the last line of the pass's code that an error came through, and its regions and nodes there.

    Args:
        graph: the graph that the pass was editing.
    Returns:
        Text such as `thin.py:31, with region = mid_block, node = add_3 of mid_block.resnets.0`; empty if the error did
        not come through code of the pass.
    """
    packages = {_package(cls.__module__) for cls in type(failed).__mro__ if not _is_core(cls.__module__)}
    own = [(frame, line) for frame, line in _frames(error) if _package(frame.f_globals.get("__name__", "")) in packages]
    if not own:
        return ""
    frame, line = own[-1]
    return f"{frame.f_code.co_filename}:{line}{_working_on([f for f, _ in own], graph)}"


def failure(failed: object, error: Exception, graph: Graph) -> PassError:
    """Return our error for an exception in the code of a pass.

    Args:
        failed: the pass.
        error: the exception.
        graph: the graph that the pass was editing.
    """
    where, message = location(error, failed, graph), f"{type(error).__name__}: {error}"
    if graph.device.type != "meta" or "meta" not in message.lower():
        return PassError(f"{failed} failed: {message}", where=where, hint="the graph is unchanged; mend the pass")
    return DecisionError(
        f"{failed} needs the numbers of weights, and here are only their shapes: {message.splitlines()[0]}",
        where=where,
        hint="to decide by numbers: rank = graph.decide(path, code, weight), or by_weights = True on a Rewrite; "
        "to fill new weights: make them on the device of the old ones (device=weight.device)",
    )


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames that an error came through, with their lines, outermost first."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _is_core(module: str) -> bool:
    return module in ("builtins", "abc") or _package(module) == "sdgraph"


def _package(module: str) -> str:
    """Return the package of a module; `sdgraph.passes` and `sdgraph.exporters` count as separate packages."""
    names = module.split(".")
    return ".".join(names[:2]) if names[:2] in (["sdgraph", "passes"], ["sdgraph", "exporters"]) else names[0]


def _working_on(frames: list[FrameType], graph: Graph) -> str:
    """Return the regions, nodes and paths in the local variables of the innermost frame that has such."""
    for frame in reversed(frames):
        named = {name: _named(value, graph) for name, value in frame.f_locals.items()}
        words = [f"{name} = {value}" for name, value in named.items() if value]
        if words:
            return f", with {', '.join(words[:3])}"
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
