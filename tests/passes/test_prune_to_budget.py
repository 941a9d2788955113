"""PruneToBudget meets its budgets, is recorded as a plain PruneBlocks, and refuses an analysis of another UNet."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from pathlib import Path

import pytest
import torch

import sdgraph
from sdgraph import Redundancy
from sdgraph.errors import NoChangeError, SavedError, SpecError
from sdgraph.passes import CleanUp, Overparameterize, PruneBlocks, PruneToBudget

from ..models import ONE_LEVEL, build


@pytest.fixture(scope="module")
def found(small: sdgraph.Graph) -> Redundancy:
    """The analysis of the small UNet on random inputs, without times."""
    return sdgraph.analyse_unet(small, levels=("block", "layer"), calls=1)


def left(pruned: sdgraph.Graph, whole: sdgraph.Graph) -> dict[str, float]:
    sizes = [sum(p.numel() for p in graph.parameters().values()) for graph in (pruned, whole)]
    return {"macs": pruned.macs / whole.macs, "parameters": sizes[0] / sizes[1]}


@pytest.mark.law("A UNet that is pruned to a budget meets it, with everything counted that nothing reads any more")
@pytest.mark.parametrize("budgets", [{"macs": 0.8}, {"parameters": 0.5}, {"macs": 0.5, "parameters": 0.45}])
def test_budgets_are_met_in_the_pruned_unet(small: sdgraph.Graph, found: Redundancy, budgets: dict[str, float]) -> None:
    choice = found.cheapest(**budgets, neighbours=None, unet=small)  # type: ignore[arg-type]
    pruned = sdgraph.apply(small, PruneBlocks(choice.paths), verify=False).graph
    for name, share in left(pruned, small).items():
        assert choice.left[name] == pytest.approx(share, abs=1e-12)
        assert share <= budgets.get(name, 1.0)


def test_what_dies_with_several_removals_together_is_counted(small: sdgraph.Graph, found: Redundancy) -> None:
    # Without any resnet nothing reads the time embedding, which no single removal saves.
    resnets = dataclasses.replace(found, removals=tuple(one for one in found.removals if ".resnets." in one.path))
    summed = 1 - sum(one.parameters for one in resnets.removals)
    pruned = sdgraph.apply(small, PruneBlocks(tuple(one.path for one in resnets.removals)), verify=False).graph
    counted = left(pruned, small)["parameters"]
    assert counted < summed - 0.001
    with pytest.raises(SpecError) as caught:
        resnets.cheapest(parameters=0.001, neighbours=None)
    least = float(caught.value.hint.rpartition("=")[2])
    assert summed <= least < summed + 0.002  # without the UNet shares are sums
    with pytest.raises(SpecError) as caught:
        resnets.cheapest(parameters=0.001, neighbours=None, unet=small)
    least = float(caught.value.hint.rpartition("=")[2])
    assert counted <= least < counted + 0.002
    choice = resnets.cheapest(parameters=least, neighbours=None, unet=small)
    assert choice.left["parameters"] == pytest.approx(counted)


def test_time_is_predicted_by_adding_up_also_of_a_pruned_unet(small: sdgraph.Graph, found: Redundancy) -> None:
    layers = tuple(dataclasses.replace(one, time=0.1) for one in found.removals if one.level == "layer")
    timed = dataclasses.replace(found, target="eager", removals=layers)
    choice = timed.cheapest(time=0.85, unet=small)
    assert len(choice.paths) == 2
    assert choice.left["time"] == pytest.approx(0.8)
    pruned = sdgraph.apply(small, PruneBlocks(choice.paths[0]), verify=False)
    again = sdgraph.apply(pruned, PruneToBudget(time=0.85, analysis=timed), verify=False)
    assert set(again.graph.removed) == set(choice.paths)
    by_gate = tuple(
        dataclasses.replace(one, gate=0.0 if number == 1 else 1.0) for number, one in enumerate(timed.removals)
    )
    gated = dataclasses.replace(timed, removals=by_gate)
    learned = sdgraph.apply(small, PruneToBudget(time=0.95, analysis=gated, criterion="gate"), verify=False)
    assert set(learned.graph.removed) == {timed.removals[1].path}
    with pytest.raises(SpecError, match="no gate"):
        sdgraph.apply(small, PruneToBudget(time=0.95, analysis=timed, criterion="gate"), verify=False)


def test_the_least_joint_budget_can_be_met(small: sdgraph.Graph, found: Redundancy) -> None:
    with pytest.raises(SpecError, match=r"no choice meets macs=0\.02, parameters=0\.01") as caught:
        found.cheapest(macs=0.02, parameters=0.01, unet=small)
    text = caught.value.hint.removeprefix("the least possible is ").removesuffix(", or set neighbours=None")
    budgets = {name: float(share) for name, _, share in (part.partition("=") for part in text.split(", "))}
    choice = found.cheapest(**budgets, unet=small)  # type: ignore[arg-type]
    assert all(choice.left[name] <= share for name, share in budgets.items())


def test_it_is_recorded_saved_and_printed_as_a_plain_prune_blocks(
    small: sdgraph.Graph, found: Redundancy, tmp_path: Path
) -> None:
    found.save(tmp_path / "analysis.json")
    file = str(tmp_path / "analysis.json")
    unet = sdgraph.apply(small, f"PruneToBudget(macs=0.8, analysis={file!r}), CleanUp", verify=False)
    choice = found.cheapest(macs=0.8, unet=small)
    assert [str(one) for one in unet.graph.passes] == [f"PruneBlocks({choice.paths!r})", "CleanUp()"]
    assert set(unet.graph.removed.values()) == {f"PruneBlocks({choice.paths!r})"}
    assert f"chosen by PruneToBudget(macs=0.8, analysis={file!r})" in str(unet.report)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "analysis.json").unlink()
    loaded = sdgraph.GraphUNet.from_pretrained(tmp_path / "unet")
    assert loaded.graph.macs == unet.graph.macs
    with pytest.raises(SavedError):
        sdgraph.apply(small, f"PruneToBudget(macs=0.8, analysis={file!r})", verify=False)


def test_passes_within_a_chain_choose_too(small: sdgraph.Graph, found: Redundancy) -> None:
    budget = PruneToBudget(macs=0.8, analysis=found)
    cleaned = sdgraph.apply(small, sdgraph.Chain((CleanUp(), budget)), verify=False)  # which is exact
    assert set(cleaned.graph.removed) == set(sdgraph.apply(small, budget, verify=False).graph.removed)
    with pytest.raises(SpecError, match="structure differs"):
        sdgraph.apply(small, sdgraph.Chain((Overparameterize("**.conv1"), budget)), verify=False)
    first = PruneBlocks(min(found.removals, key=found.error).path)
    unet = sdgraph.apply(small, sdgraph.Chain((first, budget, CleanUp())), verify=False)
    (recorded,) = unet.graph.passes
    assert isinstance(recorded.one, sdgraph.Chain)
    assert recorded.one.passes[::2] == (first, CleanUp())
    assert isinstance(recorded.one.passes[1], PruneBlocks)
    assert left(unet.graph, small)["macs"] <= 0.8


def test_its_text_and_its_pickle_come_back(found: Redundancy) -> None:
    for one in (
        PruneToBudget(macs=0.7),
        PruneToBudget(0.7, parameters=0.6, analysis="a.json", neighbours=None, tuned=True),
        PruneToBudget(macs=0.7, levels=("layer",), seed=3, neighbours=(1, 2)),
    ):
        assert sdgraph.parse(str(one)) == (one,)
        assert pickle.loads(pickle.dumps(one)) == one
    assert PruneToBudget(macs=0.7, analysis=Path("a.json")) == PruneToBudget(macs=0.7, analysis="a.json")
    held = PruneToBudget(macs=0.7, analysis=found)
    assert pickle.loads(pickle.dumps(held)) == held
    assert str(held) == f"PruneToBudget(macs=0.7, analysis='<of {found.model[:8]}>')"


def test_stages_are_those_of_the_chosen_removals(small: sdgraph.Graph, found: Redundancy) -> None:
    choice = found.cheapest(macs=0.8, unet=small)
    stages = PruneToBudget(macs=0.8, analysis=found).stages(small)
    assert stages == PruneBlocks(choice.paths).stages(small)


def test_a_pruned_unet_leaves_out_what_is_gone(small: sdgraph.Graph, found: Redundancy) -> None:
    gone = min(found.removals, key=found.error).path
    pruned = sdgraph.apply(small, PruneBlocks(gone), verify=False)
    target = left(pruned.graph, small)["macs"] - 0.1
    again = sdgraph.apply(pruned, PruneToBudget(macs=target, analysis=found), verify=False)
    assert left(again.graph, small)["macs"] <= target  # of the whole UNet
    assert gone in again.graph.removed
    assert "left out: " in str(again.report)
    chosen = set(again.graph.removed) - {gone}
    assert chosen
    choice = found.cheapest(macs=target, unet=pruned)
    assert gone in choice.gone
    assert set(choice.paths) == chosen


def test_an_analysis_of_another_unet_is_refused_by_structure_and_by_weights(
    small: sdgraph.Graph, found: Redundancy
) -> None:
    other = sdgraph.trace(build("sd15"))
    with pytest.raises(SpecError, match="structure differs") as caught:
        found.cheapest(macs=0.8, unet=other)
    assert "analyse this UNet" in caught.value.hint
    tuned = copy.deepcopy(sdgraph.GraphUNet(small.copy()))
    with torch.no_grad():
        next(p for name, p in tuned.named_parameters() if "conv_out" in name).add_(1)
    with pytest.raises(SpecError, match=r"structure is the same, and 1 of \d+ weights differ") as caught:
        found.cheapest(macs=0.8, unet=tuned)
    assert "conv_out" in caught.value.where
    expected = found.cheapest(macs=0.8, unet=small)
    assert found.cheapest(macs=0.8, unet=tuned, tuned=True) == expected
    pruned = sdgraph.apply(tuned, PruneBlocks(expected.paths[0]), verify=False)
    with pytest.raises(SpecError, match="weights differ"):
        found.cheapest(macs=0.5, unet=pruned)
    found.cheapest(macs=0.8, unet=pruned, tuned=True)


def test_without_an_analysis_it_measures_and_says_so(small: sdgraph.Graph, caplog: pytest.LogCaptureFixture) -> None:
    one = PruneToBudget(macs=0.8, levels=("layer",))
    with caplog.at_level(logging.WARNING, "sdgraph"):
        unet = sdgraph.apply(small, one, verify=False)
    assert "measured on random inputs" in caplog.text
    assert "measured on random inputs" in str(unet.report)
    assert left(unet.graph, small)["macs"] <= 0.8
    assert sdgraph.apply(small, one, verify=False).graph.passes == unet.graph.passes  # by the seed


def test_what_is_refused(small: sdgraph.Graph, found: Redundancy) -> None:
    for wrong in (0, -0.1, 1.1, float("nan"), "0.7"):
        with pytest.raises(SpecError):
            PruneToBudget(macs=wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no budget"):
        PruneToBudget()
    with pytest.raises(SpecError, match=r"neighbours is \(3, 2\)"):
        PruneToBudget(macs=0.7, neighbours=(3, 2))
    with pytest.raises(SpecError, match="meets the budget as it is"):
        sdgraph.apply(small, PruneToBudget(macs=1.0, analysis=found), verify=False)
    with pytest.raises((SpecError, NoChangeError), match="no choice meets"):
        sdgraph.apply(small, PruneToBudget(macs=0.01, analysis=found), verify=False)
    with pytest.raises(SpecError, match="no budget in time"):
        found.cheapest(time=0.7)
    assert "time" not in found.cheapest(macs=0.8).left


@pytest.mark.slow
def test_it_passes_the_check_of_passes_and_exports(found: Redundancy, tmp_path: Path) -> None:
    found.save(tmp_path / "analysis.json")
    one = PruneToBudget(macs=0.8, analysis=str(tmp_path / "analysis.json"))
    assert sdgraph.testing.check(one, build(**ONE_LEVEL), export=True) is not None
