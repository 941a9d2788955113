"""The runner: contracts are enforced, failures roll back, order and emptiness are checked, passes nest."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Chain, Contract, Findings, Fixpoint, Graph, Pass
from sdgraph.errors import ContractError, EditError, NoChangeError, OrderError, PassError, ShapeError, SpecError
from sdgraph.runner import fingerprint

from .models import answer, build, call_of


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the output."""

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    by: float = 2.0

    def run(self, graph: Graph) -> Findings:
        out = graph.output
        graph.insert_after(out, lambda x: x * self.by)
        return Findings((f"scaled {out.name}",))


@dataclass(frozen=True)
class LyingScale(Scale):
    """Says EXACT, is not; in the middle of the graph."""

    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph: Graph) -> Findings:
        graph.insert_after(graph.region("mid_block.resnets.0").output, lambda x: x * self.by)
        return Findings()


@dataclass(frozen=True)
class NearlyExact(LyingScale):
    contract: ClassVar[Contract] = Contract.CLOSE(rtol=1e-2, atol=1e-2)


@dataclass(frozen=True)
class Nothing(Pass):
    def run(self, graph: Graph) -> None:
        return None


@dataclass(frozen=True)
class NothingAndFine(Nothing):
    may_change_nothing: ClassVar[bool] = True


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


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return build("sd15")


@pytest.fixture(scope="module")
def traced(unet: UNet2DConditionModel) -> Graph:
    return sdgraph.trace(unet)


def test_a_pass_does_what_it_does(unet: UNet2DConditionModel, traced: Graph) -> None:
    call = call_of(unet)
    scaled = sdgraph.apply(traced, [Scale(3.0)])
    assert torch.equal(answer(scaled, call), answer(unet, call) * 3.0)
    assert scaled.report.passes[0].edits[0].startswith("scaled conv_out")


def test_a_lying_pass_is_caught_and_the_first_node_named(traced: Graph) -> None:
    with pytest.raises(ContractError, match=r"LyingScale\(\) promises EXACT") as caught:
        sdgraph.apply(traced, [LyingScale()])
    assert "mid_block" in caught.value.where
    assert "computed from the new mul" in caught.value.where
    sdgraph.apply(traced, [LyingScale()], verify=False)  # not asked, not told


def test_a_close_contract_has_bounds(traced: Graph) -> None:
    sdgraph.apply(traced, [NearlyExact(1.0001)])
    with pytest.raises(ContractError, match=r"CLOSE\(rtol=0\.01, atol=0\.01\)"):
        sdgraph.apply(traced, [NearlyExact(3.0)])


def test_an_infinite_output_is_caught(traced: Graph) -> None:
    with pytest.raises(ContractError, match="infinite or nan"):
        sdgraph.apply(traced, [Infinite()])


def test_a_pass_that_changes_nothing_is_an_error_unless_it_says_so(traced: Graph) -> None:
    with pytest.raises(NoChangeError, match=r"Nothing\(\) changed nothing"):
        sdgraph.apply(traced, [Nothing()])
    assert sdgraph.apply(traced, [NothingAndFine()]).report.passes[0].difference == 0


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
def test_failure_rolls_back(traced: Graph, one: Pass, error: type[Exception], words: str) -> None:
    before = fingerprint(traced)
    with pytest.raises(error, match=words):
        sdgraph.apply(traced, [Scale(), one], verify=False)
    assert fingerprint(traced) == before
    assert traced.passes == ()


def test_editing_shared_weights_in_place_is_caught() -> None:
    unet = build("sd15")
    with pytest.raises(ContractError, match="edited weights in place") as caught:
        sdgraph.apply(unet, [EditsWeights()], verify=False)
    assert "weight" in caught.value.where


def test_a_source_made_in_inference_mode() -> None:
    with torch.inference_mode():
        unet = build("sd15")
    clean = sdgraph.apply(unet, "CleanUp")
    call = call_of(unet)
    assert torch.equal(answer(clean, call), answer(unet, call))


def test_order(traced: Graph) -> None:
    with pytest.raises(OrderError, match="NeedsScale needs Scale before it"):
        sdgraph.apply(traced, [NeedsScale()])
    with pytest.raises(OrderError, match="cannot come after Scale: the scale is baked in"):
        sdgraph.apply(traced, [Scale(), NotAfterScale()])
    with pytest.raises(OrderError, match="cannot come after Scale"):  # also over two applies
        sdgraph.apply(sdgraph.apply(traced, [Scale()], verify=False), [NotAfterScale()])
    both = sdgraph.apply(traced, [NotAfterScale(), Scale(), NeedsScale()], verify=False)
    assert [type(p).__name__ for p in both.graph.passes] == ["NotAfterScale", "Scale", "NeedsScale"]


def test_chains_nest_and_report_their_children(unet: UNet2DConditionModel, traced: Graph) -> None:
    chain = Chain((Scale(2.0), Chain((Scale(3.0), NothingAndFine()))))
    assert chain.contract == Contract.APPROXIMATE
    result = sdgraph.apply(traced, [chain])
    (row,) = result.report.passes
    assert [c.spec for c in row.children] == ["Scale()", "Chain((Scale(3.0), NothingAndFine()))"]
    assert [c.spec for c in row.children[1].children] == ["Scale(3.0)"]
    call = call_of(unet)
    assert torch.equal(answer(result, call), answer(unet, call) * 2.0 * 3.0)
    assert sdgraph.parse(str(chain)) == (chain,)


def test_a_chain_names_the_guilty_child(traced: Graph) -> None:
    @dataclass(frozen=True)
    class Honest(LyingScale):
        by: float = 1.0

    with pytest.raises(ContractError, match=r"LyingScale\(\) promises EXACT"):
        sdgraph.apply(traced, [Chain((Honest(), LyingScale()))])


def test_fixpoint_stops_and_refuses_to_run_forever(unet: UNet2DConditionModel, traced: Graph) -> None:
    result = sdgraph.apply(traced, [Scale(8.0), Fixpoint((HalveLargeFactor(),))])
    call = call_of(unet)
    assert torch.equal(answer(result, call), answer(unet, call))
    with pytest.raises(PassError, match="still changes the graph after 3 rounds"):
        sdgraph.apply(traced, [Fixpoint((Forever(),), repeat=3)], verify=False)


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
def test_wrong_pass_types(traced: Graph, wrong: Any) -> None:
    with pytest.raises(SpecError, match="is not a pass"):
        sdgraph.apply(traced, wrong)


def test_a_parameter_is_added_and_trained(unet: UNet2DConditionModel, traced: Graph) -> None:
    @dataclass(frozen=True)
    class LearnedScale(Pass):
        contract: ClassVar[Contract] = Contract.EXACT

        def run(self, graph: Graph) -> None:
            out = graph.output
            gain = graph.add_parameter("conv_out.gain", torch.ones(4, 1, 1))
            graph.insert_after(out, lambda x, g: x * g, gain)

    result = sdgraph.apply(traced, [LearnedScale()])
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
