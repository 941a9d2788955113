"""The runner: contracts are enforced, failures roll back, order and emptiness are checked, passes nest."""

from __future__ import annotations

import copy
import inspect
import json
import operator
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from sdgraph import Chain, Contract, Findings, Fixpoint, Graph, GraphUNet, Pass
from sdgraph.errors import (
    CallError,
    ContractError,
    DecisionError,
    EditError,
    ModeError,
    NoChangeError,
    OrderError,
    PassError,
    PathError,
    SavedError,
    ShapeError,
    SpecError,
)
from sdgraph.exporters import onnx, ort
from sdgraph.ir.structure import fingerprint

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
    assert [type(p.one).__name__ for p in both.graph.passes] == ["NotAfterScale", "Scale", "NeedsScale"]


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


def test_a_contract_that_became_an_option_is_told(traced: Graph) -> None:
    @dataclass(frozen=True)
    class Forgetful(Pass):
        contract: Contract = Contract.EXACT  # type: ignore[misc]
        by: float = 2.0

        run = Scale.run

    with pytest.raises(SpecError, match=r"the contract of Forgetful is 3\.0"):
        sdgraph.apply(traced, [Forgetful(3.0)])  # type: ignore[arg-type]


# -- decisions --------------------------------------------------------------------------------------------------------


def thinnest(graph: Graph) -> str:
    """The convolution in the middle with the smallest weights: a decision that needs numbers."""
    found: dict[float, str] = {}
    for path in ("mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"):
        found[graph.module(path).weight.norm().item()] = path
    return found[min(found)]


@dataclass(frozen=True)
class DropThinnest(Pass):
    """Scales the thinnest convolution to nothing; and says which that is."""

    def run(self, graph: Graph) -> Findings:
        path = graph.decide("the thinnest convolution", lambda: thinnest(graph))
        graph.insert_after(graph.region(path).output, lambda x: x * 0.0)
        return Findings((path,))


@dataclass(frozen=True)
class DropThinnestUnrecorded(Pass):
    def run(self, graph: Graph) -> None:
        graph.insert_after(graph.region(thinnest(graph)).output, lambda x: x * 0.0)


@dataclass(frozen=True)
class DropAnother(Pass):
    """Decides with each run, so a repeated pass has several answers to the same question."""

    def run(self, graph: Graph) -> None:
        done = sum(n.target is operator.mul and n.args[1] == 0.5 for n in graph.nodes)
        if graph.decide("go on", lambda: bool(done < 2 + graph.module("conv_in").weight.isfinite().all())):
            Scale(0.5).run(graph)


@dataclass(frozen=True)
class DecideBy(Pass):
    value: str = "1"

    def run(self, graph: Graph) -> None:
        graph.decide("it", lambda: eval(self.value))
        Scale(0.5).run(graph)


@pytest.mark.parametrize(
    "one",
    [
        Chain((Scale(), DropThinnest())),
        pytest.param(DropThinnest(), marks=pytest.mark.slow),
        pytest.param(Fixpoint((DropAnother(),)), marks=pytest.mark.slow),
    ],
)
def test_decisions_survive_saving_loading_copying_and_further_passes(
    unet: UNet2DConditionModel, one: Pass, tmp_path: Path
) -> None:
    made = sdgraph.apply(unet, [one], verify=False)
    (applied,) = made.graph.passes
    assert applied.decisions
    assert made.report.passes[0].decisions == applied.decisions
    assert f"{one} decided {applied.decisions[0].about}: " in str(made.report)
    made.save_pretrained(tmp_path / "unet")
    back = GraphUNet.from_pretrained(tmp_path / "unet")
    assert back.graph.passes == (applied,)
    call = call_of(unet)
    assert torch.equal(answer(back, call), answer(made, call))
    again = sdgraph.apply(copy.deepcopy(back), "CleanUp, Scale(3.0)", verify=False)
    assert again.graph.passes[0] == applied
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / "again"), call), answer(again, call))


def test_a_pass_that_does_not_record_its_decisions_is_named_when_saving(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    made = sdgraph.apply(unet, [DropThinnestUnrecorded()], verify=False)
    with pytest.raises(ModeError, match=r"DropThinnestUnrecorded\(\) needs the numbers of weights") as caught:
        made.save_pretrained(tmp_path / "unet")
    line = inspect.getsourcelines(thinnest)[1] + 4
    assert f"test_passes.py:{line}, with path = mid_block.resnets.0.conv1" in caught.value.where
    assert "graph.decide(" in caught.value.hint
    assert not (tmp_path / "unet").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [("torch.ones(2)", "is a Tensor that cannot be recorded"), ("float('nan')", "not JSON compliant")],
)
def test_what_cannot_be_recorded_is_no_decision(traced: Graph, value: str, words: str) -> None:
    with pytest.raises(DecisionError, match=words):
        sdgraph.apply(traced, [DecideBy(value)], verify=False)
    made = sdgraph.apply(traced, [DecideBy("(1, {2: 0.1})")], verify=False)
    assert made.graph.passes[0].decisions[0].value == [1, {"2": 0.1}]  # as it comes back from a file


