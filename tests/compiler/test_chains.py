"""Passes nest in chains, repeat until they find nothing, and come in the order that they require."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import Chain, Contract, Fixpoint, Graph, Pass
from sdgraph.errors import (
    ContractError,
    OrderError,
    PassError,
)

from ..models import answer, call_of
from .sample_passes import LyingScale, NothingAndFine, Scale


@dataclass(frozen=True)
class NeedsScale(Scale):
    requires: ClassVar[tuple[str, ...]] = ("Scale",)


@dataclass(frozen=True)
class NotAfterScale(Scale):
    not_after: ClassVar[dict[str, str]] = {"Scale": "the scale is baked in"}


@dataclass(frozen=True)
class HalveLargeFactor(Pass):
    """One step at a time: to be repeated until it finds nothing."""

    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def run(self, graph: Graph) -> None:
        for node in graph.nodes:
            if node.target is operator.mul and isinstance(node.args[1], float) and node.args[1] > 1:
                node.args = (node.args[0], node.args[1] / 2)
                return


@dataclass(frozen=True)
class Forever(Pass):
    def run(self, graph: Graph) -> None:
        Scale(1.5).run(graph)


def test_order(graph: Graph) -> None:
    with pytest.raises(OrderError, match="NeedsScale needs Scale before it"):
        sdgraph.apply(graph, [NeedsScale()])
    with pytest.raises(OrderError, match="cannot come after Scale: the scale is baked in"):
        sdgraph.apply(graph, [Scale(), NotAfterScale()])
    with pytest.raises(OrderError, match="cannot come after Scale"):  # also over two applies
        sdgraph.apply(sdgraph.apply(graph, [Scale()], verify=False), [NotAfterScale()])
    both = sdgraph.apply(graph, [NotAfterScale(), Scale(), NeedsScale()], verify=False)
    assert [type(p.one).__name__ for p in both.graph.passes] == ["NotAfterScale", "Scale", "NeedsScale"]


def test_chains_nest_and_report_their_children(unet: UNet2DConditionModel, graph: Graph) -> None:
    chain = Chain((Scale(2.0), Chain((Scale(3.0), NothingAndFine()))))
    assert chain.contract == Contract.APPROXIMATE
    result = sdgraph.apply(graph, [chain])
    (row,) = result.report.passes
    assert [c.spec for c in row.children] == ["Scale()", "Chain((Scale(3.0), NothingAndFine()))"]
    assert [c.spec for c in row.children[1].children] == ["Scale(3.0)"]
    call = call_of(unet)
    assert torch.equal(answer(result, call), answer(unet, call) * 2.0 * 3.0)
    assert sdgraph.parse(str(chain)) == (chain,)


def test_a_chain_names_the_guilty_child(graph: Graph) -> None:
    @dataclass(frozen=True)
    class Honest(LyingScale):
        by: float = 1.0

    with pytest.raises(ContractError, match=r"LyingScale\(\) promises EXACT"):
        sdgraph.apply(graph, [Chain((Honest(), LyingScale()))])


def test_fixpoint_stops_and_refuses_to_run_forever(unet: UNet2DConditionModel, graph: Graph) -> None:
    result = sdgraph.apply(graph, [Scale(8.0), Fixpoint((HalveLargeFactor(),))])
    call = call_of(unet)
    assert torch.equal(answer(result, call), answer(unet, call))
    with pytest.raises(PassError, match="still changes the graph after 3 rounds"):
        sdgraph.apply(graph, [Fixpoint((Forever(),), repeat=3)], verify=False)
