"""Search: what it measures is what happens, moves must hold on other prompts, and it can be stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import sdgraph
from sdgraph.atomic import owned
from sdgraph.errors import ScheduleError, SourceError, SpecError
from sdgraph.passes import Bypass, CleanUp, HoistInvariants, InheritFeatures
from sdgraph.plan_search.candidates import Candidates, Proposal, ProposedCall
from sdgraph.plan_search.evaluator import TUNING, VALIDATION, Evaluator, SearchedPipeline
from sdgraph.plan_search.search import Row, SearchResult, improve

CANDIDATES = (InheritFeatures.damped(), Bypass("mid_block"))
PROMPTS = ("a red circle", "a blue square", "a green star")
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "reference_steps": 8, "progress": False, "trials": 3}


@pytest.mark.slow
def test_the_name_of_the_package_is_the_function() -> None:
    """Whatever module was imported before: an import of a submodule sets its name in the package."""
    code = """
import importlib, pkgutil, sdgraph
for module in pkgutil.walk_packages(sdgraph.__path__, "sdgraph."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert callable(sdgraph.search) and sdgraph.search.__module__ == "sdgraph.plan_search.search"
modules = {module.name for module in pkgutil.iter_modules(sdgraph.__path__)}
assert modules.isdisjoint({*sdgraph.__all__} - {"errors"})
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_plan_generates_what_its_passes_do(pipe: StableDiffusionPipeline) -> None:
    """Bit for bit, also with several images of a prompt."""
    call = {"num_inference_steps": 5, "num_images_per_prompt": 2}
    source = sdgraph.apply(pipe.unet, (), verify=False)
    options = Candidates({"": source}, {"": CANDIDATES})
    pipeline = SearchedPipeline(pipe, options, {TUNING: PROMPTS[:1], VALIDATION: PROMPTS[1:2]}, 7, call)
    proposal = options.simplified(Proposal.read("* 0:0.5 * 0:0.75 1:0"))
    found = pipeline.latents(proposal, VALIDATION)
    own, pipe.unet = pipe.unet, sdgraph.apply(source, options.chains(proposal, pipeline.run)[""], verify=False)
    try:
        with sdgraph.attach(pipe):
            generators = [torch.Generator().manual_seed(seed) for seed in (9, 10)]
            expected = pipe([PROMPTS[1]], generator=generators, output_type="latent", **call).images
    finally:
        pipe.unet = own
    assert torch.equal(found, expected)
    assert not torch.equal(found, pipeline.unchanged[VALIDATION])
    everything = Proposal.spaced(5, 5, frozenset(), 0.0)
    assert torch.equal(pipeline.latents(everything, VALIDATION), pipeline.unchanged[VALIDATION])


@pytest.mark.slow
def test_a_budget_is_met_and_another_reuses_what_was_measured(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    own = pipe.unet
    found = sdgraph.search(pipe, CANDIDATES, PROMPTS, budget=0.7, cost="macs", folder=tmp_path, **OPTIONS)
    assert pipe.unet is own
    unet = sdgraph.apply(own, found.passes, verify=False)
    chosen, even, fewer, whole = found.rows
    assert unet.graph.timetable(4).macs == found.timetable.macs
    assert found.timetable.macs == pytest.approx(chosen.share * 4 * unet.graph.macs)
    assert max(chosen.share, even.share) <= 0.7
    assert chosen.share <= fewer.share <= chosen.share + 1 / 4
    assert fewer.name == f"{round(4 * fewer.share)} steps, all computed"
    assert (whole.name, whole.share) == ("4 steps, all computed", 1)
    assert chosen.held_out <= even.held_out
    assert found.moved == (chosen.held_out < even.held_out)
    assert sdgraph.parse(found.as_dict()["passes"]) == (found.passes,)
    (file,) = tmp_path.glob("*.json")
    before = json.loads(file.read_text())
    latents = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(latents) == 3
    # Another budget takes over what was measured; the next search begins with the best known plan.
    looser = {**OPTIONS, "budget": 0.75, "trials": 1}
    again = sdgraph.search(pipe, CANDIDATES, PROMPTS, cost="macs", folder=tmp_path, **looser)
    after = json.loads(file.read_text())
    assert before["numbers"].items() <= after["numbers"].items()
    assert latents == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert again.rows[0].share <= 0.75
    assert again.rows[3] == whole


class KnownErrors(Evaluator):
    """An evaluator whose errors are a function of dampings, without generations.

    Args:
        errors: the function of the damping of the second call and of a group that returns errors, (images,).
    """

    def __init__(self, errors: Any) -> None:
        self.candidates: Any = SimpleNamespace(
            simplified=lambda proposal: proposal, choices=lambda: [ProposedCall(frozenset({0}))]
        )
        self._known = errors

    def errors(self, proposal: Proposal, group: str) -> Any:
        return np.array(self._known(proposal.calls[1].damping, group))

    def fits(self, proposal: Proposal) -> bool:
        return True

    def fitted(self, proposal: Proposal) -> Proposal:
        return proposal


START = Proposal((ProposedCall(), ProposedCall(frozenset({0}), 0.0), ProposedCall()))


def improved_damping(evaluator: Evaluator, trials: int = 40) -> float:
    return improve(evaluator, START, trials, 0).calls[1].damping


def test_moves_go_downhill() -> None:
    assert improved_damping(KnownErrors(lambda d, group: [0.01 + (d - 0.75) ** 2] * 4)) == 0.75


def test_a_move_that_does_not_hold_on_other_prompts_is_not_made() -> None:
    tuned = KnownErrors(lambda d, group: [(0.01 + (d - 0.75) ** 2 if group == TUNING else 0.01 + d**2)] * 4)
    assert improved_damping(tuned) == 0


def test_a_gain_within_the_standard_error_is_none() -> None:
    def errors(d: float, group: str) -> list[float]:
        return [1 - 0.9 * bool(d), *[1 + 0.2 * bool(d)] * 9]  # one prompt gains much, the others lose

    assert np.log(errors(0.25, TUNING)).mean() < np.log(errors(0, TUNING)).mean()
    assert improved_damping(KnownErrors(errors)) == 0


@pytest.mark.parametrize(
    ("predicted", "held_out", "warned"),
    [
        (0.06, 0.78, "the error on the held-out prompts is 13 times what was predicted (prompts: 2)"),
        (0.78, 0.06, "the error on the held-out prompts is 1/13 of what was predicted"),
        (0.5, 0.9, ""),
        (0.0, 0.0, ""),
    ],
)
def test_a_prediction_that_is_off_is_warned_of(
    predicted: float, held_out: float, warned: str, small: sdgraph.Graph
) -> None:
    rows = (Row("chosen", 0.5, predicted, held_out), Row("best even spacing", 0.5, 0.5, 0.5))
    chain = sdgraph.Chain(CANDIDATES[:1])
    timetable = sdgraph.apply(small, InheritFeatures.deep_cache(), verify=False).graph.timetable(6)
    found = SearchResult(chain, timetable, rows, held_out < 0.5, 2, 100, 6, {})
    assert warned in found.warning
    assert bool(warned) == bool(found.warning) == ("warning:" in str(found)) == (found.as_dict()["warning"] is not None)
    assert ("no move from the even spacing helped" in " ".join(str(found).split())) == (not found.moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"budget": 0.01}, ScheduleError, "no plan meets a budget of 0.01: these candidates need at least 0.[0-9]+"),
        ({"budget": 1.5}, SpecError, "budget is 1.5"),
        ({"candidates": ()}, SpecError, "no candidates"),
        ({"candidates": (CleanUp(),)}, SpecError, "has no sites"),
        ({"candidates": (HoistInvariants(),)}, SpecError, "has no sites to give a schedule"),
        ({"prompts": PROMPTS[:2]}, SpecError, "there are 2 prompts, too few"),
        ({"prompts": ()}, SpecError, "no prompts"),
        ({"cost": "minutes"}, SpecError, "there is no file minutes"),
        ({"output_type": "pil"}, SpecError, "search sets output_type itself"),
        ({"pipe": object()}, SourceError, "object has no UNet"),
    ],
)
def test_what_cannot_be_searched(
    pipe: StableDiffusionPipeline, change: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    given = {"pipe": pipe, "candidates": CANDIDATES[:1], "prompts": PROMPTS, "budget": 0.9, "cost": "macs", **change}
    with pytest.raises(error, match=complaint):
        sdgraph.search(**given, **{**OPTIONS, "num_inference_steps": 2, "reference_steps": 2})


def test_a_random_solver_is_refused(pipe: StableDiffusionPipeline) -> None:
    own, pipe.scheduler = pipe.scheduler, EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    try:
        with pytest.raises(SourceError, match="adds random numbers"):
            sdgraph.search(pipe, CANDIDATES, PROMPTS, budget=0.5, **OPTIONS)
    finally:
        pipe.scheduler = own


@pytest.mark.slow
def test_one_search_at_a_time_writes_to_a_folder(pipe: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "budget": 0.7, "cost": "macs", "folder": tmp_path}
    with ThreadPoolExecutor(1) as other, owned(tmp_path, SpecError, "folder"):
        second = other.submit(sdgraph.search, pipe, CANDIDATES, PROMPTS, **options)
        with pytest.raises(SpecError, match=f"process {os.getpid()} on .* is writing to"):
            second.result()
    assert not list(tmp_path.glob("*.json"))
