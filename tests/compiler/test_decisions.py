"""Decisions of a pass by the values of weights are recorded, saved and taken over on loading."""

from __future__ import annotations

import copy
import inspect
import json
import operator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import Chain, Findings, Fixpoint, Graph, GraphUNet, Pass
from sdgraph.errors import (
    DecisionError,
    ModeError,
    SavedError,
)

from ..models import answer, call_of
from .sample_passes import Scale


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
        return Findings(notes=(path,))


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


@pytest.mark.law("Decisions by values of weights are recorded and replayed.")
@pytest.mark.slow
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
    assert f"test_decisions.py:{line}, with path = mid_block.resnets.0.conv1" in caught.value.where
    assert "graph.decide(" in caught.value.hint
    assert not (tmp_path / "unet").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [("torch.ones(2)", "is a Tensor that cannot be recorded"), ("float('nan')", "not JSON compliant")],
)
def test_what_cannot_be_recorded_is_no_decision(graph: Graph, value: str, words: str) -> None:
    with pytest.raises(DecisionError, match=words):
        sdgraph.apply(graph, [DecideBy(value)], verify=False)
    made = sdgraph.apply(graph, [DecideBy("(1, {2: 0.1})")], verify=False)
    assert made.graph.passes[0].decisions[0].value == [1, {"2": 0.1}]  # as it comes back from a file


@pytest.mark.slow
def test_decisions_that_do_not_fit_the_pass_are_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
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
