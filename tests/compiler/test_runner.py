"""The runner enforces contracts, rolls back failures and refuses passes that change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Contract, Graph, Pass
from sdgraph.errors import (
    ContractError,
    EditError,
    NoChangeError,
    PassError,
    ShapeError,
    SpecError,
)
from sdgraph.ir.verify import fingerprint

from ..models import answer, build, call_of
from .sample_passes import LyingScale, Nothing, NothingAndFine, Scale


@dataclass(frozen=True)
class NearlyExact(LyingScale):
    contract: ClassVar[Contract] = Contract.CLOSE(rtol=1e-2, atol=1e-2)


@dataclass(frozen=True)
class Crash(Pass):
    def run(self, graph: Graph) -> None:
        Scale().run(graph)
        raise RuntimeError("boom")


@dataclass(frozen=True)
class EditsWeights(Pass):
    def run(self, graph: Graph) -> None:
        Scale().run(graph)
        with torch.no_grad():
            next(iter(graph.parameters().values())).add_(1)


@dataclass(frozen=True)
class DropsInput(Pass):
    def run(self, graph: Graph) -> None:
        residual = graph.input("mid_block_additional_residual")
        (add,) = residual.users
        graph.rewire(add, add.args[0])
        graph.erase(add)
        graph.erase(residual)


@dataclass(frozen=True)
class ChangesOutput(Pass):
    def run(self, graph: Graph) -> None:
        made = graph.insert(lambda x: torch.cat([x, x], dim=1), graph.output)
        graph.fx.output_node().args = (made,)


@dataclass(frozen=True)
class FreezesShape(Pass):
    """Reads a size off the nominal value: right for one call, wrong for all others."""

    def run(self, graph: Graph) -> None:
        out = graph.output
        shape = tuple(out.meta["val"].shape)
        graph.insert_after(out, lambda x: x.reshape(shape))


@dataclass(frozen=True)
class Infinite(Scale):
    by: float = float("inf")


def test_a_pass_does_what_it_does(unet: UNet2DConditionModel, graph: Graph) -> None:
    call = call_of(unet)
    scaled = sdgraph.apply(graph, [Scale(3.0)])
    assert torch.equal(answer(scaled, call), answer(unet, call) * 3.0)
    (edit,) = scaled.report.passes[0].edits
    assert (edit.kind, edit.nodes, edit.by) == ("replaced", ("conv_out",), (scaled.graph.output.name,))
    assert scaled.report.passes[0].notes == ("scaled conv_out",)


@pytest.mark.law("A pass that breaks its contract is refused, and the first node that differs is named.")
def test_a_lying_pass_is_caught_and_the_first_node_named(graph: Graph) -> None:
    with pytest.raises(ContractError, match=r"LyingScale\(\) promises EXACT") as caught:
        sdgraph.apply(graph, [LyingScale()])
    assert "mid_block" in caught.value.where
    assert "computed from the new mul" in caught.value.where
    sdgraph.apply(graph, [LyingScale()], verify=False)  # nothing is verified


def test_a_close_contract_has_bounds(graph: Graph) -> None:
    sdgraph.apply(graph, [NearlyExact(1.0001)])
    with pytest.raises(ContractError, match=r"CLOSE\(rtol=0\.01, atol=0\.01\)"):
        sdgraph.apply(graph, [NearlyExact(3.0)])


def test_an_infinite_output_is_caught(graph: Graph) -> None:
    with pytest.raises(ContractError, match="infinite or nan"):
        sdgraph.apply(graph, [Infinite()])


def test_a_pass_that_changes_nothing_is_an_error_unless_it_says_so(graph: Graph) -> None:
    with pytest.raises(NoChangeError, match=r"Nothing\(\) changed nothing"):
        sdgraph.apply(graph, [Nothing()])
    assert sdgraph.apply(graph, [NothingAndFine()]).report.passes[0].difference == 0


@pytest.mark.law("A pass that fails leaves the graph unchanged.")
@pytest.mark.parametrize(
    ("one", "error", "words"),
    [
        (Crash(), PassError, r"Crash\(\) failed: RuntimeError: boom"),
        (DropsInput(), ContractError, "changed the inputs"),
        (ChangesOutput(), ContractError, "changed the output from"),
        (FreezesShape(), ShapeError, "reshape cannot take"),
        (Nothing(), NoChangeError, "changed nothing"),
    ],
)
def test_failure_rolls_back(graph: Graph, one: Pass, error: type[Exception], words: str) -> None:
    before = fingerprint(graph)
    with pytest.raises(error, match=words):
        sdgraph.apply(graph, [Scale(), one], verify=False)
    assert fingerprint(graph) == before
    assert graph.passes == ()


def test_editing_shared_weights_in_place_is_caught() -> None:
    unet = build("sd15")
    with pytest.raises(ContractError, match="edits weights in place") as caught:
        sdgraph.apply(unet, [EditsWeights()], verify=False)
    assert "weight" in caught.value.where


@pytest.mark.slow
def test_a_source_made_in_inference_mode() -> None:
    with torch.inference_mode():
        unet = build("sd15")
    clean = sdgraph.apply(unet, "CleanUp")
    call = call_of(unet)
    assert torch.equal(answer(clean, call), answer(unet, call))


def test_apply_again_adds_to_the_recipe_and_leaves_the_first_alone(unet: UNet2DConditionModel) -> None:
    once = sdgraph.apply(unet, [Scale(2.0)])
    twice = sdgraph.apply(once, [Scale(3.0)])
    call = call_of(unet)
    assert torch.equal(answer(once, call), answer(unet, call) * 2.0)
    assert torch.equal(answer(twice, call), answer(unet, call) * 6.0)
    assert [str(p) for p in twice.graph.passes] == ["Scale()", "Scale(3.0)"]
    twice.to(torch.float64)
    assert once.dtype == unet.dtype == torch.float32
    moved = sdgraph.apply(twice, [Scale(0.5)])  # a graph whose weights have moved since it was traced
    assert moved.graph.dtype == moved.dtype == torch.float64


@pytest.mark.parametrize("wrong", [7, Scale, [Scale], [7], nn.Linear(1, 1), None, [None]])
def test_wrong_pass_types(graph: Graph, wrong: Any) -> None:
    with pytest.raises(SpecError, match="is not a pass"):
        sdgraph.apply(graph, wrong)


def test_a_parameter_is_added_and_trained(unet: UNet2DConditionModel, graph: Graph) -> None:
    @dataclass(frozen=True)
    class LearnedScale(Pass):
        contract: ClassVar[Contract] = Contract.EXACT

        def run(self, graph: Graph) -> None:
            out = graph.output
            gain = graph.add_parameter("conv_out.gain", torch.ones(4, 1, 1))
            graph.insert_after(out, lambda x, g: x * g, gain)

    result = sdgraph.apply(graph, [LearnedScale()])
    call = call_of(unet)
    assert torch.equal(answer(result, call), answer(unet, call))
    result.train()
    result(**call).sample.square().mean().backward()
    assert result.get_parameter("conv_out.gain").grad is not None
    assert unet.conv_in.weight.grad is None
    with pytest.raises(EditError, match="there is a weight"):
        sdgraph.apply(result, [LearnedScale()])


def test_bad_contract_bounds() -> None:
    with pytest.raises(TypeError, match="has no bounds"):
        Contract.EXACT(rtol=1.0)
    assert str(Contract.weakest([Contract.CLOSE, Contract.EXACT])) == str(Contract.CLOSE)
    assert Contract.weakest([]) == Contract.EXACT


def test_a_contract_that_became_an_option_is_told(graph: Graph) -> None:
    @dataclass(frozen=True)
    class Forgetful(Pass):
        contract: Contract = Contract.EXACT  # type: ignore[misc]
        by: float = 2.0

        run = Scale.run

    with pytest.raises(SpecError, match=r"(?s)contract is 3\.0.*Forgetful"):
        sdgraph.apply(graph, [Forgetful(3.0)])  # type: ignore[arg-type]
