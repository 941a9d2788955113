"""Verification: a pass that promises EXACT and breaks it only at some calls is refused all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import sdgraph
from sdgraph import Contract, Graph, Pass
from sdgraph.compiler.numerics import generations
from sdgraph.errors import ContractError, NoChangeError
from sdgraph.passes import HoistInvariants, InheritFeatures
from sdgraph.schedules import Once

from ..models import build


@dataclass(frozen=True)
class Exact(Pass):
    contract: ClassVar[Contract] = Contract.EXACT


@dataclass(frozen=True)
class KeepsTheTimestep(Exact):
    """Right at the first call of a generation only."""

    def run(self, graph: Graph) -> None:
        graph.inherit(graph.region("time_embedding").output, "time", Once())


@dataclass(frozen=True)
class OffAtOddSizes(Exact):
    def run(self, graph: Graph) -> None:
        graph.insert_after(graph.region("conv_in").output, lambda x: x + x.shape[-1] % 2)


@dataclass(frozen=True)
class DropsResiduals(Exact):
    """Right where a call has no residuals of a ControlNet."""

    def run(self, graph: Graph) -> None:
        residual = graph.input("mid_block_additional_residual")
        (add,) = residual.users
        graph.rewire(add, next(n for n in add.all_input_nodes if n is not residual))


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        (KeepsTheTimestep(), "a call that inherits time"),
        (OffAtOddSizes(), "norm1"),
        (DropsResiduals(), "node"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_a_broken_promise_is_seen(broken: Pass, where: str, traced: Callable[[str], Any]) -> None:
    _, unet = traced("sd15")
    with pytest.raises(ContractError, match=r"promises EXACT but its output differs") as caught:
        sdgraph.apply(unet, broken)
    assert where in caught.value.where
    sdgraph.apply(unet, broken, verify=False)


def test_a_stale_call_that_becomes_infinite_is_seen(traced: Callable[[str], Any]) -> None:
    @dataclass(frozen=True)
    class Overflows(Pass):
        def run(self, graph: Graph) -> None:
            node = graph.region("mid_block").output
            kept = graph.inherit(node, "mid", Once())
            graph.insert_after(kept, lambda now, was: now + (now - was) / 0, node)

    with pytest.raises(ContractError, match="infinite or nan"):
        sdgraph.apply(traced("sd15")[1], Overflows())


@pytest.mark.parametrize("name", ["sd15", "sdxl", "lcm", "no-mid"])
def test_what_is_tried(name: str) -> None:
    graph = sdgraph.trace(build(name))
    (single,), (first, second) = generations(graph)
    optional = {i.name for i in graph.inputs if i.optional}
    assert not optional & single.keys()
    assert optional <= first.keys() == second.keys()
    assert first["sample"].shape[2] % 2 == 1
    for spec in graph.inputs:
        same = torch.equal(first[spec.name], second[spec.name])
        assert same == spec.conditioning, spec.name


@pytest.mark.law("Contracts hold at calls that reuse features, too.")
@pytest.mark.slow
def test_exact_passes_after_inheriting_ones_are_compared_at_inherited_calls(traced: Callable[[str], Any]) -> None:
    _, unet = traced("sd15-levels")
    unet = sdgraph.apply(unet, InheritFeatures.deep_cache(3))
    report = sdgraph.apply(unet, HoistInvariants()).report
    assert report.passes[-1].difference == 0
    with pytest.raises(ContractError, match="a call that inherits"):
        sdgraph.apply(unet, KeepsTheTimestep())


@dataclass(frozen=True)
class Reschedules(Pass):
    def run(self, graph: Graph) -> None:
        for name in graph.sites:
            graph.reschedule(name, Once())


@dataclass(frozen=True)
class SwapsAModule(Pass):
    """Another module without weights in the place of one: no node and no tensor changes."""

    def run(self, graph: Graph) -> None:
        graph.add_module("conv_act", torch.nn.Hardswish())


@dataclass(frozen=True)
class Requires(Pass):
    def run(self, graph: Graph) -> None:
        graph.require("H % 2 == 0", "the pass needs it")


@pytest.mark.slow
@pytest.mark.parametrize("one", [Reschedules(), SwapsAModule(), Requires()], ids=lambda one: type(one).__name__)
def test_changes_without_a_changed_node_are_changes(one: Pass, traced: Callable[[str], Any]) -> None:
    unet = sdgraph.apply(traced("sd15-levels")[1], InheritFeatures.deep_cache(3), verify=False)
    once = sdgraph.apply(unet, one, verify=False)
    with pytest.raises(NoChangeError):
        sdgraph.apply(once, one, verify=False)
