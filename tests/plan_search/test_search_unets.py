"""Search over several UNets: the UNet of each call, and what each of them reuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import sdgraph
from sdgraph import SearchResult, SwitchPlan
from sdgraph.errors import SavedError, ScheduleError, SourceError, SpecError
from sdgraph.passes import Bypass, InheritFeatures
from sdgraph.plan_search.candidates import Candidates, Proposal
from sdgraph.plan_search.evaluator import HELD_OUT, TUNING, VALIDATION, Evaluator, Measurements, SearchedPipeline
from sdgraph.plan_search.final_latents import typical
from sdgraph.plan_search.search import starting_proposals
from sdgraph.schedules import ByCall, SamplingRun

from ..models import build

PROMPTS = ("a red circle", "a blue square", "a green star")
OPTIONS: dict[str, Any] = {
    "num_inference_steps": 3, "reference_steps": 6, "progress": False, "trials": 9, "cost": "macs", "guidance_scale": 1
}  # fmt: skip
LIGHT = "PruneBlocks(('mid_block', 'up_blocks.0.resnets.0'))"
RUN = SamplingRun(6, solver="DDIM")


@pytest.fixture(scope="module")
def unets(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """A UNet, and the same one without two of its regions, which shares its weights."""
    return {"large": pipe.unet, "small": sdgraph.apply(pipe.unet, LIGHT, verify=False)}


@pytest.fixture(scope="module")
def options(unets: Mapping[str, Any]) -> Candidates:
    """Two UNets, of which the first one may inherit, or bypass a module."""
    sources = {name: sdgraph.apply(unet, (), verify=False) for name, unet in unets.items()}
    return Candidates(sources, {"large": (InheritFeatures.damped(), Bypass("mid_block")), "small": ()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def share(unets: Mapping[str, Any]) -> float:
    """The multiply-accumulates of the small UNet, as a share of the large one's."""
    large = sdgraph.trace(unets["large"])
    return float(unets["small"].graph.macs) / large.macs


@pytest.fixture(scope="module")
def found(pipe: StableDiffusionPipeline, unets: Mapping[str, Any], folder: Path, share: float) -> SearchResult:
    """The result of a search whose budget allows one call of the large UNet."""
    return sdgraph.search(pipe, (), PROMPTS, budget=(1 + 2 * share) / 3, unets=unets, folder=folder, **OPTIONS)


def latents(pipe: Any, unet: Any, seed: int = 0) -> torch.Tensor:
    own, pipe.unet = pipe.unet, unet
    try:
        with sdgraph.attach(pipe):
            return pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=1, output_type="latent",
                        generator=torch.Generator().manual_seed(seed)).images  # type: ignore[no-any-return]  # fmt: skip
    finally:
        pipe.unet = own


def test_the_first_call_of_a_turn_inherits_nothing(options: Candidates) -> None:
    """It may bypass, as no earlier call is needed for that; the first call of all computes everything."""
    text = "large@1:0 large@0:0.5 small@* large@0:0 large@0:0 large@1:0"
    proposal = options.simplified(Proposal.read(text))
    assert str(proposal) == "large@* large@0:0 small@* large@* large@0:0 large@1:0"
    assert str(options.simplified(Proposal.read("small@* large@1:0"))) == "small@* large@1:0"
    assert Proposal.read(str(proposal)) == proposal
    assert options.damped_calls(Proposal.read("large@* large@0:1 large@* small@* large@* large@0:1")) == ()


def test_moves_change_the_unet_of_a_call(options: Candidates) -> None:
    moves = {str(move) for move in Proposal.read("large@* small@*").neighbours(options.choices())}
    assert {"small@* small@*", "large@* large@*", "small@* large@*", "large@* large@0:0"} <= moves
    assert "large@0:0 small@*" not in moves


@pytest.mark.law("A plan of several UNets costs what the switch of its passes costs.")
def test_a_plan_costs_what_its_switch_does(options: Candidates) -> None:
    for text in (
        "large@* large@0:0 small@* large@* large@0:0 large@1:0",
        "small@* large@1:0 large@* small@* small@* small@*",
    ):
        proposal = options.simplified(Proposal.read(text))
        chains = options.chains(proposal, RUN)
        members = {
            name: sdgraph.apply(options.members[name].source, chain, verify=False) for name, chain in chains.items()
        }
        switched = sdgraph.switch(members, ByCall.of_calls(proposal.turns), verify=False)
        macs = options.cost(proposal, RUN, lambda name, reused: options.members[name].unet.graph.call_macs(reused))
        assert macs == switched.timetable(6).macs


