"""An error inside of a pass names the line of the pass, and what it worked on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

import sdgraph
from sdgraph import Chain, Graph, Pass
from sdgraph.errors import (
    PassError,
    PathError,
)

from .sample_passes import Scale


@dataclass(frozen=True)
class CrashOnRegion(Pass):
    def run(self, graph: Graph) -> None:
        for path in ("conv_in", "mid_block.resnets.0"):
            region = graph.region(path)
            {"conv_in": 1}[region.path]


@dataclass(frozen=True)
class CrashInCode(Pass):
    def run(self, graph: Graph) -> None:
        def code(x: Any) -> Any:
            later = x.grad_fn
            return {}["gone"] or later

        graph.insert_after(graph.region("conv_in").output, code)


@dataclass(frozen=True)
class WrongPath(Pass):
    def run(self, graph: Graph) -> None:
        graph.bypass("mid_blok")


def test_an_error_inside_of_a_pass_names_its_line_and_what_it_worked_on(graph: Graph) -> None:
    line = inspect.getsourcelines(CrashOnRegion)[1]
    with pytest.raises(PassError, match=r"KeyError: 'mid_block\.resnets\.0'") as caught:
        sdgraph.apply(graph, [CrashOnRegion()])
    named = "path = mid_block.resnets.0, region = mid_block.resnets.0"
    assert caught.value.where.endswith(f"test_failures.py:{line + 5}, with {named}")
    line = inspect.getsourcelines(CrashInCode)[1]
    with pytest.raises(PassError, match="KeyError: 'gone'") as caught:
        sdgraph.apply(graph, [CrashInCode()])
    assert caught.value.where.endswith(f"test_failures.py:{line + 5}, with x = conv_in of conv_in")
    line = inspect.getsourcelines(WrongPath)[1]
    with pytest.raises(PathError, match="did you mean 'mid_block'") as missing:
        sdgraph.apply(graph, [Chain((Scale(), WrongPath()))])
    assert "\n  pass:  WrongPath(), " in str(missing.value)
    assert f"test_failures.py:{line + 3}" in str(missing.value)
    assert str(missing.value).count("pass:") == 1
