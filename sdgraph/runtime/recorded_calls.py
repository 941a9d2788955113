"""The calls of a real generation, recorded for measurements that repeat them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from ..errors import ScheduleError
from ..graph import Graph
from .unet import GraphUNet

Call = TypeVar("Call")


class CallRecorder(GraphUNet):
    """A UNet that records the inputs of its calls, by name, in `calls`.

    Args:
        graph: the graph, which is copied.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.copy())
        self.calls: list[Mapping[str, Tensor]] = []

    def run(self, flat: Mapping[str, Tensor]) -> Tensor:
        self.calls.append({name: value.clone() for name, value in flat.items()})
        return super().run(flat)


def timestep_of(call: Mapping[str, Tensor]) -> float:
    """Return the timestep of a recorded call, which is that of its first sample.

    Args:
        call: the inputs of the call, by name.
    """
    return float(call["timestep"].reshape(-1)[0])


def spread(calls: Sequence[Call], number: int) -> list[Call]:
    """Return calls that are spread evenly over a generation, the first and the last among them.

    Args:
        calls: the calls of the generation.
        number: the largest number of calls to return.
    """
    places = np.linspace(0, len(calls) - 1, min(number, len(calls))).round().astype(int)
    return [calls[place] for place in places]


def first_call(graph: Graph, generate: Callable[[GraphUNet], object]) -> Mapping[str, Tensor]:
    """Return the inputs of the first call of a generation, by name. The generation stops there.

    Args:
        graph: the graph of the UNet.
        generate: the function that generates with a UNet.
    Raises:
        ScheduleError: the generation makes no call.
    """
    try:
        generate(_Stopping(graph.copy()))
    except _FirstCall as call:
        return call.flat
    raise ScheduleError("the generation makes no call", where="its UNet", hint="more steps")


class _FirstCall(Exception):
    """The inputs of the first call of a generation."""

    def __init__(self, flat: Mapping[str, Tensor]) -> None:
        self.flat = flat


class _Stopping(GraphUNet):
    """A UNet that stops a generation at its first call."""

    def run(self, flat: Mapping[str, Tensor]) -> Tensor:
        raise _FirstCall(flat)