@pytest.mark.slow
def test_the_budget_is_met_and_rivals_are_reported(found: SearchResult, share: float) -> None:
    chosen = found.rows[0]
    assert chosen.share <= (1 + 2 * share) / 3 * (1 + 1e-9)
    assert chosen.share == pytest.approx(found.timetable.macs / found.timetable.full_macs / 3)
    names = [row.name for row in found.rows]
    assert names[:2] == ["chosen", "best simple switch"]
    assert {"3 steps of large", "3 steps of small"} <= set(names)
    assert any(
        name.endswith("of large") and row.share >= chosen.share for name, row in zip(names, found.rows, strict=True)
    )
    assert str(found.plan) in str(found)
    assert chosen.held_out <= found.rows[1].held_out


@pytest.mark.law("A search among few plans finds the one with the least error on the validation prompts.")
@pytest.mark.slow
def test_all_of_few_plans_are_measured(pipe: StableDiffusionPipeline, unets: Mapping[str, Any], share: float) -> None:
    sources = {name: sdgraph.apply(unet, (), verify=False) for name, unet in unets.items()}
    candidates = Candidates(sources, {"large": (), "small": ()})
    groups = {TUNING: PROMPTS[:1], VALIDATION: PROMPTS[1:2], HELD_OUT: PROMPTS[2:]}
    call = {"num_inference_steps": 3, "guidance_scale": 1}
    pipeline = SearchedPipeline(pipe, candidates, groups, 0, call)
    evaluator = Evaluator(pipeline, Measurements(None, b""), "macs", 6, (2 + share) / 3, NoBar())
    _, start = starting_proposals(evaluator, 9)
    every = [Proposal.read(" ".join(f"{name}@*" for name in names)) for names in product(unets, repeat=3)]
    fitting = [one for one in every if sum(name == "large" for name in one.turns) <= 2]
    assert len(fitting) == 7
    assert start == min(fitting, key=lambda one: typical(evaluator.errors(one, VALIDATION)))


class NoBar:
    """A bar that is not shown."""

    def update(self) -> None:
        """Count nothing."""