def test_decisions_that_do_not_fit_the_pass_are_refused(
    unet: UNet2DConditionModel, traced: Graph, tmp_path: Path
) -> None:
    sdgraph.apply(unet, [DropThinnest()], verify=False).save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "sdgraph.json"
    recipe = json.loads(file.read_text())
    (entry,) = recipe["passes"]
    for decisions, words in (
        ([], "and no more are recorded"),
        ([["another", 1]], "the next one recorded is 'another'"),
        ([*entry["decisions"], ["more", 1]], "did not ask for the decision 'more'"),
        ([7], "is damaged: passes"),
    ):
        file.write_text(json.dumps(recipe | {"passes": [entry | {"decisions": decisions}]}))
        with pytest.raises(SavedError, match=words):
            GraphUNet.from_pretrained(tmp_path / "unet")


# -- weights made of weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank(Pass):
    """Weights by SVD, cat and mul, in a new module, as parameters, and by `copy_`."""

    rank: int = 4

    def run(self, graph: Graph) -> None:
        path = "mid_block.attentions.0.proj_in"
        old = graph.module(path)
        weight = old.weight.detach().flatten(1)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        new = nn.Sequential(
            nn.Conv2d(weight.shape[1], self.rank, 1, bias=False, device=weight.device, dtype=weight.dtype),
            nn.Conv2d(self.rank, weight.shape[0], 1, device=weight.device, dtype=weight.dtype),
        )
        with torch.no_grad():
            new[0].weight.copy_(v[: self.rank, :, None, None])
            new[1].weight.copy_((u * s)[:, : self.rank, None, None])
            new[1].bias = nn.Parameter(torch.cat([old.bias[:1], old.bias[1:].mul(1)]))
        graph.replace(path, new)
        gain = graph.add_parameter("conv_out.gain", graph.tensor("conv_norm_out.weight").mean().reshape(1))
        graph.insert_after(graph.output, lambda x, g: x * g, gain)


@dataclass(frozen=True)
class HalveLast(Pass):
    """Only the numbers of the last weights change."""

    def run(self, graph: Graph) -> None:
        new = copy.deepcopy(graph.module("conv_out"))
        new.weight = nn.Parameter(new.weight / 2)
        graph.add_module("conv_out", new)


@dataclass(frozen=True)
class MakesOnCpu(Pass):
    def run(self, graph: Graph) -> None:
        old = graph.module("conv_out")
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
        with torch.no_grad():
            new.weight.copy_(old.weight / 2)
        graph.replace("conv_out", new)


@pytest.mark.parametrize("one", [LowRank(), HalveLast(), Chain((HalveLast(), LowRank()))])
def test_weights_made_of_weights_come_back(unet: UNet2DConditionModel, one: Pass, tmp_path: Path) -> None:
    made = sdgraph.apply(unet, [one])
    assert made.report.passes[0].difference > 0
    made.save_pretrained(tmp_path / "unet")
    call = call_of(unet)
    assert torch.equal(answer(GraphUNet.from_pretrained(tmp_path / "unet"), call), answer(made, call))