@pytest.mark.law("A search that was stopped finds what one that was not stopped finds.")
@pytest.mark.slow
def test_resumed(
    pipe: StableDiffusionPipeline,
    unets: Mapping[str, Any],
    folder: Path,
    found: SearchResult,
    share: float,
    tmp_path: Path,
) -> None:
    (file,) = folder.glob("*.json")
    for path in folder.glob("*.npy"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = json.loads(file.read_text())
    half = dict(list(whole["numbers"].items())[: len(whole["numbers"]) // 2])
    (tmp_path / file.name).write_text(json.dumps({**whole, "numbers": half}))
    options = {**OPTIONS, "budget": (1 + 2 * share) / 3, "unets": unets, "folder": tmp_path}
    again = sdgraph.search(pipe, (), PROMPTS, **options)
    assert again.as_dict() == found.as_dict()
    assert json.loads((tmp_path / file.name).read_text()) == whole
    for text in ("no", "large@*", "large@5:0 large@* large@*", "medium@* large@* large@*"):
        numbers = {f"{VALIDATION}: {text}": [0.1]}
        (tmp_path / file.name).write_text(json.dumps({**whole, "numbers": numbers}))
        with pytest.raises(SavedError, match="is no plan of these candidates"):
            sdgraph.search(pipe, (), PROMPTS, **options)
    (tmp_path / file.name).write_text(file.read_text())
    latents_file = next(tmp_path.glob("*.npy"))
    latents_file.write_bytes(latents_file.read_bytes()[:100])
    with pytest.raises(SavedError, match="the latents are damaged"):
        sdgraph.search(pipe, (), PROMPTS, **options)
    (tmp_path / file.name).write_text('{"format": 1, "numbers": {"tuning: x": ["no"]}}')
    with pytest.raises(SavedError, match="the measurements are damaged"):
        sdgraph.search(pipe, (), PROMPTS, **options)


@pytest.mark.law("A plan that was saved and loaded generates the same, bit for bit.")
@pytest.mark.slow
def test_saved_and_loaded(
    pipe: StableDiffusionPipeline, unets: Mapping[str, Any], options: Candidates, tmp_path: Path
) -> None:
    proposal = options.simplified(Proposal.read("large@* large@0:0 small@*"))
    run = SamplingRun(3, solver=type(pipe.scheduler).__name__)
    passes = {name: chain.passes for name, chain in options.chains(proposal, run).items()}
    configs = {name: one.source.config for name, one in options.members.items()}
    plan = SwitchPlan(ByCall.of_calls(proposal.turns), passes, 3, run.solver, configs)
    plan.save(tmp_path / "plan.json")
    loaded = SwitchPlan.load(tmp_path / "plan.json")
    assert (loaded.schedule, loaded.passes, str(loaded)) == (plan.schedule, plan.passes, str(plan))
    expected = latents(pipe, options.unet(proposal, run))
    assert torch.equal(expected, latents(pipe, loaded.switch(unets, verify=False)))
    assert not torch.equal(expected, latents(pipe, options.alone("large")))


@pytest.mark.law("A search over one UNet by name finds what a search without names finds.")
@pytest.mark.slow
def test_one_unet(pipe: StableDiffusionPipeline) -> None:
    options = {**OPTIONS, "budget": 0.8, "trials": 3}
    alone = sdgraph.search(pipe, (InheritFeatures.damped(),), PROMPTS, **options)
    named = sdgraph.search(pipe, (InheritFeatures.damped(),), PROMPTS, unets={"large": pipe.unet}, **options)
    assert named.passes == alone.passes
    assert [(row.share, row.predicted, row.held_out) for row in named.rows] == [
        (row.share, row.predicted, row.held_out) for row in alone.rows
    ]
    assert named.timetable.macs == alone.timetable.macs


@pytest.mark.slow
def test_unets_and_features_together(pipe: StableDiffusionPipeline, unets: Mapping[str, Any], share: float) -> None:
    candidates = {"large": (InheritFeatures.damped(),)}
    found = sdgraph.search(pipe, candidates, PROMPTS, budget=(2 + share) / 3, unets=unets, **{**OPTIONS, "trials": 9})
    assert found.plan is not None
    assert found.rows[0].share <= (2 + share) / 3 * (1 + 1e-9)
    assert [row.name for row in found.rows[:3]] == ["chosen", "best even spacing", "best simple switch"]
    switched = found.plan.switch(unets, verify=False)
    assert switched.timetable(3).macs == found.timetable.macs


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (
            {"budget": 0.01},
            ScheduleError,
            "no plan meets a budget of 0.01: these UNets and candidates need at least 0.[0-9]+",
        ),
        ({"unets": {}}, SpecError, "there are no UNets"),
        ({"unets": [1]}, SpecError, "there are no UNets"),
        ({"unets": {"a b": None}}, SpecError, "a member is named 'a b'"),
        ({"candidates": {"medium": ()}}, SpecError, "there are candidates of a UNet 'medium'"),
        ({"candidates": {"small": "CleanUp"}}, SpecError, "the candidates are no passes"),
        ({"prompts": PROMPTS[:2]}, SpecError, "there are 2 prompts, too few"),
        ({"cost": __file__}, SpecError, "."),
        ({"num_inference_steps": 0}, SpecError, "num_inference_steps"),
    ],
)
def test_what_cannot_be_searched(
    pipe: StableDiffusionPipeline, unets: Any, change: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        sdgraph.search(
            **{"pipe": pipe, "candidates": (), "prompts": PROMPTS, "budget": 0.9, "unets": unets, **OPTIONS, **change}
        )


def test_unets_that_do_not_fit(pipe: StableDiffusionPipeline, unets: Mapping[str, Any]) -> None:
    options = {**OPTIONS, "budget": 0.9}
    switched = sdgraph.switch(unets, boundary_ratio=0.5, verify=False)
    with pytest.raises(
        SourceError, match=r"a switch of several UNets itself\n(.*\n)*.*pass the UNets that it was made of"
    ):
        sdgraph.search(pipe, (), PROMPTS, unets={"large": pipe.unet, "both": switched}, **options)
    with pytest.raises(SourceError, match="large and other differ: cross_attention_dim"):
        sdgraph.search(pipe, (), PROMPTS, unets={"large": pipe.unet, "other": build()}, **options)
    with pytest.raises(SpecError, match="there are no candidates to search"):
        sdgraph.search(pipe, (), PROMPTS, unets={"large": pipe.unet}, **options)


@pytest.mark.slow
def test_plans_that_do_not_fit(found: SearchResult, unets: Mapping[str, Any], tmp_path: Path) -> None:
    plan = found.plan
    assert plan is not None
    with pytest.raises(SpecError, match=r"there is no UNet '(large|small)', which the plan uses"):
        plan.switch({"lage": unets["large"]})
    with pytest.raises(SpecError, match="the plan is of another model: there "):
        plan.switch(dict.fromkeys(unets, build()))
    path = tmp_path / "plan.json"
    good = plan.as_dict()
    for change, complaint in {
        '"format": 9': "has format 9",
        '"schedule": "ByCall(("': "the plan is damaged",
        '"schedule": "Uniform(2)"': "the plan is damaged",
        '"passes": {"large": "Nothing()"}': "the plan is damaged",
        '"passes": 3': "the plan is damaged",
        '"steps": -1': "the plan is damaged",
        '"unets": {}': "name different UNets",
    }.items():
        path.write_text(json.dumps({**good, **json.loads(f"{{{change}}}")}))
        with pytest.raises(SavedError, match=complaint):
            SwitchPlan.load(path)
    path.write_text('{"format": 1, "unet": {}, "passes": ""}')
    with pytest.raises(SavedError, match="a plan of one UNet"):
        SwitchPlan.load(path)
    with pytest.raises(SavedError):
        SwitchPlan.load(tmp_path / "none.json")