def test_weights_copied_into_modules_on_another_device_are_named_when_saving(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    with pytest.raises(ModeError, match=r"device=weight\.device") as caught:
        sdgraph.apply(unet, [MakesOnCpu()]).save_pretrained(tmp_path / "unet")
    assert "test_passes.py:" in caught.value.where


# -- where it went wrong ----------------------------------------------------------------------------------------------


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


def test_an_error_inside_of_a_pass_names_its_line_and_what_it_worked_on(traced: Graph) -> None:
    line = inspect.getsourcelines(CrashOnRegion)[1]
    with pytest.raises(PassError, match=r"KeyError: 'mid_block\.resnets\.0'") as caught:
        sdgraph.apply(traced, [CrashOnRegion()])
    named = "path = mid_block.resnets.0, region = mid_block.resnets.0"
    assert caught.value.where.endswith(f"test_passes.py:{line + 5}, with {named}")
    line = inspect.getsourcelines(CrashInCode)[1]
    with pytest.raises(PassError, match="KeyError: 'gone'") as caught:
        sdgraph.apply(traced, [CrashInCode()])
    assert caught.value.where.endswith(f"test_passes.py:{line + 5}, with x = conv_in of conv_in")
    line = inspect.getsourcelines(WrongPath)[1]
    with pytest.raises(PathError, match="did you mean 'mid_block'") as missing:
        sdgraph.apply(traced, [Chain((Scale(), WrongPath()))])
    assert "\n  pass:  WrongPath(), " in str(missing.value)
    assert f"test_passes.py:{line + 3}" in str(missing.value)
    assert str(missing.value).count("pass:") == 1


@pytest.mark.slow
def test_a_pass_of_the_running_script_is_told_when_saving(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "import sdgraph, tests.models\n"
        "@dataclass(frozen=True)\n"
        "class Twice(sdgraph.Pass):\n"
        "    def run(self, graph):\n"
        "        graph.insert_after(graph.output, lambda x: x * 2)\n"
        "sdgraph.apply(tests.models.build(), [sdgraph.Chain((Twice(),))], verify=False).save_pretrained('saved')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "script.py:7: UserWarning: Twice is defined in the script that runs" in done.stderr
    with pytest.raises(SavedError, match="no pass named 'Twice'"):
        GraphUNet.from_pretrained(tmp_path / "saved")


# -- what a pass requires of a call -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Squares(Pass):
    """Cuts the map into squares of 2 by 2 and joins them again, which only even sizes allow."""

    contract: ClassVar[Contract] = Contract.EXACT
    required: bool = True

    def run(self, graph: Graph) -> None:
        if self.required:
            graph.require("H % 2 == 0", "squares are of 2 by 2")
            graph.require("W % 2 == 0", "squares are of 2 by 2")
        graph.insert_after(graph.region("conv_in").output, self.squares)

    def squares(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        squares = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 1, 2, 4, 3, 5)
        return squares.permute(0, 1, 2, 4, 3, 5).reshape(B, C, H, W)


@dataclass(frozen=True)
class Requires(Pass):
    conditions: tuple[str, ...] = ()

    def run(self, graph: Graph) -> None:
        for condition in self.conditions:
            graph.require(condition)
        Scale().run(graph)


@pytest.fixture(scope="module")
def squares(unet: UNet2DConditionModel) -> GraphUNet:
    return sdgraph.apply(unet, [Squares()])


def test_a_pass_requires_sizes_and_calls_that_have_others_are_refused(
    unet: UNet2DConditionModel, traced: Graph, squares: GraphUNet, tmp_path: Path
) -> None:
    with pytest.raises(ShapeError, match="cannot take"):
        sdgraph.apply(traced, [Squares(required=False)])
    squares.save_pretrained(tmp_path / "unet")
    loaded = GraphUNet.from_pretrained(tmp_path / "unet")
    chained = sdgraph.apply(copy.deepcopy(loaded), [Chain((Scale(2.0), Scale(0.5)))])
    for made in (squares, loaded, chained):
        for sizes in ({}, {"H": 10, "W": 6, "B": 3}):
            call = call_of(unet, **sizes)
            assert torch.equal(answer(made, call), answer(unet, call))
        for sizes in ({"H": 9}, {"W": 7}):
            with pytest.raises(CallError, match=r"where:.*Squares\(\): squares are of 2 by 2"):
                made(**call_of(unet, **sizes))
    assert "H/2" in squares.graph.text(within="conv_in")
    assert traced.guards == sdgraph.trace(unet).guards  # the graph that came in requires nothing
    assert traced.dims.symbols != squares.graph.dims.symbols


@pytest.mark.slow
def test_what_a_pass_requires_is_exported(unet: UNet2DConditionModel, squares: GraphUNet, tmp_path: Path) -> None:
    onnx.export(squares, tmp_path / "bundle")
    exported = ort.ORTUNet.from_pretrained(tmp_path / "bundle", provider="CPUExecutionProvider")
    call = call_of(unet, H=10, W=6)
    assert torch.allclose(answer(exported, call), answer(unet, call), atol=1e-4)
    with pytest.raises(CallError, match=r"Squares\(\): squares are of 2 by 2"):
        exported(**call_of(unet, H=9))


@pytest.mark.parametrize(
    ("conditions", "error", "words"),
    [
        (("H % 2",), SpecError, "is no comparison"),
        (("H % 2 == 0 and W % 2 == 0",), SpecError, "is no comparison"),
        (("X % 2 == 0",), SpecError, "there is no size 'X'"),
        (("__import__('os').getpid() == 0",), SpecError, "may not be in a condition"),
        (("H ** 9999999 == 0",), SpecError, "may not be in a condition"),
        (("H % W == 0",), SpecError, "may divide by 0"),
        (("H % == 0",), SpecError, "cannot read the condition"),
        (("H % 2 == 0", "H % 2 == 1"), EditError, "does not hold at the model's own size"),
        (("H % 8 == 0", "H < 65"), EditError, "satisfy H % 8 == 0 and H < 65"),
    ],
)
def test_what_cannot_be_required(
    traced: Graph, conditions: tuple[str, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        sdgraph.apply(traced, [Requires(conditions)])
    assert "test_passes.py:" in str(caught.value)


def test_verification_runs_at_sizes_that_are_required(traced: Graph) -> None:
    made = sdgraph.apply(traced, [Requires(("H % 8 == 0", "W == H"))])
    assert made.graph.allowed(H=3, W=9) == {"H": 16, "W": 16}
    assert made.report.passes[0].difference is not None
